"""What a model costs: parameters, bytes, FLOPs, cache and activations, layer by layer.

Sizes are exact and read off the structure. FLOPs count matrix products, a multiply-add as two, as every paper does;
norms, activations, look-ups and softmax are left out (1 to 3 % of a transformer). Attention stands apart, because it
grows with the context.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from pennyweight.measure import probe
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Anatomy, Map
from pennyweight.model.kv_cache import Kept, KVSetting, kept_setting
from pennyweight.model.model import Model, bf16_bytes, parameters
from pennyweight.weights import Activation, Cost, Weight, stored_bytes


@dataclass(frozen=True)
class LayerCost:
    """One layer of the table.

    Attributes:
        name: as the anatomy calls it.
        role: as the anatomy calls it.
        form: of its weight ("dense", "quantized", ...).
        shape: (M, N).
        params: stored numbers, its bias with them; 0 for a layer tied to an earlier one.
        bytes: stored bytes, likewise.
        rows: input rows for one unit (a token, an image); None where the model was not run.
        flops: of those rows; None where the model was not run.
        once: whether it runs once a sequence, however long; its rows and FLOPs are then those of a sequence.
        bytes_read: of its stored bytes for one unit alone, tied or not: a table its rows, a stack its chosen experts.
    """

    name: str
    role: str
    form: str
    shape: tuple[int, int]
    params: int
    bytes: int
    rows: float | None
    flops: float | None
    once: bool
    bytes_read: float | None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each entry of the matrix, bias and all."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Attention:
    """The products of queries with keys and of scores with values in one block.

    Attributes:
        block: its index in the anatomy.
        flops: for one unit's queries against one key position.
        window: positions a query sees at most; None for all of them.
        cross: whether the keys are those of the other stream.
    """

    block: int
    flops: float
    window: int | None
    cross: bool


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps between tokens.

    Attributes:
        bytes: a token.
        window: tokens kept at most; None for all of them.
        fixed: bytes whatever the context (a recurrent or convolution state).
        packed: how it is held where the model keeps a packed cache (`pennyweight.model.kv_cache`); ``bytes`` are then
            those of one more token in the long run.
    """

    bytes: int
    window: int | None
    fixed: int
    packed: Kept | None = None

    def held(self, context: int) -> int:
        """Bytes after ``context`` tokens."""
        if self.packed is not None:
            return self.fixed + self.packed.bytes_at(context)
        return self.fixed + self.bytes * (context if self.window is None else min(context, self.window))


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes:
        unit: what FLOPs are counted for: "token", "token pair" (one in, one out), "image 224x224", "sample".
        params: stored numbers outside token and position tables and the head.
        params_total: all stored numbers; a tied tensor once.
        params_dense: what the same maps would count as plain matrices, in total.
        bytes: of all stored tensors, a tied one once: what a saved file holds but for headers and ``weights.json``.
        bytes_read_per_token: of all stored tensors for one unit alone, what decoding reads for each token; None where
            the model was not run.
        bytes_bf16: the reference size, 2 bytes for each of ``params_dense``.
        flops_per_token: of the layers for one ``unit``, without attention; None where the model was not run.
        flops_per_sequence: of the layers that run once a sequence (a pooler).
        activation_bytes_per_token: an estimate: the largest input and output of one layer together.
        attention: block by block.
        cache: layer by layer; empty for a model that keeps none.
        layers: the table.
        uncounted: what no FLOPs are counted for: parameters of two or more dimensions that are no map known, and layers
            that did not run.
    """

    unit: str
    params: int
    params_total: int
    params_dense: int
    bytes: int
    bytes_read_per_token: float | None
    bytes_bf16: int
    flops_per_token: float | None
    flops_per_sequence: float | None
    activation_bytes_per_token: float | None
    attention: tuple[Attention, ...]
    cache: tuple[CacheLayer, ...]
    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one more token takes, before any window is full."""
        return sum(layer.bytes for layer in self.cache)

    def kv_bytes(self, context: int) -> int:
        """Bytes of cache after ``context`` tokens."""
        return sum(layer.held(context) for layer in self.cache)

    def attention_flops(self, context: int) -> float:
        """FLOPs of attention for one unit whose queries see ``context`` positions, its own among them."""
        return sum(
            part.flops * (context if part.window is None else min(context, part.window)) for part in self.attention
        )


def cost(model: Model | nn.Module, *, inputs: probe.Inputs | None = None) -> ModelCost:
    """The cost of ``model``, dense or compact.

    Args:
        model: a `Model` or any module. It is run once, on eight tokens or one image.
        inputs: what to run it on instead: a tensor, a tuple of arguments, or arguments by name. A plain module does not
            say what it takes; without inputs its FLOPs are None.

    Raises:
        ModelError: it does not run on ``inputs``, or on what it says it takes.
    """
    module = model.module if isinstance(model, Model) else model
    found = anatomy.of(module)
    sample = probe.sample_for(module, found) if inputs is None else probe.given(inputs)
    seen = probe.watch(module, found, sample) if sample else None
    layers = tuple(_layer(module, layer, sample, seen) for layer in found.whole)
    total = _stored_numbers(module, set())
    stored = stored_bytes(module)
    tables = [map_.kind == "embedding" or map_ == found.head for map_ in found.whole]
    return ModelCost(
        unit=sample.unit if sample else "sample",
        params=total - sum(layer.params for layer, table in zip(layers, tables, strict=True) if table),
        params_total=total,
        params_dense=parameters(module),
        bytes=stored,
        bytes_read_per_token=_bytes_read(layers, stored) if seen else None,
        bytes_bf16=bf16_bytes(module),
        flops_per_token=sum(layer.flops or 0 for layer in layers if not layer.once) if seen else None,
        flops_per_sequence=sum(layer.flops or 0 for layer in layers if layer.once) if seen else None,
        activation_bytes_per_token=_exact(Fraction(seen.widest, sample.count)) if seen and sample else None,
        attention=tuple(_attention(module, found, sample, seen)) if seen and sample else (),
        cache=tuple(_cache_layers(seen.cache, kept_setting(module))) if seen and sample else (),
        layers=layers,
        uncounted=tuple(_uncounted(found, layers)),
    )


def _uncounted(found: Anatomy, layers: Sequence[LayerCost]) -> Iterator[str]:
    maps = {layer.name for layer in layers}
    yield from (name for name in found.unknown if name not in maps)
    for layer in layers:
        # tables are looked up, and an expert may just not have been chosen
        if layer.rows == 0 and not layer.role.startswith("moe.experts") and not layer.role.endswith("embedding"):
            yield layer.name


def _layer(module: nn.Module, found: Map, sample: probe.Sample | None, seen: probe.Seen | None) -> LayerCost:
    layer = module.get_submodule(found.path)
    held, bias = getattr(layer, found.parameter), getattr(layer, "bias", None)
    own = bias if isinstance(bias, Tensor) and found.parameter == "weight" else None
    params, stored = (own.numel(), own.nbytes) if own is not None else (0, 0)
    if isinstance(rounding := getattr(layer, "activation", None), Activation):
        params, stored = params + _numbers(rounding), stored + stored_bytes(rounding)
    count = found.shape[0] * found.shape[1]
    costs = held.cost() if isinstance(held, Weight) else Cost(count, count * held.element_size(), 2 * count)
    if found.tied_to is None:
        params, stored = params + costs.params, stored + costs.bytes
    rows = _rows(module, found, sample, seen)
    # poolers see one of eight tokens; so may an expert, by the choice of its router
    once = rows is not None and sample is not None and sample.count > 1 and rows * sample.count == 1
    once = once and not found.role.startswith("moe.experts")
    rows = Fraction(1) if once else rows
    return LayerCost(
        name=found.name,
        role=found.role,
        form=held.form if isinstance(held, Weight) else "dense",
        shape=found.shape,
        params=params,
        bytes=stored,
        rows=None if rows is None else _exact(rows),
        flops=None if rows is None else _exact(rows * (0 if found.kind == "embedding" else costs.flops)),
        once=once,
        bytes_read=None if rows is None else _exact(_read(found, rows, costs.bytes)),
    )


def _read(found: Map, rows: Fraction, stored: int) -> Fraction:
    return min(Fraction(1), rows / found.shape[0] if found.kind == "embedding" else rows) * stored


def _bytes_read(layers: Sequence[LayerCost], stored: int) -> float:
    """That of the layers, and all that lies outside them."""
    return sum(layer.bytes_read or 0 for layer in layers) + stored - sum(layer.bytes for layer in layers)


def _rows(module: nn.Module, found: Map, sample: probe.Sample | None, seen: probe.Seen | None) -> Fraction | None:
    """Input rows of ``found`` for one unit; each expert of a stack is taken to get its even share."""
    if sample is None or seen is None:
        return None
    rows = Fraction(seen.rows.get(probe.called(module, found), 0), sample.count)
    if found.kind != "expert-stack":
        return rows
    stack: Tensor = getattr(module.get_submodule(found.path), found.parameter)
    return rows / stack.shape[0]


def _exact(number: Fraction) -> float:
    return int(number) if number.denominator == 1 else float(number)


def _stored_numbers(module: nn.Module, seen: set[int]) -> int:
    """Numbers kept in parameters and compact weights, shared ones once."""
    if id(module) in seen:
        return 0
    seen.add(id(module))
    if isinstance(module, Weight):
        held = {id(tensor): tensor.numel() for tensor in module.parameters()}
        again = sum(count for key, count in held.items() if key in seen)  # a store that several weights share
        seen.update(held)
        return module.cost().params - again
    if isinstance(module, Activation):
        return _numbers(module)
    own = [tensor for tensor in module.parameters(recurse=False) if id(tensor) not in seen]
    seen.update(map(id, own))
    return sum(tensor.numel() for tensor in own) + sum(_stored_numbers(child, seen) for child in module.children())


def _numbers(activation: Activation) -> int:
    return sum(tensor.numel() for tensor in activation.state_dict().values())


def _attention(module: nn.Module, found: Anatomy, sample: probe.Sample, seen: probe.Seen) -> Iterator[Attention]:
    """Twice the width of all queries and twice that of all values, for each key."""
    windows = [_window(layer) for layer in _layers_of(seen.cache)]
    for block in found.blocks:
        for kind in ("attention", "cross_attention"):
            parts = {
                part.role.removeprefix(f"{kind}."): part for part in block.maps if part.role.startswith(f"{kind}.")
            }
            query = parts.get("query_up") or parts.get("query") or parts.get("qkv")
            output = parts.get("output")
            if query is None or output is None:
                continue
            values = output.shape[1]
            queries = values if query.role.endswith("qkv") else query.shape[0]  # fused heads are equally wide
            rows = Fraction(seen.rows.get(probe.called(module, query), 0), sample.count)
            window = windows[block.index] if len(windows) == len(found.blocks) and kind == "attention" else None
            yield Attention(block.index, _exact(rows * 2 * (queries + values)), window, kind == "cross_attention")


def _layers_of(cache: Any) -> Sequence[Any]:
    """The layers of a cache of ``transformers``; of an encoder-decoder's the decoder's own."""
    layers: Sequence[Any] = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    return layers


def _window(layer: Any) -> int | None:
    found = getattr(layer, "sliding_window", None)
    return found if isinstance(found, int) else None


def _cache_layers(cache: Any, setting: KVSetting | None) -> Iterator[CacheLayer]:
    for layer in _layers_of(cache):
        kept = [tensor for name in ("keys", "values") if isinstance(tensor := getattr(layer, name, None), Tensor)]
        length = kept[0].shape[-2] if kept and kept[0].ndim > 1 else 0
        window = _window(layer)
        states = [*_tensors(getattr(layer, "conv_states", {})), *_tensors(getattr(layer, "recurrent_states", {}))]
        if setting is not None and length and type(layer) is DynamicLayer:
            heads = kept[0].shape[0] * kept[0].shape[1]
            packed = Kept(setting, heads, kept[0].shape[-1], kept[1].shape[-1], kept[0].element_size())
            yield CacheLayer(packed.per_token, None, 0, packed)
            continue
        yield CacheLayer(
            bytes=sum(tensor.nbytes for tensor in kept) // length if length else 0,
            # the newest token's keys replace the oldest's: a window of W keeps W - 1 between tokens
            window=None if window is None else window - 1,
            fixed=sum(tensor.nbytes for tensor in states),
        )


def _tensors(states: Any) -> Iterator[Tensor]:
    values = states.values() if isinstance(states, dict) else (states,)
    return (value for value in values if isinstance(value, Tensor))
