"""What a shrunk model has to give: the whole model with everything zero that is to go, averages over what stays.

Zeros alone are what a shrunk model equals wherever nothing is averaged over the removed indices. Norms do average: a
removed channel of a residual stream no longer counts in them, here as in the shrunk model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pennyweight.surgery.axes import Axis, find, mask_of
from pennyweight.surgery.trace import Graph, Watch, counting, run, tensors_of


def masked(
    module: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor], inputs: Mapping[str, Any] | Sequence[Any]
) -> list[Tensor]:
    """The outputs of ``module`` with every parameter zero at what ``masks`` removes; ``module`` is not changed."""
    held = tensors_of(module)
    zeroed: dict[int, Tensor] = {}
    for name, axes in graph.axes.items():
        kept = [mask_of(axis, masks) for axis in axes]
        if id(held[name]) not in zeroed and not all(bool(mask.all()) for mask in kept):
            tensor = held[name].detach().clone()
            for dim, mask in enumerate(kept):
                tensor.index_fill_(dim, (~mask).nonzero().flatten(), 0)
            zeroed[id(held[name])] = tensor
    swapped = {name: zeroed[id(tensor)] for name, tensor in held.items() if id(tensor) in zeroed}
    with counting(module) as watch, _KeptAverages(watch, graph, masks):
        return run(_Swapped(module, swapped), inputs)


class _Swapped(nn.Module):
    def __init__(self, module: nn.Module, swapped: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda args, kwargs: functional_call(module, swapped, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)  # type: ignore[no-untyped-call]


class _KeptAverages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Averages over what ``masks`` keep, in every operation that ``graph`` saw averaging over a dimension they cut."""

    def __init__(self, watch: Watch, graph: Graph, masks: Mapping[Axis, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch
        self.cut: dict[tuple[str, int], tuple[tuple[int, Tensor, Axis], ...]] = {}
        self.masks = masks
        for place, averaged in graph.averages.items():
            found = tuple((dim, mask_of(axis, masks), axis) for dim, axis in averaged)
            found = tuple(one for one in found if not bool(one[1].all()))
            if found:
                self.cut[place] = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = self.watch.place()
        if place not in self.cut:
            return func(*args, **(kwargs or {}))
        x = args[0]
        for dim, mask, _ in self.cut[place]:
            x = x.index_select(dim, mask.nonzero().flatten())
        name = func.overloadpacket.__name__
        if name in ("mean", "var"):
            return func(x, *args[1:], **(kwargs or {}))
        (dim, mask, axis), *_ = self.cut[place]
        scales = [
            None if one is None else one[mask] for one in (args[1:3] if name == "native_group_norm" else args[2:4])
        ]
        if name == "native_group_norm":
            groups = args[6]
            inner = find(axis)
            if inner.kind == "product" and find(inner.parts[0]).size == groups:
                groups = int(mask_of(inner.parts[0], self.masks).sum())
            found = functional.group_norm(x, groups, scales[0], scales[1], args[7])
        elif name == "native_layer_norm":
            found = functional.layer_norm(x, x.shape[-1:], scales[0], scales[1], args[4])
        else:
            found = functional.rms_norm(x, x.shape[-1:], scales[0], args[3])
        whole = torch.zeros_like(args[0])
        whole.index_copy_(dim, mask.nonzero().flatten(), found)
        return (whole, *func(*args, **(kwargs or {}))[1:])
