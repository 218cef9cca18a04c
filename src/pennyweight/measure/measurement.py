"""Measuring a model: weighed, scored and timed by its kind."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pennyweight
from pennyweight.data.windowing import windows as draw
from pennyweight.errors import DataError, ModelError
from pennyweight.evaluate.agreement import agreement
from pennyweight.evaluate.embedding import cosines, embed_windows
from pennyweight.evaluate.forward import accepts, looking
from pennyweight.evaluate.perplexity import Report, token_losses
from pennyweight.measure import decoding, energy, latency, memory, probe, roofline
from pennyweight.measure.cost import ModelCost, cost
from pennyweight.measure.figures import Figure, Measurement, exact, sampled
from pennyweight.measure.stats import Interval, bootstrap, exponential, paired_ratio
from pennyweight.model import anatomy
from pennyweight.model.loading import load
from pennyweight.model.model import Model

Source = Model | nn.Module | str | Path
Figures = Iterator[tuple[str, Figure]]

_PROMPT = 128
_WRITTEN = 32


@dataclass(frozen=True)
class _Setting:
    """How one measurement is taken."""

    model: Model
    ids: Tensor | None
    context: int
    batch: int
    dtype: torch.dtype | None
    report: Report | None


def measure(
    model: Source,
    data: str | Path | Sequence[str] | Tensor | None = "wiki",
    *,
    reference: Source | None = None,
    windows: int = 32,
    length: int = 512,
    batch: int = 4,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    timed: bool = True,
    peak: bool | None = None,
    report: Report | None = None,
) -> Measurement:
    """What ``model`` costs and how good it is.

    Language models are scored by the loss on held-out text; encoders by the cosine to the embeddings of ``reference``,
    and language models compared with it too; other kinds are only weighed and timed.

    Args:
        model: anything that `model.load` takes, or a loaded model.
        data: text (see `data.windows`), or windows of token ids (W, T); None for no quality.
        reference: the original, over the same tokenizer.
        windows: drawn from the held-out part of the text.
        length: tokens of a window, and the context that cache and attention are given for; cut to what the model
            takes.
        batch: windows run together.
        seed: of the draw.
        dtype: of matrix products; None for that of the weights.
        timed: whether to take times.
        peak: whether to load and run it in a process of its own for its peak memory; None where ``model`` is a name or
            a path, so that one can.
        report: called with the windows done and how many there are.

    Raises:
        DataError: no data, too short, or no tokenizer.
        ModelError: outputs that are broken; it names the window.
    """
    loaded = model if isinstance(model, Model) else load(model)
    original = reference if isinstance(reference, Model) or reference is None else load(reference)
    context = min(length, _positions(loaded) or length)
    ids = _ids(loaded, data, windows, context, seed, original is not None)
    if ids is not None:
        context = ids.shape[1]
    if peak and not isinstance(model, (str, Path)):
        raise ModelError(f"{loaded.name}: peak memory is that of a process that loads it; give its name or its path")
    setting = _Setting(loaded, ids, context, batch, dtype, report)
    costs = cost(loaded)
    samples: dict[str, tuple[float, ...]] = {}
    figures = dict(_costs(costs, context))
    if peak or (peak is None and isinstance(model, (str, Path))):
        figures |= _peak(setting, model)
    figures |= _quality(setting, original, samples)
    if timed:
        figures |= _times(setting, costs)
    return Measurement(loaded.name, loaded.kind, figures, samples, _conditions(setting, data, original, seed))


def _positions(model: Model) -> int | None:
    """The longest text ``model`` has positions for; None where it does not say."""
    # some models keep the first positions of their table for padding: their tokenizer knows
    said = (
        getattr(model.config, "max_position_embeddings", None),
        getattr(model.tokenizer, "model_max_length", None),
    )
    return min((number for number in said if isinstance(number, int) and 0 < number < 10**9), default=None)


def _ids(model: Model, data: Any, count: int, length: int, seed: int, compared: bool) -> Tensor | None:
    if isinstance(data, Tensor):
        return data
    if data is None or model.kind not in ("causal-lm", "encoder"):
        return None
    if model.kind == "encoder" and model.tokenizer is None and not compared:
        return None  # nothing is scored without a reference, and times are taken on any tokens
    return draw(data, model.need_tokenizer(), part="heldout", length=length, count=count, seed=seed)


def _conditions(setting: _Setting, data: Any, original: Model | None, seed: int) -> dict[str, Any]:
    model, ids = setting.model, setting.ids
    found: dict[str, Any] = {
        "model_sha256": model.fingerprint,
        "reference": None if original is None else original.name,
        "reference_sha256": None if original is None else original.fingerprint,
        "context": setting.context,
        "dtype": "that of the weights" if setting.dtype is None else str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pennyweight": pennyweight.__version__,
    }
    if ids is not None:
        found["data"] = str(data) if isinstance(data, (str, Path)) else "given"
        found["data_sha256"] = hashlib.sha256(ids.contiguous().long().cpu().numpy().tobytes()).hexdigest()
        found |= {"windows": len(ids), "length": ids.shape[1], "seed": None if isinstance(data, Tensor) else seed}
    return found


def _costs(costs: ModelCost, context: int) -> Figures:
    yield "bytes", exact("bytes", costs.bytes, "of the tensors")
    yield "bytes_bf16", exact("bytes_bf16", costs.bytes_bf16, "2 bytes a parameter: 100 %")
    yield "params", exact("params", costs.params)
    yield "params_total", exact("params_total", costs.params_total)
    if costs.flops_per_token is not None:
        yield "flops", exact("flops", costs.flops_per_token, f"per {costs.unit}, without attention")
    if costs.attention:
        yield (
            "attention_flops",
            exact("attention_flops", costs.attention_flops(context), f"per {costs.unit}, {context} positions seen"),
        )
    if costs.bytes_read_per_token is not None and costs.unit == "token":
        yield "bytes_read", exact("bytes_read", costs.bytes_read_per_token)
    if costs.activation_bytes_per_token is not None:
        yield (
            "activation_bytes",
            exact("activation_bytes", costs.activation_bytes_per_token, f"per {costs.unit}, estimate"),
        )
    if costs.cache:
        yield "kv_bytes_per_token", exact("kv_bytes_per_token", costs.kv_bytes_per_token)
        yield "kv_bytes", exact("kv_bytes", costs.kv_bytes(context), f"{context} tokens")


def _peak(setting: _Setting, source: Source) -> Figures:
    assert isinstance(source, (str, Path))
    ids = None if setting.ids is None else setting.ids[:1].tolist()
    found = memory.peak(run_once, str(source), ids, setting.dtype)
    yield (
        "peak_memory",
        exact("peak_memory", found.bytes, "to load it and run one window, interpreter and libraries too"),
    )


def run_once(source: str, ids: list[list[int]] | None, dtype: torch.dtype | None) -> None:
    """Load ``source`` and run it once; what the process measured for peak memory does."""
    model = load(source)
    if ids is not None and model.kind == "causal-lm":
        token_losses(model.module, torch.tensor(ids), dtype=dtype)
    elif ids is not None:
        embed_windows(model.module, torch.tensor(ids), dtype=dtype)
    else:
        cost(model)


def _quality(setting: _Setting, original: Model | None, samples: dict[str, tuple[float, ...]]) -> Figures:
    module, ids = setting.model.module, setting.ids
    if ids is None:
        return
    options: dict[str, Any] = {"batch": setting.batch, "dtype": setting.dtype, "report": setting.report}
    if setting.model.kind == "encoder":
        if original is not None:
            found = cosines(*(embed_windows(each, ids, **options) for each in (original.module, module)))
            yield from _averaged("cosine", found, samples)
        return
    if original is None:
        losses, said = token_losses(module, ids, **options), None
    else:
        said = agreement(original.module, module, ids, **options)
        losses = said.other_losses
    yield from _averaged("loss", losses, samples)
    if losses.mean() < math.log(1e15):  # past that the model is broken, and the loss says so
        figure = _interval("loss", samples)
        value = math.exp(sum(samples["loss"]) / len(samples["loss"]))
        yield "perplexity", exact("perplexity", value) if figure is None else sampled("perplexity", exponential(figure))
    if said is not None:
        if len(ids) > 1:
            yield "perplexity_ratio", sampled("perplexity_ratio", paired_ratio(said.original_losses, losses))
        yield from _averaged("kl", said.kl, samples)
        yield from _averaged("agreement", said.same, samples)


def _averaged(key: str, values: Tensor, samples: dict[str, tuple[float, ...]]) -> Figures:
    """The mean over windows of ``values`` (W,) or (W, T), which become its samples."""
    means = values.double().reshape(len(values), -1).mean(1)
    samples[key] = tuple(means.tolist())
    interval = _interval(key, samples)
    yield key, exact(key, float(means.mean()), "one window") if interval is None else sampled(key, interval)


def _interval(key: str, samples: dict[str, tuple[float, ...]]) -> Interval | None:
    return bootstrap(samples[key]) if len(samples[key]) > 1 else None


def _times(setting: _Setting, costs: ModelCost) -> Figures:
    module = setting.model.module
    writes = bool(costs.cache) and costs.unit == "token" and accepts(module, "past_key_values")
    if not writes:
        sample = probe.sample_for(module, anatomy.of(module))
        if sample is None:
            return
        if setting.ids is not None and costs.unit == "token":
            named = isinstance(sample.inputs, dict)
            ids = setting.ids[:1]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if named else ids
            sample = probe.Sample(inputs, "token", ids.shape[1])
        with looking(module, setting.dtype):
            found = latency.time(lambda: probe.call(module, sample))
        yield "latency", sampled("latency", found.seconds, f"{sample.count} {sample.unit}(s), {found.threads} threads")
        return
    prompt = _prompt(setting, costs)
    speed = decoding.speed(module, prompt, tokens=_WRITTEN, repeats=3, dtype=setting.dtype)
    note = f"batch 1, {len(prompt)}-token prompt, {speed.threads} threads"
    yield "prefill", sampled("prefill", speed.prefill, note)
    yield "decode", sampled("decode", speed.decode, f"{note}, {_WRITTEN} tokens written")
    assert costs.flops_per_token is not None
    assert costs.bytes_read_per_token is not None
    context = len(prompt) + _WRITTEN // 2
    flops = costs.flops_per_token + costs.attention_flops(context)
    moved = costs.bytes_read_per_token + costs.kv_bytes(context)
    bound = roofline.bound(flops, moved, roofline.this_machine(setting.dtype or torch.float32))
    yield "decode_bound", exact("decode_bound", 1 / bound.seconds, f"bound by {bound.limit} as measured here")
    spent = energy.measure(lambda: decoding.greedy(module, prompt, tokens=_WRITTEN, dtype=setting.dtype))
    if spent is None:
        modeled = energy.model(flops, moved)
        yield "energy", exact("energy", modeled.joules, f"decoding; {modeled.source}")
    else:
        yield "energy", exact("energy", spent.joules / (len(prompt) + _WRITTEN), f"prompt and text; {spent.source}")


def _prompt(setting: _Setting, costs: ModelCost) -> Tensor:
    room = max(1, min(_PROMPT, (_positions(setting.model) or _PROMPT + _WRITTEN) - _WRITTEN))
    if setting.ids is not None:
        return setting.ids[0, :room]
    found = anatomy.of(setting.model.module).embedding
    if found is None:
        raise DataError(f"{setting.model.name}: nothing to time it on; give data=... or timed=False")
    return torch.arange(room) % found.shape[0]
