"""Statistics of a model on calibration data, and the walk that fits it block by block.

Shape letters: M out features, N in features, B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pennyweight.calibrate.gradient import Backward, Inputs, Labels
from pennyweight.calibrate.passage import ACTIVATION_BYTES, Passage, Settled, Stage
from pennyweight.calibrate.shadow import Memory, Shadow, compute_dtype, hollow
from pennyweight.errors import DataError, OptionError
from pennyweight.lever import STATISTICS
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Anatomy, Map
from pennyweight.model.model import Model
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight

Windows = Tensor | Mapping[str, Tensor]
Solve = Callable[[Map, Weight, Statistics], Weight | None]
SolveGroup = Callable[[Sequence[Map], Sequence[Weight], Sequence[Statistics]], Sequence[Weight | None]]
Report = Callable[[str, int, int], None]


def collect(
    model: Model,
    windows: Windows,
    *,
    needs: Collection[str] = frozenset({"second_moment"}),
    gradient_tokens: int = 4096,
    labels: Labels = "true",
    loss: Callable[[Any, Inputs], Tensor] | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> dict[str, Statistics]:
    """Statistics of every layer of the unmodified model, by map name; fused layers have entries for their parts, too.

    Layers that read the same input share one second moment, the same tensor. A layer that no input reached (an expert
    nobody was sent to) has a count of 0 and unit moments. Maps that are no layer of their own (stacked experts) have no
    entry; see `pennyweight.model.experts`. A block that the model runs several times is looked at in its first run.

    ``gradient`` is the mean squared gradient of the summed loss in nats by an output. Of a head over a vocabulary it is
    the mean of p (1 - p), its expectation over the model's own labels. Models without class scores have no loss: there
    the output is taken as the mean of a Gaussian of unit variance.

    A table (embedding) is a map from rows to features: of it ``gradient`` (M,) is the share of look-ups that went to
    each row, and ``second_moment`` (N, N), present when gradients are asked for, is the mean of ``g g^T`` over the
    gradients g by what was looked up; a change D of the table costs ``0.5 sum_i gradient_i D_i second_moment D_i^T``.

    Args:
        model: not changed.
        windows: (B, T) token ids, (B, ...) pixels, or inputs by name; tokens with ``attention_mask`` 0 are left out.
        needs: out of "second_moment", "absolute", "gradient".
        gradient_tokens: the first windows that hold this many tokens are run backward.
        labels: of causal language models: the next tokens, or "sampled" from the model. Others are always sampled.
        loss: what to differentiate instead: the summed loss, from the model's output and its inputs.
        batch: windows a block is run on at a time; None for as many as fit in a GiB.
        dtype: to compute in; None for bfloat16 where the processor has it, float32 elsewhere, float64 for such models.
        seed: of samples.
        report: called with (stage, done, total).

    Raises:
        OptionError: an unknown statistic.
        DataError: no windows, inputs the model does not take, or NaN on the way.
    """
    needs = checked(needs)
    inputs = inputs_of(model, windows)
    layers = [found for found in model.anatomy.whole if found.replaceable]
    found: dict[str, Statistics] = {}
    factors: dict[str, Statistics] = {}
    if "gradient" in needs:  # first: the backward takes most memory, and second moments are not there yet
        factors = _factors(model, layers, _first(inputs, gradient_tokens), labels, loss, dtype, seed)
        if report is not None:
            report("gradient", 1, 1)
    if needs - {"gradient"}:

        def keep(maps: Sequence[Map], statistics: Sequence[Statistics]) -> list[None]:
            found.update({m.name: s for m, s in zip(maps, statistics, strict=True)})
            return [None] * len(maps)

        passage = Passage(
            _shadow(model, dtype), stages_of(model.anatomy, layers), keep,
            needs=needs - {"gradient"}, sequential=False, batch=batch, report=report,
        )  # fmt: skip
        passage.run(cast(inputs, passage.shadow.dtype))
    if "gradient" in needs:
        found = {layer.name: _merged(layer, found.get(layer.name), factors.get(layer.name)) for layer in layers}
    for layer in layers:
        twins = [found[m.name] for m in layers if m.tied_to == layer.name and m.kind == layer.kind == "embedding"]
        if twins:  # one table that several layers look up, as the two sides of an encoder-decoder do
            found[layer.name] = _pooled([found[layer.name], *twins])
    return _with_parts(model.anatomy, {layer.name: found[layer.name] for layer in layers})


def walk(
    model: Model,
    windows: Windows | None,
    solve: Solve | None = None,
    *,
    solve_group: SolveGroup | None = None,
    needs: Collection[str] = frozenset({"second_moment"}),
    sequential: bool = True,
    only: Collection[str] | None = None,
    known: Mapping[str, Statistics] | None = None,
    done: Mapping[str, Mapping[str, Weight]] | None = None,
    finished: Callable[[Settled], None] | None = None,
    batch: int | None = None,
    activation_bytes: int = ACTIVATION_BYTES,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
) -> dict[str, Weight]:
    """Fit a model block by block; at the end, and only then, its layers are replaced by what was solved.

    Layers are met in the order the model runs them: the embedding first (with what `collect` says of tables; a tied
    head is not met again), the blocks, what follows them. Where a block's activations fit in ``activation_bytes``, each
    layer sees the outputs of all layers fitted before it, and the walk costs one forward. Where they do not, the layers
    of a block are all solved as they were met in the block before its fitting, and blocks are run twice
    (`Settled.passes`).

    A walk that was stopped goes on, bit-identical, when ``done`` holds what ``finished`` was given.

    Args:
        model: changed at the end.
        windows: as in `collect`; not needed when nothing is.
        solve: from a map, its weight and its statistics the new weight, or None to leave it.
        solve_group: the same for all layers of a block that read one input, at a time; instead of ``solve``.
        needs: statistics to hand over.
        sequential: solve on the outputs of what was fitted before; otherwise on those of the unmodified model.
        only: names of the layers to visit; None for all that can be replaced.
        known: statistics that are there already, as from `collect`; what the walk does not find itself (gradients,
            and all of a table) is taken from there, and looked for first where it is missing.
        done: the weights of finished stages, by stage name; a layer missing in its stage was left alone.
        finished: called after each stage, those in ``done`` among them.
        batch: windows a block is run on at a time.
        activation_bytes: what may be alive in a block at a time, where ``batch`` is not given.
        dtype: to compute in, as in `collect`.
        report: called with (stage, done, total).

    Returns:
        The new weights by map name.

    Raises:
        OptionError: an unknown statistic or layer, or both or neither way to solve.
        DataError: as `collect`.
    """
    needs = checked(needs)
    layers = chosen(model.anatomy, only)
    inputs = inputs_of(model, windows) if windows is not None else ()
    if windows is None and needs:
        raise DataError(f"walk: {', '.join(sorted(needs))} cannot be found without calibration windows; give some")
    known = dict(known or {})
    if "gradient" in needs and any(lacks_gradient(layer, known) for layer in layers):
        assert windows is not None
        known = collect(model, windows, needs={"gradient"}, dtype=dtype, report=report) | {
            name: statistics for name, statistics in known.items() if statistics.gradient is not None
        }
    shadow = _shadow(model, dtype)
    passage = Passage(
        shadow, stages_of(model.anatomy, layers), settle_with(shadow, solve, solve_group, known),
        needs=needs - {"gradient"}, sequential=sequential, done=done, finished=finished,
        batch=batch, activation_bytes=activation_bytes, report=report,
    )  # fmt: skip
    passage.run(cast(inputs, shadow.dtype))
    settled = passage.weights()
    weights = {layer.name: settled[layer.name] for layer in layers if layer.name in settled}
    anatomy.replace_all(model.module, {layer.path: weights[layer.name] for layer in layers if layer.name in weights})
    return weights


def settle_with(
    shadow: Shadow, solve: Solve | None, solve_group: SolveGroup | None, known: Mapping[str, Statistics]
) -> Callable[[Sequence[Map], Sequence[Statistics]], Sequence[Weight | None]]:
    """What a passage calls: fetches weights, adds what is known already, and solves.

    Raises:
        OptionError: both or neither way to solve.
    """
    if (solve is None) == (solve_group is None):
        raise OptionError("walk: give either solve or solve_group")

    def settle(maps: Sequence[Map], found: Sequence[Statistics]) -> Sequence[Weight | None]:
        weights = [shadow.source.weight(m) for m in maps]
        whole = [_completed(m, s, known.get(m.name)) for m, s in zip(maps, found, strict=True)]
        if solve_group is not None:
            return solve_group(maps, weights, whole)
        assert solve is not None
        return [solve(m, w, s) for m, w, s in zip(maps, weights, whole, strict=True)]

    return settle


def stages_of(found: Anatomy, layers: Sequence[Map]) -> list[Stage]:
    """Every block, and every one of ``layers`` outside of blocks, in the order of the model."""
    stages: dict[str, Stage] = {}
    for block in found.blocks:
        inside = tuple(layer for layer in layers if layer.block == block.index)
        stages[block.path] = Stage(block.path, inside, features=max(1, sum(sum(m.shape) for m in block.maps)))
    tables = [m for m in found.whole if m.kind == "embedding" and m.tied_to is not None and m not in layers]
    outside = [
        Stage(layer.name, (layer,), twins=tuple(table.path for table in tables if table.tied_to == layer.name))
        for layer in layers
        if layer.block is None
    ]
    return [*outside, *stages.values()]


def chosen(found: Anatomy, only: Collection[str] | None) -> list[Map]:
    """The layers to visit.

    Raises:
        OptionError: a name that is no replaceable layer.
    """
    layers = found.layers()
    if only is None:
        return list(layers)
    unknown = sorted(set(only) - {layer.name for layer in layers})
    if unknown:
        raise OptionError(f"walk: {unknown[0]!r} is none of the {len(layers)} layers that can be replaced")
    return [layer for layer in layers if layer.name in set(only)]


def inputs_of(model: Model, windows: Windows) -> Inputs:
    """What the model is called with.

    Raises:
        DataError: none, or inputs it does not take.
    """
    tensors = list(windows.values()) if isinstance(windows, Mapping) else [windows]
    if not tensors or any(len(tensor) == 0 or len(tensor) != len(tensors[0]) for tensor in tensors):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise DataError(
            f"{model.name}: calibration windows {shapes or 'of nothing'}; give at least one, equally many of each"
        )
    device = next(iter(model.module.parameters()), tensors[0]).device
    device = tensors[0].device if device.type == "meta" else device
    if isinstance(windows, Mapping):
        return {name: tensor.to(device) for name, tensor in windows.items()}
    if model.kind == "seq2seq":
        raise DataError(
            f"{model.name}: an encoder-decoder needs two texts; give input_ids and decoder_input_ids by name"
        )
    if isinstance(model.module, PreTrainedModel):
        return {model.module.main_input_name: windows.to(device)}
    return (windows.to(device),)


def checked(needs: Collection[str]) -> frozenset[str]:
    """``needs``, or an OptionError when one of them is unknown."""
    unknown = sorted(set(needs) - STATISTICS)
    if unknown:
        raise OptionError(f"calibrate: unknown statistic {unknown[0]!r}; there are {', '.join(sorted(STATISTICS))}")
    return frozenset(needs)


def _factors(
    model: Model,
    layers: Sequence[Map],
    inputs: Inputs,
    labels: Labels,
    loss: Callable[[Any, Inputs], Tensor] | None,
    dtype: torch.dtype | None,
    seed: int,
) -> dict[str, Statistics]:
    """What a backward over ``inputs`` finds, by map name."""
    shadow = _shadow(model, dtype)
    shadow.fill(shadow.names())
    backward = Backward(shadow, layers, head=model.anatomy.head, kind=model.kind, labels=labels, loss=loss, seed=seed)
    return backward.run(cast(inputs, shadow.dtype))


def _shadow(model: Model, dtype: torch.dtype | None) -> Shadow:
    return Shadow(hollow(model.module), Memory(model.module), dtype or compute_dtype(model.module))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """``inputs`` with numbers, but not token ids, in ``dtype``."""
    if isinstance(inputs, Mapping):
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)


def _first(inputs: Inputs, tokens: int) -> Inputs:
    """The first windows that hold ``tokens`` tokens; images count as one each."""
    tensors = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
    each = 1 if tensors[0].is_floating_point() else tensors[0][0].numel()
    count = max(1, -(-tokens // each))
    if isinstance(inputs, Mapping):
        return {name: tensor[:count] for name, tensor in inputs.items()}
    return tuple(tensor[:count] for tensor in inputs)


def lacks_gradient(layer: Map, known: Mapping[str, Statistics]) -> bool:
    """Whether a backward has to find the gradient of ``layer``."""
    return layer.kind != "embedding" and (layer.name not in known or known[layer.name].gradient is None)


def _completed(layer: Map, found: Statistics, known: Statistics | None) -> Statistics:
    """What the walk found, with what it cannot find itself."""
    if known is None:
        return found
    only_known = layer.kind == "embedding" or (found.second_moment is None and found.absolute_max is None)
    return known if only_known else changed(found, gradient=known.gradient)


def _merged(layer: Map, moments: Statistics | None, factors: Statistics | None) -> Statistics:
    """What the forward and the backward found of one layer."""
    if layer.kind == "embedding":
        if moments is None or factors is None:
            return moments or factors or Statistics()
        return changed(moments, second_moment=factors.second_moment)
    if factors is None or factors.gradient is None:  # not reached, or without influence on the loss
        return changed(moments or Statistics(), gradient=torch.zeros(layer.shape[0]))
    return factors if moments is None else changed(moments, gradient=factors.gradient)


def _pooled(tables: Sequence[Statistics]) -> Statistics:
    """Of all look-ups of one table, from those of each layer that holds it."""
    used = [table for table in tables if table.count]
    total = sum(table.count for table in used)

    def mean(values: Sequence[Tensor | None]) -> Tensor | None:
        kept = [v * (t.count / total) for v, t in zip(values, used, strict=True) if v is not None]
        return sum(kept[1:], start=kept[0]) if len(kept) == len(used) and kept else None

    return Statistics(total, mean([t.second_moment for t in used]), gradient=mean([t.gradient for t in used]))


def _with_parts(found: Anatomy, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
    """``statistics`` of layers, and of the maps that lie in one."""
    by_path = {layer.path: statistics[layer.name] for layer in found.whole if layer.name in statistics}
    for part in found.maps():
        if part.rows is not None and part.path in by_path:
            whole = by_path[part.path]
            gradient = whole.gradient
            statistics[part.name] = changed(whole, gradient=None if gradient is None else gradient[slice(*part.rows)])
    return statistics
