"""Continual inference: networks over time that also run one step at a time, with the outputs they have on whole clips.

Row 239. Sources: L. Hedegaard, "Efficient Online Processing with Deep Neural Networks", arXiv:2306.13474; L. Hedegaard
and A. Iosifidis, "Continual 3D Convolutional Neural Networks for Real-time Processing of Videos", arXiv:2106.00050: a
step adds its share to outputs that are still to come, so that nothing is computed twice; residual branches wait for
each other. Differs from the sources: padding at the end of a clip is computed too (`Stepwise.flush`), so that every
output of the clip has its twin.

Weights are shared with the layers given, compact ones too: a fitted network streams as it is. Whole networks are in
`streams`, attention in `retroactive`.

Shape letters: B streams, C channels, T steps, S positions of a step (any number of dimensions), M out channels.
"""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import ModelError, OptionError, ShapeError
from pennyweight.weights import CompactConv1d, CompactConv2d, Weight

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | CompactConv1d | CompactConv2d


class Stepwise(nn.Module, abc.ABC):
    """A map of clips (B, C, T, S) that also runs step by step: (B, C, S) in, (B, M, S) out or None while it waits.

    The outputs of a clip and those of its steps, in order, are the same up to rounding. What was seen is held outside
    the state dict; `clear` forgets it.

    Attributes:
        receptive_field: steps that an output reads.
        padding: steps of nothing before the first and after the last of a clip.
        stride: steps from one output to the next.
        seen: steps of this stream so far.
    """

    seen: int
    _like: Tensor | None

    def __init__(self, *, receptive_field: int = 1, padding: int = 0, stride: int = 1) -> None:
        super().__init__()
        if padding > receptive_field - 1:
            raise ModelError(
                f"continual: {padding} steps of padding around {receptive_field} that an output reads; some outputs "
                "would read nothing else: pad less"
            )
        self.receptive_field, self.padding, self.stride = receptive_field, padding, stride
        self.clear()

    @property
    def delay(self) -> int:
        """Steps from the first one in to the first one out."""
        return self.receptive_field - 1 - self.padding

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A whole clip: (B, C, T, S) -> (B, M, T', S)."""

    @abc.abstractmethod
    def _step(self, x: Tensor) -> Tensor | None:
        """One step, with ``seen`` steps before it."""

    def forward_step(self, x: Tensor) -> Tensor | None:
        """The next step (B, C, S); the next output (B, M, S), or None where there is none yet.

        Raises:
            ShapeError: a step unlike those before it.
        """
        if self._like is not None and x.shape != self._like.shape:
            raise ShapeError(
                f"{type(self).__name__}: a step of shape {tuple(x.shape)} after steps of {tuple(self._like.shape)}; "
                "call clear() between streams"
            )
        found = self._step(x)
        self._like = x.detach()
        self.seen += 1
        return found

    def flush(self) -> list[Tensor]:
        """The outputs that only padding completes; the stream is over then, and forgotten."""
        found = self._ending()
        self.clear()
        return found

    def forward_steps(self, x: Tensor, *, end: bool = False) -> Tensor | None:
        """Steps (B, C, T, S) one after the other: the outputs that they complete, (B, M, T', S); None if none.

        Args:
            x: the next steps; none is forgotten between two calls.
            end: no step follows, so that outputs at the end are padded, as those of a clip.
        """
        found = [out for step in x.unbind(2) if (out := self.forward_step(step)) is not None]
        found += self.flush() if end else []
        return torch.stack(found, 2) if found else None

    def clear(self) -> None:
        """Forget what was seen."""
        for part in self.modules():
            if isinstance(part, Stepwise):
                part.seen, part._like = 0, None
                part._forget()

    def _forget(self) -> None:
        """Forget what this layer itself holds beyond ``seen``."""

    def _ending(self) -> list[Tensor]:
        if self._like is None or not self.padding:
            return []
        nothing = torch.zeros_like(self._like)
        return [out for _ in range(self.padding) if (out := self.forward_step(nothing)) is not None]

    def _due(self) -> bool:
        """Whether an output is complete with this step."""
        return self.seen >= self.delay and (self.seen - self.delay) % self.stride == 0


class Convolution(Stepwise):
    """A convolution whose first kernel dimension is time.

    Args:
        layer: ``nn.Conv1d`` to ``nn.Conv3d``, or a compact one; its weight is read at every step.

    Raises:
        ModelError: time is not padded by zeros, or padded on one side more than on the other.

    A step costs one application of the whole kernel at each position: that of one output.
    """

    def __init__(self, layer: _Convolution) -> None:
        reach = layer.dilation[0] * (layer.kernel_size[0] - 1)
        padding = layer.padding if isinstance(layer.padding, tuple) else _padding_of(layer.padding, layer)
        if layer.padding_mode != "zeros":
            raise ModelError(f"continual: {layer} pads by {layer.padding_mode}; only zeros can be known beforehand")
        super().__init__(receptive_field=reach + 1, padding=padding[0], stride=layer.stride[0])
        self.layer, self._spatial_padding = layer, padding[1:]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found

    def _forget(self) -> None:
        self._pending: Tensor | None = None  # (B, M, receptive field, S): sums of outputs that are still to come
        self._taps: tuple[Hashable, Tensor] | None = None

    def _kernel(self, dtype: torch.dtype) -> Tensor:
        """Every tap as a kernel of its own, the last one first: (M * taps, C of a group, positions)."""
        layer = self.layer
        key = (dtype, *((id(one), one._version) for one in (*layer.parameters(), *layer.buffers())))
        if self._taps is None or self._taps[0] != key or torch.is_grad_enabled():
            weight = layer.weight
            dense = weight.dense() if isinstance(weight, Weight) else weight
            whole = dense.reshape(dense.shape[0], -1, *layer.kernel_size).to(dtype)
            # rows of one group stay neighbors
            self._taps = key, whole.flip(2).movedim(2, 1).flatten(0, 1).contiguous()
        return self._taps[1]

    def _step(self, x: Tensor) -> Tensor | None:
        layer, kernel = self.layer, self._kernel(x.dtype)
        if x.ndim > 2:
            convolution: Any = (functional.conv1d, functional.conv2d)[x.ndim - 3]
            around: Any = (layer.stride[1:], self._spatial_padding, layer.dilation[1:])
            parts = convolution(x, kernel, None, *around, layer.groups)
        elif layer.groups == 1:
            parts = x @ kernel.T
        else:  # no position: one is made, and taken away
            parts = functional.conv1d(x[..., None], kernel[..., None], groups=layer.groups)[..., 0]
        parts = parts.view(len(x), layer.out_channels, layer.kernel_size[0], *parts.shape[2:])
        nothing = parts.new_zeros(
            *parts.shape[:2], self.receptive_field if self._pending is None else 1, *parts.shape[3:]
        )
        pending = nothing if self._pending is None else torch.cat([self._pending[:, :, 1:], nothing], 2)
        pending[:, :, :: layer.dilation[0]] += parts
        self._pending = pending
        if not self._due():
            return None
        found, bias = pending[:, :, 0], layer.bias
        return found if bias is None else found + bias.to(found.dtype).view(-1, *(1,) * (found.ndim - 2))


def _padding_of(words: str | tuple[int, ...], layer: _Convolution) -> tuple[int, ...]:
    """``words`` ("same", "valid") in steps and positions on either side."""
    if words == "valid":
        return (0,) * len(layer.kernel_size)
    whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(total % 2 for total in whole):
        raise ModelError(f"continual: {layer} pads one side more than the other; give odd kernels")
    return tuple(total // 2 for total in whole)


class Pool(Stepwise):
    """Average or maximum over steps and positions; the first kernel dimension is time.

    Args:
        layer: ``nn.AvgPool1d`` to ``nn.AvgPool3d``, ``nn.MaxPool1d`` to ``nn.MaxPool3d``.

    Raises:
        ModelError: rounding up, dilation, or averages that leave the padding out.
    """

    def __init__(self, layer: nn.Module) -> None:
        dimensions: int = int(type(layer).__name__[-2])
        settings = (layer.kernel_size, layer.stride, layer.padding)
        each: Any = [(v,) * dimensions if isinstance(v, int) else v for v in settings]
        self.is_average = isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
        outside = self.is_average and any(each[2]) and not layer.count_include_pad
        dilated = not self.is_average and layer.dilation not in (1, (1,) * dimensions)
        if layer.ceil_mode or dilated or outside or getattr(layer, "divisor_override", None):
            raise ModelError(
                f"continual: {layer} rounds up, dilates, or leaves its padding out; give one that does not"
            )
        super().__init__(receptive_field=each[0][0], padding=each[2][0], stride=each[1][0])
        self.layer = layer
        self._around: Any = tuple(v[1:] for v in each)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found

    def _forget(self) -> None:
        self._held: deque[Tensor] = deque()

    def _pooled(self, x: Tensor) -> Tensor:
        """One step (B, C, S), pooled over its positions."""
        dimensions = len(self._around[0])
        if not dimensions:
            return x
        average, maximum = (
            (functional.avg_pool1d, functional.avg_pool2d),
            (functional.max_pool1d, functional.max_pool2d),
        )
        pool: Any = (average if self.is_average else maximum)[dimensions - 1]
        found: Tensor = pool(x, *self._around)
        return found

    def _step(self, x: Tensor) -> Tensor | None:
        return self._take(self._pooled(x))

    def _take(self, pooled: Tensor) -> Tensor | None:
        if not self.seen:
            self._held.extend([self._nothing(pooled)] * self.padding)
        self._held.append(pooled)
        if not self._due():
            found = None
        else:
            together = torch.stack(tuple(self._held))
            found = together.mean(0) if self.is_average else together.amax(0)
        if len(self._held) == self.receptive_field:
            self._held.popleft()
        return found

    def _nothing(self, pooled: Tensor) -> Tensor:
        return torch.full_like(pooled, 0.0 if self.is_average else -torch.inf)

    def _ending(self) -> list[Tensor]:
        found = []
        for _ in range(self.padding if self._held else 0):
            found.append(self._take(self._nothing(self._held[-1])))
            self.seen += 1
        return [out for out in found if out is not None]


class Mean(Stepwise):
    """The mean of all positions of the last ``window`` steps: (B, C, T, S) -> (B, C, T - window + 1).

    On a clip of ``window`` steps it is the average over the whole clip.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise OptionError(f"continual: a mean over {window} steps; give at least 1")
        super().__init__(receptive_field=window)

    def forward(self, x: Tensor) -> Tensor:
        each = x.flatten(3).mean(3) if x.ndim > 3 else x
        return functional.avg_pool1d(each, self.receptive_field, stride=1)

    def _forget(self) -> None:
        self._held: deque[Tensor] = deque(maxlen=self.receptive_field)

    def _step(self, x: Tensor) -> Tensor | None:
        self._held.append(x.flatten(2).mean(2) if x.ndim > 2 else x)
        return torch.stack(tuple(self._held)).mean(0) if self._due() else None


class Pointwise(Stepwise):
    """A module that treats every step alike and by itself: activations, dropout, batch norm in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found

    def _step(self, x: Tensor) -> Tensor | None:
        found: Tensor = self.module(x.unsqueeze(2)).squeeze(2)
        return found


class EachStep(Stepwise):
    """A module that is called with the steps (B, C, S) themselves, such as a head behind a pooled clip."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        steps = x.movedim(2, 1)
        found: Tensor = self.module(steps.flatten(0, 1))
        return found.view(*steps.shape[:2], *found.shape[1:]).movedim(1, 2)

    def _step(self, x: Tensor) -> Tensor | None:
        found: Tensor = self.module(x)
        return found
