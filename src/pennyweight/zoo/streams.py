"""Whole networks that run step by step: layers one after the other, branches that wait for each other.

Row 239; sources in `continual`. Differs from them: branches are joined by queues, so that any delays match.

Shape letters: B streams, C channels, T steps, S positions of a step (any number of dimensions), M out channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError, OptionError
from pennyweight.weights import CompactConv1d, CompactConv2d, CompactLinear
from pennyweight.zoo.continual import Convolution, EachStep, Mean, Pointwise, Pool, Stepwise


def _check_apart(parts: Sequence[nn.Module]) -> None:
    """Refuse a part that stands in two places: what it has seen is held once."""
    held = [one for part in parts for one in part.modules() if isinstance(one, Stepwise)]
    if len({id(one) for one in held}) < len(held):
        raise ModelError(
            "continual: one and the same part stands in two places, and holds what it has seen for one of them; give "
            "each place a part of its own around the same weights"
        )


class Sequential(Stepwise):
    """One after the other.

    Raises:
        ModelError: a part that stands there twice.
    """

    def __init__(self, *parts: Stepwise) -> None:
        _check_apart(parts)
        reach, padding, stride = 1, 0, 1
        for part in parts:
            reach += (part.receptive_field - 1) * stride
            padding += part.padding * stride
            stride *= part.stride
        super().__init__(receptive_field=reach, padding=padding, stride=stride)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return reduce(lambda found, part: part(found), self.parts, x)

    def _step(self, x: Tensor) -> Tensor | None:
        return self._from(0, x)

    def _from(self, first: int, x: Tensor) -> Tensor | None:
        found: Tensor | None = x
        for part in self.parts[first:]:
            if found is None:
                return None
            found = part.forward_step(found)  # type: ignore[operator]
        return found

    def _ending(self) -> list[Tensor]:
        found = []
        for index, part in enumerate(self.parts):
            found += [self._from(index + 1, out) for out in part.flush()]  # type: ignore[operator]
        return [out for out in found if out is not None]


class Parallel(Stepwise):
    """Branches of the same steps, their outputs added or joined along the channels.

    Args:
        branches: whose outputs are as many on every clip.
        how: "sum", or "concatenate".

    Raises:
        ModelError: a branch that stands there twice.
        OptionError: branches that shorten a clip by different numbers of steps, or stride differently.
    """

    def __init__(self, *branches: Stepwise, how: Literal["sum", "concatenate"] = "sum") -> None:
        _check_apart(branches)
        short = {(b.receptive_field - 1 - 2 * b.padding, b.stride) for b in branches}
        if len(short) != 1:
            raise OptionError(
                f"continual: branches that shorten clips by (steps, stride) {sorted(short)}; pad them alike, "
                "or shorten the others with Shift"
            )
        slowest = max(branches, key=lambda b: b.delay)
        super().__init__(receptive_field=slowest.receptive_field, padding=slowest.padding, stride=slowest.stride)
        self.branches, self.how = nn.ModuleList(branches), how

    def forward(self, x: Tensor) -> Tensor:
        return self._joined([branch(x) for branch in self.branches])

    def _joined(self, found: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(found), 1) if self.how == "concatenate" else reduce(torch.add, found)

    def _forget(self) -> None:
        # outputs of quick branches wait here for the slow ones: the delays of a residual connection
        self._queues: list[deque[Tensor]] = []

    def _step(self, x: Tensor) -> Tensor | None:
        return next(iter(self._ready([branch.forward_step(x) for branch in self.branches])), None)  # type: ignore[operator]

    def _ready(self, found: Sequence[Tensor | None]) -> list[Tensor]:
        self._queues = self._queues or [deque() for _ in self.branches]
        for queue, out in zip(self._queues, found, strict=True):
            if out is not None:
                queue.append(out)
        return [self._joined([q.popleft() for q in self._queues])] if all(self._queues) else []

    def _ending(self) -> list[Tensor]:
        rests = [branch.flush() for branch in self.branches]  # type: ignore[operator]
        found = []
        for index in range(max(map(len, rests))):
            found += self._ready([rest[index] if index < len(rest) else None for rest in rests])
        return found


class Shift(Stepwise):
    """Leaves out ``first`` steps of a clip at its beginning and ``last`` at its end; the rest passes as it is."""

    def __init__(self, first: int, last: int) -> None:
        if min(first, last) < 0:
            raise OptionError(f"continual: leave out {first} and {last} steps; give none or more")
        super().__init__(receptive_field=first + last + 1)
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.first : x.shape[2] - self.last]

    def _forget(self) -> None:
        self._held: deque[Tensor] = deque()

    def _step(self, x: Tensor) -> Tensor | None:
        self._held.append(x)
        if len(self._held) > self.last + 1:
            self._held.popleft()
        return self._held[0] if self._due() else None


class Residual(Parallel):
    """``x + inner(x)``, where x waits for the inner outputs.

    Args:
        inner: of stride 1.
        shrink: what x is added to where ``inner`` shortens a clip: its steps less as many at both ends ("centered"), or
            its last ones ("lagging").

    Raises:
        OptionError: an inner stride, a clip that grows, or one that gets shorter by an odd number and is centered.
    """

    def __init__(self, inner: Stepwise, *, shrink: Literal["centered", "lagging"] = "centered") -> None:
        short = inner.receptive_field - 1 - 2 * inner.padding
        if inner.stride != 1 or short < 0 or (short % 2 and shrink == "centered"):
            raise OptionError(
                f"continual: a residual around stride {inner.stride} that shortens clips by {short}; give stride 1 and "
                "an even number of steps, or shrink='lagging'"
            )
        first = short // 2 if shrink == "centered" else short
        super().__init__(Shift(first, short - first), inner)


#: What treats every step by itself.
_POINTWISE = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Identity),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, CompactConv1d, CompactConv2d)
_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_GLOBAL = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def continual(module: nn.Module, *, window: int | None = None) -> Stepwise:
    """``module`` over time as one that also runs step by step; it shares the weights, and is in evaluation mode.

    Understands ``nn.Sequential`` of convolutions (compact ones too), pooling, activations, batch norms, `Stepwise`
    layers (`Residual`, `Parallel`, attention), and, once the time is averaged away, flattening and linear heads.

    Args:
        module: of clips (B, C, T, S).
        window: T of the clips that it was made for; an average over the whole clip (``nn.AdaptiveAvgPool1d(1)``) then
            takes as many steps as reach it from such a clip.

    Raises:
        ModelError: a layer that mixes steps in some other way, or an average over a clip without its ``window``.
    """
    found: list[Stepwise] = []
    _append(found, module, window)
    return Sequential(*found).eval()


def _append(found: list[Stepwise], module: nn.Module, window: int | None) -> None:
    is_head = any(isinstance(part, Mean) for part in found)
    if isinstance(module, nn.Sequential):
        for part in module:
            _append(found, part, window)
    elif isinstance(module, Stepwise):
        found.append(module)
    elif isinstance(module, _CONV) and not is_head:
        found.append(Convolution(module))
    elif isinstance(module, _POOL) and not is_head:
        found.append(Pool(module))
    elif isinstance(module, _GLOBAL) and not is_head:
        found.append(Mean(_steps_left(Sequential(*found), module, window)))
    elif is_head and isinstance(module, (nn.Flatten, nn.Linear, CompactLinear, *_POINTWISE)):
        found.append(EachStep(module))
    elif isinstance(module, _POINTWISE):
        found.append(Pointwise(module))
    else:
        raise ModelError(
            f"continual: {module} may mix steps; give convolutions, pooling, activations, Residual, Parallel, "
            "attention of pennyweight.zoo.retroactive, or Pointwise(module) for one that treats every step by itself"
        )


def _steps_left(before: Sequential, layer: nn.Module, window: int | None) -> int:
    size = layer.output_size
    if prod(size if isinstance(size, tuple) else (size,)) != 1:
        raise ModelError(f"continual: {layer} keeps several positions; give output size 1")
    if window is None:
        raise ModelError(f"continual: {layer} averages over a whole clip; give window, the steps of a clip")
    left = window + 2 * before.padding - before.receptive_field
    if left < 0:
        raise OptionError(
            f"continual: window = {window}, but one output reads {before.receptive_field} steps; give more"
        )
    return left // before.stride + 1
