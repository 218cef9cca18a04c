"""A model run in two streams at once, block by block: as it is, and as it is being changed.

Reconstruction methods fit each block to what it gave before the change, on what the changed blocks before it give now.
The model's own forward is run once, on every window twice: one half of the batch goes through the blocks as they are,
the other through the changed ones. So masks, positions and whatever lies between blocks are the model's own business,
and at any time one block's inputs are in memory.

Shape letters: C windows; ... the dimensions of what flows between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.calibrate.passage import cut, joined
from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import ModelError
from pennyweight.evaluate.forward import accepts, first_tensor, looking
from pennyweight.model.anatomy import Block
from pennyweight.model.model import Model

_AT_ONCE = 8  # windows a block is run on without gradients


class _Finished(Exception):
    """Raised inside the forward when the last block is done."""


@dataclass(frozen=True)
class Meeting:
    """A block about to be changed.

    Attributes:
        block: where it lies in the model.
        count: C.
        targets: (C, ...) what it gives as it is, on what the unchanged model gives it.
        dtype: of matrix products; None for that of the weights.
    """

    block: Block
    count: int
    targets: Tensor
    dtype: torch.dtype | None
    _forward: Callable[..., Any]
    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def run(self, at: Tensor) -> Tensor:
        """(len(at), ...) what the block gives as it is now, on what the changed model gives it, for the windows ``at``.

        Differentiable where gradients are on.
        """
        return first_tensor(_run(self._forward, self._given, 2 * self.count, at + self.count, self.dtype))


def two_streams(
    model: Model,
    windows: Tensor | Mapping[str, Tensor],
    change: Callable[[Meeting], None],
    *,
    blocks: Sequence[Block],
    dtype: torch.dtype | None = None,
) -> None:
    """Meet ``blocks`` in order; ``change`` changes each in place, and what it gives from then on feeds the later ones.

    The model itself is left in evaluation mode, without gradients, while ``change`` runs.

    Args:
        model: whose blocks are changed.
        windows: as `pennyweight.calibrate.collect` takes them.
        change: called once for each of ``blocks``.
        blocks: to meet; others are run as they are.
        dtype: of matrix products, by autocast.

    Raises:
        ModelError: a block that the model runs more than once, or never.
        DataError: inputs that the model does not take.
    """
    inputs = inputs_of(model, windows)
    tensors = inputs.values() if isinstance(inputs, Mapping) else inputs
    count = len(next(iter(tensors)))
    waiting = {block.path for block in blocks}
    wrapped: list[nn.Module] = []

    def wrap(block: Block) -> None:
        layer = model.module.get_submodule(block.path)
        own = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if block.path not in waiting:
                raise ModelError(f"{block.path}: the model runs this block more than once; leave its maps as they are")
            given = (args, kwargs)
            parts = [torch.arange(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE)]
            outs = [_run(own, given, 2 * count, at, dtype) for at in parts]
            change(Meeting(block, count, torch.cat([first_tensor(out) for out in outs]), dtype, own, given))
            waiting.discard(block.path)
            if not waiting:
                raise _Finished
            outs += [_run(own, given, 2 * count, at + count, dtype) for at in parts]
            return joined(outs, [len(at) for at in parts] * 2)

        layer.forward = forward
        wrapped.append(layer)

    for block in blocks:
        wrap(block)
    try:
        with looking(model.module), suppress(_Finished):
            if isinstance(inputs, Mapping):
                twice = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
                # a cache would gather the keys of whatever a block is run on
                model.module(**twice, **({"use_cache": False} if accepts(model.module, "use_cache") else {}))
            else:
                model.module(*(torch.cat([tensor, tensor]) for tensor in inputs))
    finally:
        for layer in wrapped:
            del layer.forward
    if waiting:
        raise ModelError(f"{min(waiting)}: the model does not run this block on such inputs")


def _run(
    forward: Callable[..., Any],
    given: tuple[tuple[Any, ...], dict[str, Any]],
    windows: int,
    at: Tensor,
    dtype: torch.dtype | None,
) -> Any:
    """What a block gives for the windows ``at`` of all those it was ``given``."""
    args, kwargs = cut(given, windows, at)
    with torch.autocast(at.device.type, dtype) if dtype is not None else nullcontext():
        return forward(*args, **kwargs)
