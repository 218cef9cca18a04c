"""Training with quantized weights and activations that need no tuning (AQT).

Row 124. Source: A. Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", arXiv:2105.03536, and its
code (google/aqt). Every forward pass rounds each output channel of a weight to whole multiples of its largest value
over ``2^(bits-1) - 1``. Inputs are left alone until ``start`` steps are done, while a running mean (0.1 of each new
batch) follows the largest value of every batch; from then on they are rounded, and clipped at that mean, for good.
Those that were never negative (behind a ReLU) spend no bit on a sign. Gradients pass the rounding, stop where values
are clipped, and never reach a scale. First and last layer keep more bits.

Differs from the source: unsigned values round to nearest (its code rounds them down), and the running mean starts at
the first batch instead of at zero.

Shape letters: M out features or channels, N inputs of one output, C in channels; ... any dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import OptionError
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.weights import Activation, Dense, Quantized
from pennyweight.weights.grid import Grid

Granularity = Literal["channel", "tensor"]
#: What a new batch counts for in the running mean of the largest values.
_NEW = 0.1
#: Bits from which on nothing is rounded.
FLOAT = 16


def channel_scale(matrix: Tensor, bits: int) -> Tensor:
    """(M, 1) the step of each row of ``matrix`` (M, N): its largest value over ``2^(bits-1) - 1``; 1 for zero rows."""
    largest = matrix.detach().abs().amax(1, keepdim=True)
    scale = largest / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, scale.clamp_min(torch.finfo(scale.dtype).smallest_normal), torch.ones_like(scale))


def round_channels(weight: Tensor, bits: int) -> Tensor:
    """``weight`` (M, ...) rounded channel by channel, straight-through; itself at 16 bits and more."""
    if bits >= FLOAT:
        return weight
    matrix = weight.flatten(1)
    scale = channel_scale(matrix, bits)
    level = matrix.detach() / scale
    return weight + (level.round() * scale - matrix.detach()).view_as(weight)


class Bound(nn.Module):
    """Follows the inputs of a layer until it is told to fix their bounds, and rounds them from then on.

    Args:
        bits: of a value; nothing is done at 16 and more.
        granularity: "channel" (the last dimension), or "tensor".
    """

    low: Tensor | None
    high: Tensor | None

    def __init__(self, bits: int, granularity: Granularity) -> None:
        super().__init__()
        self.bits, self.granularity = bits, granularity
        self.register_buffer("low", None)
        self.register_buffer("high", None)
        self.smallest = 0.0
        self.activation: Activation | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            found: Tensor = self.activation(x)
            return found
        if self.bits < FLOAT and self.training:
            self._follow(x.detach())
        return x

    def _follow(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]) if self.granularity == "channel" else x.reshape(-1, 1)
        low, high = rows.amin(0), rows.amax(0)
        self.smallest = min(self.smallest, float(low.min()))
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low, self.high = self.low + _NEW * (low - self.low), self.high + _NEW * (high - self.high)

    def fix(self) -> None:
        """Round from now on."""
        if self.bits >= FLOAT or self.low is None or self.high is None:
            return
        self.activation = Activation.from_range(
            self.low, self.high, bits=self.bits, symmetric=self.smallest < 0, granularity=self.granularity
        )


class _Layer(nn.Module):
    """A linear layer or convolution in training: what it reads and its weight rounded."""

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d, bits: int, bound: Bound) -> None:
        super().__init__()
        self.layer, self.bits, self.bound = layer, bits, bound

    def forward(self, x: Tensor) -> Tensor:
        weight = round_channels(self.layer.weight, self.bits)
        if isinstance(self.layer, nn.Linear):
            return functional.linear(self.bound(x), weight, self.layer.bias)
        x = self.bound(x.movedim(1, -1)).movedim(-1, 1)  # channels are the features
        found: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return found

    def quantized(self) -> Quantized:
        """The weight on its grid, as `forward` sees it."""
        matrix = self.layer.weight.detach().flatten(1).float()
        grid = Grid(self.bits, None, channel_scale(matrix, self.bits), None, "none")
        return Quantized.from_codes(grid.codes(matrix), grid)


class AQT:
    """Trains some layers of ``module`` through their rounding; a callback of `pennyweight.train.Trainer`.

        aqt = AQT(model, anatomy.of(model).layers(), bits=4, activation_bits=4, start=50)
        Trainer(model, optimizer, samples, batch=64, callbacks=[aqt]).run(500)
        aqt.finish()

    Parameters stay the objects they are, so that the optimizer may be made before or after. At 16 bits and more nothing
    is rounded, and training is what it would be without this, to the last bit.

    Args:
        module: changed in place.
        maps: layers to quantize, in the order of the model.
        bits: of weights, 2 to 8, or 16.
        activation_bits: of their inputs, 2 to 8, or 16.
        edge_bits: at least so many for the first and the last of ``maps``; None for no exception.
        start: steps before inputs are rounded.
        granularity: of the bounds of inputs.

    Raises:
        OptionError: a layer that is neither linear nor a convolution, or bits out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        maps: Sequence[Map],
        *,
        bits: int = 4,
        activation_bits: int = 4,
        edge_bits: int | None = 8,
        start: int,
        granularity: Granularity = "channel",
    ) -> None:
        for name, value in {"bits": bits, "activation_bits": activation_bits, "edge_bits": edge_bits or 8}.items():
            if not (2 <= value <= 8 or value == FLOAT):
                raise OptionError(f"aqt: {name} = {value}; give 2 to 8, or 16 to leave values as they are")
        if start < 1 or not maps:  # bounds are found in the steps before it
            raise OptionError(f"aqt: start = {start} for {len(maps)} layers; give at least 1 step and 1 layer")
        self.module, self.start, self.steps = module, start, 0
        self.layers: dict[str, _Layer] = {}
        for index, one in enumerate(maps):
            layer = module.get_submodule(one.path)
            if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                kind = type(layer).__name__
                raise OptionError(f"aqt: {one.path} is a {kind}; select plain linear layers and convolutions")
            at_edge = edge_bits is not None and index in (0, len(maps) - 1)
            least = edge_bits if at_edge and edge_bits is not None else 0
            bound = Bound(max(activation_bits, least), granularity)
            made = _Layer(layer, max(bits, least), bound).train(layer.training)
            self.layers[one.path] = made
            if min(made.bits, bound.bits) < FLOAT:
                module.set_submodule(one.path, made)

    def widths(self) -> Iterator[tuple[str, int, int]]:
        """(path, bits of the weight, bits of the inputs) of every layer."""
        for path, layer in self.layers.items():
            yield path, layer.bits, layer.bound.bits

    def step(self) -> None:
        """After a step of the optimizer."""
        self.steps += 1
        if self.steps == self.start:
            for layer in self.layers.values():
                layer.bound.fix()

    def finish(self) -> None:
        """Leave compact layers that compute what the trained ones computed; bounds still open are fixed.

        Raises:
            OptionError: no input ever came.
        """
        for path, layer in self.layers.items():
            if min(layer.bits, layer.bound.bits) >= FLOAT:
                continue
            if layer.bound.activation is None:
                layer.bound.fix()
            if layer.bound.bits < FLOAT and layer.bound.activation is None:
                raise OptionError(f"aqt: no input reached {path}; train at least one step")
            training = layer.layer.training
            self.module.set_submodule(path, layer.layer)
            weight = layer.quantized() if layer.bits < FLOAT else _dense(layer.layer)
            anatomy.replace(self.module, path, weight)
            compact = self.module.get_submodule(path).train(training)
            compact.activation = layer.bound.activation  # type: ignore[assignment]


def _dense(layer: nn.Module) -> Dense:
    matrix: Tensor = layer.weight  # type: ignore[assignment]
    return Dense(matrix.detach().flatten(1))
