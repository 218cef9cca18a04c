"""What one pass of a model computes and moves, operation by operation, for any batch, context and width of numbers.

Row 227. Source: Z. Yuan et al., "LLM Inference Unveiled: Survey and Roofline Model Insights", arXiv:2402.16363, and its
tool hahnyuan/LLM-Viewer. A product of a (M, N) weight with R rows takes 2MNR operations and moves the weight, R*N
numbers in and R*M out; keys and values go to the cache. Softmax takes 5 operations a score, a norm 7 a number, a gate
2, an addition 1.

Differs from the source: maps, norms and caches are read off the model itself, so that any architecture, compact weights
and experts are counted; causal attention computes the scores at or below the diagonal only; an addition reads both of
its terms; gates have the width of the feed-forward layer; fused attention writes each output once. ``compat=True``
counts as the published tool does: all scores, one term, gates of the model's width, queries of a prompt as wide as its
keys, a head of one operation a number for each sequence that moves its rows once a batch.

Shape letters: M out features, N in features, B sequences, T tokens, S context, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.forward import looking
from pennyweight.measure import probe
from pennyweight.measure.cost import Attention, LayerCost, ModelCost, cost
from pennyweight.model import anatomy
from pennyweight.model.model import Model

Stage = Literal["prefill", "decode"]
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")


@dataclass(frozen=True)
class Widths:
    """Bits of what is computed with.

    Attributes:
        weights: None for what is stored.
        activations: of everything between operations; None for the model's own dtype.
        cache: of keys and values; None for what the model keeps.
    """

    weights: float | None = None
    activations: float | None = None
    cache: float | None = None


@dataclass(frozen=True)
class Operation:
    """One operation of a pass.

    Attributes:
        name: of the layer, or the block and what it does there.
        role: "attention.query", "attention.scores", "norm", "ffn.gating", ...
        flops: computed.
        rows: of a product's input; 0 for what is no product with a weight.
        shape: (M, N) of its weight.
        weight, read, written, cache_read, cache_written: bytes.
    """

    name: str
    role: str
    flops: float
    rows: float = 0
    shape: tuple[int, int] = (0, 0)
    weight: float = 0
    read: float = 0
    written: float = 0
    cache_read: float = 0
    cache_written: float = 0

    @property
    def moved(self) -> float:
        """All bytes."""
        return self.weight + self.read + self.written + self.cache_read + self.cache_written

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.moved


@dataclass(frozen=True)
class Skeleton:
    """What of a model its operations are read off.

    Attributes:
        name: of the model.
        costs: of its layers.
        norms: path, and numbers it normalizes for one unit.
        heads: H; None where neither the configuration nor a module says.
        bits: of the dtype it computes in.
        causal: whether a token sees earlier ones only: of models that keep a cache.
        whole: whether a unit is a whole sample (an image), and not a token.
    """

    name: str
    costs: ModelCost
    norms: tuple[tuple[str, float], ...]
    heads: int | None
    bits: int
    causal: bool
    whole: bool

    @property
    def queries(self) -> float:
        """Queries of one unit: 1 for a token, the patches of an image."""
        if not self.whole:
            return 1
        return next((layer.rows or 0 for layer in self.costs.layers if layer.role == "attention.query"), 0)


def bare(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model of ``config`` without weights, on the meta device: enough to count what it does.

    Raises:
        ModelError: ``transformers`` builds no model of it.
    """
    causal = type(config) in AutoModelForCausalLM._model_mapping
    kind = AutoModelForCausalLM if causal else AutoModel
    try:
        with torch.device("meta"):
            found: nn.Module = kind.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(f"{type(config).__name__}: no model can be built of it ({error})") from error
    return found.eval()


def skeleton(model: Model | nn.Module) -> Skeleton:
    """Read ``model``, dense or compact, on any device; it is run twice on a few tokens.

    Raises:
        ModelError: it does not run on what it says it takes, or does not say.
    """
    module = model.module if isinstance(model, Model) else model
    costs, found = cost(module), anatomy.of(module)
    sample = probe.sample_for(module, found)
    name = model.name if isinstance(model, Model) else type(module).__name__
    if sample is None or costs.flops_per_token is None:
        raise ModelError(f"{name} does not say what it takes; its operations cannot be counted")
    numbers: dict[str, int] = {}

    def note(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            numbers[path] = numbers.get(path, 0) + output.numel()

        return module.get_submodule(path).register_forward_hook(hook)

    handles = [note(path) for path in found.norms]
    try:
        with looking(module):
            probe.call(module, sample)
    finally:
        for handle in handles:
            handle.remove()
    floats = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.empty(0))
    return Skeleton(
        name=name,
        costs=costs,
        norms=tuple((path, numbers.get(path, 0) / sample.count) for path in found.norms),
        heads=_heads(module),
        bits=8 * floats.element_size(),
        causal=bool(costs.cache),
        whole=not sample.unit.startswith("token"),
    )


def _heads(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    config = getattr(config, "text_config", None) or config
    said = (getattr(holder, name, None) for holder in (config, *module.modules()) for name in _HEADS)
    return next((number for number in said if isinstance(number, int)), None)


@dataclass(frozen=True)
class Pass:
    """One pass through a model.

    Attributes:
        stage: "prefill" reads the whole context at once, "decode" one token that sees it.
        batch: B.
        context: S, in tokens; of images it is ignored.
        widths: of numbers, in bits.
        fused: whether attention keeps its scores on the chip.
        buffer_bytes: of the chip, which says how often fused attention reads keys and values.
        compat: count as the published tool does.
    """

    stage: Stage = "decode"
    batch: int = 1
    context: int = 512
    widths: Widths = Widths()
    fused: bool = False
    buffer_bytes: float | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        if self.stage not in ("prefill", "decode"):
            raise OptionError(f"roofline: stage {self.stage!r}; give prefill or decode")
        if self.batch < 1 or self.context < 1:
            raise OptionError(f"roofline: batch {self.batch}, context {self.context}; give at least 1 of each")
        bits = (self.widths.weights, self.widths.activations, self.widths.cache)
        if not all(width is None or 0 < width <= 64 for width in bits):
            raise OptionError(f"roofline: widths {bits}; give bits above 0 and up to 64")
        if self.compat and self.fused:
            raise OptionError("roofline: the published tool's count is of attention in three steps; leave out fused")


def operations(found: Skeleton, one: Pass) -> Iterator[Operation]:
    """Every operation of the pass, in the order of the model's layers.

    Raises:
        ModelError: decoding with a model that keeps no cache, or scores of a model that does not say its heads.
    """
    if one.stage == "decode" and not found.costs.cache:
        raise ModelError(f"{found.name} keeps no cache: it has a prefill only")
    units = float(one.batch if found.whole or one.stage == "decode" else one.batch * one.context)
    number = (one.widths.activations or found.bits) / 8
    gated = any(layer.role.endswith((".gate", ".gate_up")) for layer in found.costs.layers)
    widest = max((layer.shape[0] for layer in found.costs.layers if layer.role == "attention.output"), default=0)
    caches = list(_cache_numbers(found))
    seen = 0
    for layer in found.costs.layers:
        if one.compat and layer.role.endswith("embedding"):
            continue
        kept = caches[min(seen, len(caches) - 1)] if caches else 0
        yield _product(found, layer, one, units, number, kept)
        rows = units * (layer.rows or 0)
        if layer.role in ("attention.output", "cross_attention.output") or layer.role.endswith(".down"):
            if layer.role.endswith(".down"):
                width = widest if one.compat else layer.shape[1]
                yield _plain(f"{layer.name} gating", "ffn.gating", 2, rows * width, 2 if gated else 1, number)
            terms = 1 if one.compat else 2
            yield _plain(f"{layer.name} added", "residual", 1, rows * layer.shape[0], terms, number)
        seen += layer.role == "attention.output"
    for path, numbers in found.norms:
        if not one.compat or path.split(".")[-2].isdigit():  # the tool leaves out the last norm
            yield _plain(path, "norm", 7, units * numbers, 1, number)
    for part in found.costs.attention:
        yield from _attention(found, part, one, number, caches)


def _plain(name: str, role: str, flops: int, numbers: float, terms: int, number: float) -> Operation:
    return Operation(name, role, flops * numbers, read=terms * numbers * number, written=numbers * number)


def _product(found: Skeleton, layer: LayerCost, one: Pass, units: float, number: float, cached: float) -> Operation:
    (m, n), share = layer.shape, layer.rows or 0
    last = layer.role.startswith("head") and bool(found.costs.cache)  # only the newest token is scored
    rows = float(one.batch) if layer.once or last else units * share
    table = layer.role.endswith("embedding")
    stored = (layer.bytes_read or 0) / min(1, share / m if table else share) if share else 0.0  # tied or not
    if one.widths.weights is not None:
        stored = m * n * one.widths.weights / 8
    if table:  # looked up, not multiplied
        return Operation(layer.name, layer.role, 0, weight=min(rows, m) * stored / m, written=rows * n * number)
    if layer.role.startswith("moe.experts"):  # read if any token chose it, each at random
        stored *= 1 - (1 - min(1, share)) ** units
    if one.compat and last:
        return Operation(layer.name, layer.role, rows * m * n, rows, (m, n), stored, n * number, m * number)
    flops = rows * (layer.flops / share if layer.flops and share else 0)
    kept = 0.0
    if found.costs.cache and layer.role in ("attention.key", "attention.value"):
        kept = m
    elif layer.role == "attention.qkv":
        kept = min(cached, m)
    return Operation(
        layer.name, layer.role, flops, rows, (m, n), stored, rows * n * number,
        written=rows * (m - kept) * number, cache_written=rows * kept * _place(found, one),
    )  # fmt: skip


def _cache_numbers(found: Skeleton) -> Iterator[float]:
    """Numbers that each layer keeps for a token."""
    for layer in found.costs.cache:
        kept = layer.packed
        yield layer.bytes / (found.bits / 8) if kept is None else kept.heads * (kept.key_dim + kept.value_dim)


def _attention(found: Skeleton, part: Attention, one: Pass, number: float, caches: list[float]) -> Iterator[Operation]:
    tokens = int(found.queries) if found.whole else one.context
    window = tokens if part.window is None else min(tokens, part.window)
    if one.stage == "decode":
        queries, pairs = 1, window
    elif found.causal and not part.cross and not one.compat:
        queries, pairs = tokens, window * (window + 1) // 2 + (tokens - window) * window
    else:
        queries, pairs = tokens, tokens * window
    width = part.flops / 4 / found.queries  # of the queries of a token, all heads
    scores = 2 * width * pairs * one.batch  # FLOPs; as many again for the values
    vectors = width * queries * one.batch * number
    keys, held = _keys(found, part, one, number, caches, tokens, window, width)
    name = f"block {part.block}"
    if found.heads is None:
        raise ModelError(f"{found.name} says nowhere how many heads it has; the scores cannot be counted")
    softmax = 5 * found.heads * pairs * one.batch
    matrix = found.heads * pairs * one.batch * number
    if one.fused:
        side = width / found.heads
        rows = side if one.buffer_bytes is None else min(ceil(one.buffer_bytes / (number * side)), side)
        again = ceil(queries / rows)  # a block of queries reads all keys and values
        yield Operation(
            f"{name} attention", "attention.fused", 2 * scores + softmax, read=vectors + 2 * again * keys,
            written=vectors, cache_read=2 * again * held,
        )  # fmt: skip
        return
    first, twice = vectors, 1
    if one.compat and one.stage == "prefill":
        first, twice = 0.0, 2
    yield Operation(
        f"{name} scores", "attention.scores", scores, read=first + keys, written=matrix, cache_read=twice * held
    )
    yield Operation(f"{name} softmax", "attention.softmax", softmax, read=matrix, written=matrix)
    yield Operation(f"{name} mixing", "attention.mixing", scores, read=matrix + keys, written=vectors, cache_read=held)


def _keys(
    found: Skeleton, part: Attention, one: Pass, number: float, caches: list[float], tokens: int, window: int,
    width: float,
) -> tuple[float, float]:  # fmt: skip
    """Bytes of all keys that are activations, and of those in the cache; values take as many."""
    if part.cross or len(caches) <= part.block:
        return width * tokens * one.batch * number, 0.0
    seen = window if one.stage == "decode" else tokens
    layer = found.costs.cache[part.block]
    if one.widths.cache is None and one.widths.activations is None:
        held = (layer.held(seen) - layer.fixed) if one.stage == "decode" else seen * layer.bytes
        return 0.0, held * one.batch / 2
    return 0.0, caches[part.block] * seen * one.batch * _place(found, one) / 2


def _place(found: Skeleton, one: Pass) -> float:
    """Bytes of a number in the cache."""
    return (one.widths.cache or one.widths.activations or found.bits) / 8
