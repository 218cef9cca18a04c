"""Row 227, the roofline of every operation: with this machine tuned, it predicts a model's time to within 30 %."""

from __future__ import annotations

from statistics import median

import torch

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.measure import decoding
from pennyweight.measure.operations import Stage
from pennyweight.measure.roofline import roofline
from pennyweight.measure.tune import Tuning
from pennyweight.model.loading import load

_WITHIN = 1.3
_ROUNDS, _TOKENS = 5, 8
_LENGTHS = (64, 256)
_STAGES: tuple[Stage, ...] = ("prefill", "decode")

Setting = tuple[torch.dtype, int, Stage]


@claim(
    row=227,
    pace="slow",
    headline="operations and bytes of Llama-2-7B on an A6000 (section 2), kept by the tests; no predicted times there",
)
def a_tuned_roofline_predicts_prefill_and_decoding(assets: Assets) -> Outcome:
    models = {dtype: load(assets.smollm2().name, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    runs: dict[Setting, list[float]] = {}
    predicted: dict[Setting, list[float]] = {}
    bounds: dict[Setting, list[float]] = {}
    for _ in range(_ROUNDS):  # each predicted by what the machine could do just then: other programs slow both
        tuning = Tuning()
        tuning.measure()
        here = tuning.device()
        for dtype, model in models.items():
            for length in _LENGTHS:
                run = decoding.greedy(model.module, torch.arange(length), tokens=_TOKENS)
                for stage in _STAGES:
                    context = length + (_TOKENS // 2 if stage == "decode" else 0)
                    found = roofline(model, device=here, stage=stage, context=context)
                    assert found.seconds is not None
                    key = (dtype, length, stage)
                    runs.setdefault(key, []).append(getattr(run, stage))
                    predicted.setdefault(key, []).append(found.seconds)
                    bounds.setdefault(key, []).append(found.bound_seconds)
    once = next(iter(runs))
    factor = median(took / least for took, least in zip(runs[once], bounds[once], strict=True))
    scaled = {key: [factor * least for least in every] for key, every in bounds.items()}
    method, baseline, control = (_worst(guess, runs) for guess in (predicted, bounds, scaled))
    pairs = "; ".join(
        f"{str(key[0])[6:]} {key[1]} {key[2]} {1e3 * median(predicted[key]):.0f} ms for {1e3 * median(seconds):.0f}"
        for key, seconds in runs.items()
    )
    return Outcome(
        method=method, baseline=baseline, unit="worst factor between predicted and measured seconds",
        holds=method <= _WITHIN
        and all(least <= took for key in runs for least, took in zip(bounds[key], runs[key], strict=True)),
        control=("the bounds, scaled to one measured prefill", control),
        notes=f"SmolLM2-135M on {torch.get_num_threads()} threads, medians over {_ROUNDS} rounds, each beside its own "
        f"tuning: {pairs}. The baseline is the bound itself, which is under every single run.",
    )  # fmt: skip


def _worst(guess: dict[Setting, list[float]], runs: dict[Setting, list[float]]) -> float:
    ratios = [median(one / took for one, took in zip(guess[key], runs[key], strict=True)) for key in runs]
    return max(max(ratio, 1 / ratio) for ratio in ratios)
