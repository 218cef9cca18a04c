"""One forward of a whole model over all calibration windows, its layers met on the way.

The model's own code runs, once, on all windows at a time. A block is filled when it is entered and emptied when it is
left. Where its activations fit in memory, it is run once: the first layer that reads an input finds its moments, all
layers that read the same input are settled, and the forward goes on with the settled weights, so that every layer sees
the outputs of all layers settled before it. Where they do not fit, the block is run twice on a few windows at a time:
once to look, with the layers of this block as they were, and once to go on.

Shape letters: B windows, T tokens, N in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.calibrate.moments import Lookups, Moments, rows_in
from pennyweight.calibrate.shadow import Shadow
from pennyweight.errors import ModelError
from pennyweight.model.anatomy import Map
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight

#: What may be alive in a block at a time before it is run a few windows at a time.
ACTIVATION_BYTES = 1 << 30


@dataclass(frozen=True)
class Stage:
    """What is settled together: a block, or layers outside of blocks that read the same input.

    Attributes:
        name: the block's path, or the input group.
        layers: its layers, in order; at least one, unless it is a block that is only passed through.
        features: of a block, how many features all of its layers read and write for a token; 0 outside of blocks.
        twins: outside of blocks, paths of further layers that hold the same table.
    """

    name: str
    layers: tuple[Map, ...]
    features: int = 0
    twins: tuple[str, ...] = ()

    @property
    def is_block(self) -> bool:
        """Whether ``name`` is the path of a block."""
        return self.features > 0


@dataclass(frozen=True)
class Settled:
    """A stage that is done.

    Attributes:
        name: of the stage.
        weights: by map name, what was put in; layers left alone are missing.
        passes: 1 where every layer saw the outputs of all layers settled before it, also of those in its own block; 2
            where the block had to be looked at first, all of its layers as they were.
    """

    name: str
    weights: Mapping[str, Weight]
    passes: int = 1


Settle = Callable[[Sequence[Map], Sequence[Statistics]], Sequence[Weight | None]]


class _Finished(Exception):
    """Raised inside the forward when nothing is left to settle."""


@dataclass
class _Turn:
    """A stage under way."""

    stage: Stage
    moments: dict[str, Moments | Lookups] = field(default_factory=dict)
    seen: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # by input group: who read it first, and what
    settled: set[str] = field(default_factory=set)
    weights: dict[str, Weight] = field(default_factory=dict)
    looking: bool = True
    at_once: bool = True  # settle a group when it is met, not when the stage ends


class Passage:
    """A forward over all windows that settles stages on its way.

    Args:
        shadow: of the model; used up by `run`.
        stages: what to settle; every block of the model must be among them.
        settle: finds the weights of layers with one input, None for a layer to leave alone.
        needs: moments to find, out of "second_moment" and "absolute".
        sequential: go on with the settled weights; otherwise with the model's own.
        done: stages settled by an earlier run; their weights are put in and nothing is looked at.
        finished: called after each stage, those in ``done`` among them.
        batch: windows a block is run on at a time; None for as many as ``activation_bytes`` allow.
        activation_bytes: what may be alive in a block.
        keep: hold on to the weights of finished blocks; a model that runs a block twice needs them.
        report: called with ("calibrate", stages done, stages).
    """

    def __init__(
        self,
        shadow: Shadow,
        stages: Sequence[Stage],
        settle: Settle,
        *,
        needs: Iterable[str],
        sequential: bool = True,
        done: Mapping[str, Mapping[str, Weight]] | None = None,
        finished: Callable[[Settled], None] | None = None,
        batch: int | None = None,
        activation_bytes: int = ACTIVATION_BYTES,
        keep: bool = True,
        report: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.shadow, self.stages, self.settle = shadow, stages, settle
        self.needs, self.sequential = frozenset(needs), sequential
        self.done, self.finished, self.report = done or {}, finished, report
        self.batch, self.activation_bytes, self.keep = batch, activation_bytes, keep
        self.ambient_grad = torch.is_grad_enabled()
        self.pending = [stage.name for stage in stages if stage.layers]
        self.count = len(self.pending)
        self.turns = {stage.name: _Turn(stage) for stage in stages}
        self.mask: Tensor | None = None
        self.windows, self.running = 0, False

    # -- the forward -------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Tensor] | tuple[Tensor, ...]) -> None:
        """Run the model on ``inputs``, all windows at once, until every stage is settled."""
        with torch.no_grad():
            if self.needs and any(name not in self.done for name in self.pending):
                tensors = inputs.values() if isinstance(inputs, Mapping) else inputs
                self.windows = len(next(iter(tensors)))
                self.mask = attention_mask(inputs)
                self._prepare()
                self.running = True
                with suppress(_Finished):
                    self.shadow.module(**inputs) if isinstance(inputs, Mapping) else self.shadow.module(*inputs)
                self.running = False
            for name in list(self.pending):  # never reached: what the model does not use on such inputs
                self._settle_rest(self.turns[name])
                self._finish(self.turns[name], passes=1)

    def weights(self) -> dict[str, Weight]:
        """What was settled, by map name, in order."""
        return {name: weight for turn in self.turns.values() for name, weight in turn.weights.items()}

    def _prepare(self) -> None:
        module, names = self.shadow.module, self.shadow.names()
        inside = tuple(f"{stage.name}." for stage in self.stages if stage.is_block)
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        at = tuple(f"{path}." for path, layer in module.named_modules() if head is not None and layer is head)
        # the head may be large, and a forward that ends before it never needs it
        late = [name for name in names if at and name.startswith(at)]
        self.shadow.fill(name for name in names if not name.startswith(inside) and name not in late)
        if head is not None:
            head.register_forward_pre_hook(lambda layer, args: self.shadow.fill(late))
        for stage in self.stages:
            turn = self.turns[stage.name]
            if stage.is_block:
                self._wrap(module.get_submodule(stage.name), turn)
            for found in stage.layers:
                hook = self._meet(turn, found)
                for path in (found.path, *stage.twins):
                    module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    def _fill(self, stage: Stage, names: Iterable[str]) -> None:
        """Fill a stage; with what was settled, when it was."""
        self.shadow.fill(names)
        weights = self.done.get(stage.name, self.turns[stage.name].weights) if self.sequential else {}
        for found in stage.layers:
            if found.name in weights:
                self.shadow.put(found, weights[found.name])

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _wrap(self, block: nn.Module, turn: _Turn) -> None:
        own, stage = block.forward, turn.stage
        names = [name for name in self.shadow.names() if name.startswith(f"{stage.name}.")]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if stage.layers and stage.name not in self.pending and not self.keep:
                raise ModelError(f"{stage.name}: the model runs this block more than once; walk over it in memory")
            self._fill(stage, names)
            parts = list(_parts((args, kwargs), self.windows, self._windows_at_once(stage, (args, kwargs))))
            first = stage.name in self.pending
            turn.looking = first and stage.name not in self.done and bool(self.needs)
            turn.at_once = self.sequential and len(parts) == 1
            passes = 1
            if turn.looking and self.sequential and len(parts) > 1:
                for _ in self._each(own, turn, parts):
                    pass
                self._settle_rest(turn)
                turn.looking, passes = False, 2
            outs = list(self._each(own, turn, parts))
            turn.looking = False
            if first:
                self._settle_rest(turn)
            self.shadow.empty(names)
            if first:
                self._finish(turn, passes)
            return joined(outs, [size for _, size in parts])

        block.forward = forward

    def _each(self, own: Callable[..., Any], turn: _Turn, parts: Sequence[tuple[Any, int]]) -> Iterator[Any]:
        whole, at = self.mask, 0
        for (args, kwargs), size in parts:
            self.mask = whole if whole is None else whole[at : at + size]
            yield own(*args, **kwargs)
            turn.seen.clear()
            at += size
        self.mask = whole

    def _windows_at_once(self, stage: Stage, given: Any) -> int:
        if self.batch is not None:
            return self.batch
        x = next(_batched_in(given, self.windows), None)
        if x is None:
            return self.windows
        width = x.shape[1] if x.ndim == 4 else x.shape[-1]
        # inputs and outputs of all layers alive at once: more than there are, which leaves room for what lies between
        each = x[0].numel() * x.element_size() * stage.features // width
        return max(1, min(self.windows, self.activation_bytes // max(each, 1)))

    # -- layers ------------------------------------------------------------------------------------------------------

    def _meet(self, turn: _Turn, found: Map) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stage = turn.stage
            x = args[0] if args else next(iter(kwargs.values()))
            if stage.is_block:
                if turn.looking and found.name not in turn.settled:
                    self._look(turn, found, layer, x)
            elif stage.name in self.pending:
                if stage.name in self.done:
                    if self.sequential and found.name in self.done[stage.name]:
                        self.shadow.put(found, self.done[stage.name][found.name])
                else:
                    self._look(turn, found, layer, x)
                self._settle_rest(turn)
                self._finish(turn, passes=1)

        return hook

    def _look(self, turn: _Turn, found: Map, layer: nn.Module, x: Tensor) -> None:
        group = found.input_group
        first, same = turn.seen.get(group, (found.name, x))
        if first != found.name:
            if not _equal(same, x):
                raise ModelError(
                    f"{found.path}: does not read what {first} reads, as its anatomy says; please report it"
                )
            return
        turn.seen[group] = (found.name, x)
        if group not in turn.moments:
            turn.moments[group] = self._moments(found, x.device)
        for rows in rows_in(found, layer, x, self.mask):
            turn.moments[group].add(rows)
        if turn.at_once:
            self._settle_group(turn, group)

    def _moments(self, found: Map, device: torch.device) -> Moments | Lookups:
        if found.kind == "embedding":
            return Lookups(found.shape[0], device)
        return Moments(found.shape[1], self.needs, device)

    def _settle_group(self, turn: _Turn, group: str) -> None:
        layers = [found for found in turn.stage.layers if found.input_group == group and found.name not in turn.settled]
        moments = turn.moments.pop(group, None)
        if moments is None:
            moments = self._moments(layers[0], torch.device("cpu"))
        shared = moments.statistics(layers[0].path)
        with torch.set_grad_enabled(self.ambient_grad):
            weights = self.settle(layers, [shared] * len(layers))
        for found, weight in zip(layers, weights, strict=True):
            turn.settled.add(found.name)
            if weight is not None:
                turn.weights[found.name] = weight
                if self.sequential and self.running:
                    self.shadow.put(found, weight)

    def _settle_rest(self, turn: _Turn) -> None:
        """Settle what is left of a stage: all of it after a first look, and layers that no input reached."""
        if turn.stage.name in self.done:
            turn.weights = dict(self.done[turn.stage.name])
            return
        for group in dict.fromkeys(found.input_group for found in turn.stage.layers if found.name not in turn.settled):
            self._settle_group(turn, group)

    def _finish(self, turn: _Turn, passes: int) -> None:
        turn.moments.clear()
        turn.seen.clear()
        if turn.stage.name not in self.pending:
            return
        self.pending.remove(turn.stage.name)
        if self.finished is not None:
            self.finished(Settled(turn.stage.name, turn.weights, passes))
        if turn.stage.is_block and not self.keep:
            turn.weights = {}
        if self.report is not None:
            self.report("calibrate", self.count - len(self.pending), self.count)
        if self.running and not self.pending:
            raise _Finished


def attention_mask(inputs: Mapping[str, Tensor] | tuple[Tensor, ...]) -> Tensor | None:
    """(B, T), true where a token counts; None when all do."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return None if mask is None or mask.ndim != 2 or bool(mask.bool().all()) else mask.bool()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two inputs hold the same rows: the same memory mostly, so that nothing need be read."""
    if a.shape[-1] != b.shape[-1] or a.numel() != b.numel():
        return False
    if a.data_ptr() == b.data_ptr() and a.is_contiguous() and b.is_contiguous():
        return True
    return torch.equal(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))


# -- taking calls apart by windows -----------------------------------------------------------------------------------


def _is_batched(value: Any, windows: int) -> bool:
    # positions and masks that all windows share have a first dimension of 1 or only one dimension
    return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == windows


def _batched_in(value: Any, windows: int) -> Iterator[Tensor]:
    if _is_batched(value, windows):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _batched_in(inner, windows)
    elif isinstance(value, dict):
        yield from _batched_in(tuple(value.values()), windows)


def _parts(value: Any, windows: int, size: int) -> Iterator[tuple[Any, int]]:
    """``value``, the arguments of a block, ``size`` windows at a time, each part with its number of windows."""
    if size >= windows:
        yield value, windows
        return
    for start in range(0, windows, size):
        stop = min(start + size, windows)
        yield cut(value, windows, slice(start, stop)), stop - start


def cut(value: Any, windows: int, at: slice | Tensor) -> Any:
    """``value``, the arguments of a block on so many ``windows``, as they are for the windows ``at``."""
    if _is_batched(value, windows):
        return value[at]
    if type(value) in (tuple, list):
        return type(value)(cut(inner, windows, at) for inner in value)
    if type(value) is dict:
        return {key: cut(inner, windows, at) for key, inner in value.items()}
    return value


def joined(outs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What a block gives on all windows, from what it gave on each part."""
    first = outs[0]
    if len(outs) == 1:
        return first
    if isinstance(first, Tensor):
        batched = first.ndim >= 2 and all(len(out) == size for out, size in zip(outs, sizes, strict=True))
        return torch.cat(list(outs)) if batched else first
    if type(first) in (tuple, list):
        return type(first)(joined(each, sizes) for each in zip(*outs, strict=True))
    return first
