"""Which dimensions of a model's tensors belong together, found by running it once.

Every operation of one forward tells something (`rules.py`) of the axes of its tensors (`axes.py`). What is left unbound
at the end, appears in a parameter and is not locked can be shrunk: a `Dimension`. Its kind is read off what was done
with it, not off names: attention runs head by head, a residual stream goes through many blocks, a hidden unit through
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pennyweight.errors import DataError, ModelError
from pennyweight.model import anatomy, compact
from pennyweight.surgery.axes import Axis, find, leaves, lock, mask_of, unit_of
from pennyweight.surgery.rules import RULES, elementwise, unknown

Kind = Literal["ffn", "heads", "queries", "channels", "latent", "hidden"]
#: The n-th operation that ran directly in the module at a path.
Place = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Dimension:
    """Something that a model has ``size`` of, and may have fewer of.

    Attributes:
        kind: "ffn" (hidden units of one block), "heads" (with grouped queries: key heads, each with its queries),
            "queries" (query heads of each key head), "channels" (of convolutions, in one block), "latent" (the same as
            "ffn", but normalized), or "hidden" (of a residual stream).
        size: how many there are.
        block: index of the block that it lies in, None for a stream.
        places: (name of a parameter or buffer, dimension) wherever it appears.
        axis: its leaf.
    """

    kind: Kind
    size: int
    block: int | None
    places: tuple[tuple[str, int], ...]
    axis: Axis

    @property
    def name(self) -> str:
        """The first place that it appears in."""
        return f"{self.kind} of {self.places[0][0]}"


@dataclass(frozen=True)
class Graph:
    """What `trace` found.

    Attributes:
        dimensions: all that can be shrunk, in order of the model.
        axes: of every parameter and buffer, by name; tied ones under each.
        touched: by path of a module, the axes of what its own operations took and gave.
        averages: (dimension, axis) of what operations average over.
        locked: why the rest cannot: by tensor name and dimension.
    """

    dimensions: tuple[Dimension, ...]
    axes: Mapping[str, tuple[Axis, ...]]
    touched: Mapping[str, tuple[Axis, ...]]
    averages: Mapping[Place, tuple[tuple[int, Axis], ...]]
    locked: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def of(self, kind: Kind, block: int | None = None) -> tuple[Dimension, ...]:
        """The dimensions of one kind, all or those in one block."""
        return tuple(d for d in self.dimensions if d.kind == kind and (block is None or d.block == block))

    def unit(self, name: str, dim: int, dimension: Dimension) -> Tensor:
        """For each index of dimension ``dim`` of tensor ``name`` the unit it belongs to, -1 for none."""
        return unit_of(self.axes[name][dim], dimension.axis)

    def kept(self, name: str, dim: int, masks: Mapping[Axis, Tensor]) -> Tensor:
        """Which indices of a tensor's dimension stay, bool."""
        return mask_of(self.axes[name][dim], masks)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by every name that they have."""
    saved = set(module.state_dict(keep_vars=True))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return found | {name: buffer for name, buffer in buffers.items() if name in saved}


@contextmanager
def counting(module: nn.Module) -> Iterator[Watch]:
    """A `Watch` that follows which part of ``module`` is running."""
    watch = Watch(module)
    with ExitStack() as stack:
        before = hooks.register_module_forward_pre_hook(watch.enter)
        stack.callback(before.remove)
        after = hooks.register_module_forward_hook(watch.leave, always_call=True)
        stack.callback(after.remove)
        yield watch


class Watch:
    """Which module runs, and how many operations ran in it."""

    def __init__(self, module: nn.Module) -> None:
        self._paths = {id(part): path for path, part in module.named_modules()}
        self._running: list[str] = []
        self._done: dict[str, int] = {}

    def enter(self, module: nn.Module, *_: Any) -> None:
        self._running.append(self._paths.get(id(module), ""))

    def leave(self, module: nn.Module, *_: Any) -> None:
        self._running.pop()

    @property
    def path(self) -> str:
        """Of the innermost module that runs."""
        return self._running[-1] if self._running else ""

    def place(self) -> Place:
        """Of the next operation; a new one at each call."""
        self._done[self.path] = self._done.get(self.path, -1) + 1
        return self.path, self._done[self.path]


def run(module: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> list[Tensor]:
    """The floating-point tensors that ``module`` gives on ``inputs``, without what it keeps for later tokens."""
    with torch.no_grad():
        out = module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
    if isinstance(out, Mapping):
        out = [value for key, value in out.items() if key != "past_key_values"]
    found = [one for one in tree_iter(out) if isinstance(one, Tensor) and one.is_floating_point()]
    if not found:
        raise DataError(f"surgery: {type(module).__name__} gives no floating-point tensors on these inputs")
    return found


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: Watch, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch
        self.known: dict[int, tuple[Tensor, list[Axis]]] = {}  # with the tensor: its id must not be used again
        self.touched: dict[str, dict[int, Axis]] = {}
        self.averages: dict[Place, tuple[tuple[int, Axis], ...]] = {}
        self._held = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        self._place: Place = ("", 0)
        for tensor in tensors.values():
            if id(tensor) not in self.known:
                self.known[id(tensor)] = (tensor, [Axis(size) for size in tensor.shape])

    def of(self, tensor: Tensor) -> list[Axis]:
        if id(tensor) not in self.known:
            self.give(tensor, [Axis(size, "it comes from outside") for size in tensor.shape])
        return self.known[id(tensor)][1]

    def give(self, tensor: Any, axes: Sequence[Axis]) -> None:
        if isinstance(tensor, Tensor):
            assert [axis.size for axis in axes] == list(tensor.shape), (axes, tensor.shape)
            self.known[id(tensor)] = (tensor, list(axes))

    def reduces(self, tensor: Tensor, dims: Sequence[int]) -> None:
        self.averages[self._place] = tuple((dim, self.of(tensor)[dim]) for dim in dims)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._place = self.watch.place()
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        outs = [one for one in tree_iter(out) if isinstance(one, Tensor)]
        if outs:
            rule = RULES.get(name) or RULES.get(name.rstrip("_"))
            if rule is not None:
                rule(self, _positional(func, args, kwargs or {}), out)
            elif torch.Tag.pointwise in func.tags and len(outs) == 1:
                elementwise(self, tensors, out)
            else:
                unknown(self, name, tensors, outs)
            seen = self.touched.setdefault(self.watch.path, {})
            seen.update((id(axis), axis) for one in (*tensors, *outs) for axis in self.of(one))
        return out


def _positional(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments in the order of the schema; what has a name only, behind them."""
    found = list(args)
    for argument in func._schema.arguments[len(args) :] if kwargs else ():
        if not argument.kwarg_only:
            found.append(kwargs.get(argument.name, argument.default_value))
        elif argument.name in kwargs:
            found.append(kwargs[argument.name])
    return found


def trace(module: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> Graph:
    """Run ``module`` once and say what can be shrunk.

    Args:
        module: dense, in eval mode; not changed.
        inputs: by name, or in order; a few tokens or one small image are enough. Dimensions of inputs and outputs stay.

    Raises:
        ModelError: layers that are compact already.
    """
    taken = [path for path, _ in compact.compact_layers(module).items()]
    if taken:
        raise ModelError(
            f"surgery: {len(taken)} layers are compact already (the first is {taken[0]}); shrink before you compress"
        )
    tensors = tensors_of(module)
    with counting(module) as watch, _Tracer(watch, tensors) as tracer:
        outs = run(module, inputs)
    for out in outs:
        for axis in tracer.of(out):
            lock(axis, "it is an output of the model")
    axes = {name: tuple(tracer.known[id(tensor)][1]) for name, tensor in tensors.items()}
    blocks = [block.path for block in anatomy.of(module).blocks]
    return Graph(
        dimensions=tuple(_dimensions(axes, tensors, blocks)),
        axes=axes,
        touched={path: tuple(found.values()) for path, found in tracer.touched.items()},
        averages=tracer.averages,
        locked={
            (name, dim): why
            for name, found in axes.items()
            for dim, axis in enumerate(found)
            if (why := next((leaf.locked for leaf in leaves(axis) if leaf.locked), ""))
        },
    )


def _dimensions(
    axes: Mapping[str, Sequence[Axis]], tensors: Mapping[str, Tensor], blocks: Sequence[str]
) -> Iterator[Dimension]:
    places: dict[Axis, list[tuple[str, int]]] = {}
    for name, found in axes.items():
        for dim, axis in enumerate(found):
            for leaf in dict.fromkeys(leaves(axis)):
                places.setdefault(leaf, []).append((name, dim))
    parallel = {leaf for leaf in places if "parallel" in leaf.marks}
    for leaf, where in places.items():
        if leaf.locked or leaf.size < 2 or "inner" in leaf.marks:
            continue
        met = {next((i for i, path in enumerate(blocks) if name.startswith(f"{path}.")), None) for name, _ in where}
        kind: Kind
        if leaf in parallel:
            # of two such axes in one dimension the outer one has keys of its own
            outer = all(_is_outer(axes[name][dim], leaf, parallel) for name, dim in where)
            kind = "heads" if outer else "queries"
        elif len(met) > 1:
            kind = "hidden"
        elif any(tensors[name].ndim > 3 for name, _ in where):
            kind = "channels"
        else:
            kind = "latent" if "averaged" in leaf.marks else "ffn"
        block = min(met, key=lambda one: -1 if one is None else one) if len(met) == 1 else None
        yield Dimension(kind, leaf.size, block, tuple(where), leaf)


def _is_outer(axis: Axis, leaf: Axis, parallel: set[Axis]) -> bool:
    """Whether no other head axis stands before ``leaf`` in the products of ``axis``."""
    axis = find(axis)
    if axis.kind == "concat":
        return all(_is_outer(part, leaf, parallel) for part in axis.parts if leaf in set(leaves(part)))
    first = next((one for one in leaves(axis) if one in parallel), leaf)
    return first is leaf
