"""Quantized activations, static or dynamic, and layers that compute in integers alone.

Row 226. Sources: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", arXiv:1712.05877, section 2; the survey arXiv:2103.13630, section IV-A (dyadic numbers). Differs from them:
the multiplier keeps 31 bits as in the first, and rounding is to nearest, ties up.

Shape letters: M out features, N in features; ... any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.levers.quantize.ranges import Range, find_range, grid_of
from pennyweight.weights.grid import Grid
from pennyweight.weights.quantized import Quantized
from pennyweight.weights.weight import Weight

_MULTIPLIER_BITS = 31


def dyadic(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """(mantissa, shift), int64: ``multiplier`` is ``mantissa / 2**shift`` to 31 bits.

    Raises:
        OptionError: a multiplier that is not above zero, or beyond what 31 bits and a shift of 1 to 62 hold.
    """
    fraction, exponent = torch.frexp(multiplier.double())  # fraction in [1/2, 1)
    mantissa = (fraction * 2**_MULTIPLIER_BITS).round().long()
    shift = _MULTIPLIER_BITS - exponent.long()
    if not bool(((multiplier > 0) & (shift >= 1) & (shift <= 62)).all()):
        raise OptionError("dyadic: multipliers must lie between 2^-31 and 2^30; check the scales of the layer")
    return mantissa, shift


def requantize(accumulator: Tensor, mantissa: Tensor, shift: Tensor, zero: int, bits: int) -> Tensor:
    """Codes of ``accumulator * mantissa / 2**shift + zero``, in integers: a multiplication, an addition and a shift."""
    half = torch.ones_like(shift) << (shift - 1)
    return (((accumulator.long() * mantissa + half) >> shift) + zero).clamp(0, 2**bits - 1)


class ActivationGrid(nn.Module):
    """Rounds activations to integers: on a range found from calibration data, or anew for every row (dynamic).

    Args:
        bits: of a code.
        grid: of one scale and zero for all; None is dynamic.
    """

    def __init__(self, bits: int, grid: Grid | None) -> None:
        super().__init__()
        self.bits, self.grid = bits, grid

    @classmethod
    def static(
        cls, inputs: Tensor, *, bits: int = 8, range: Range = "min-max", percentile: float = 99.9
    ) -> ActivationGrid:
        """The grid that ``inputs`` (..., N), calibration data, ask for."""
        low, high = find_range(inputs.reshape(1, -1), range, bits=bits, symmetric=False, percentile=percentile)
        return cls(bits, grid_of(low[:, None], high[:, None], bits=bits, symmetric=False))

    def grid_for(self, x: Tensor) -> Grid:
        """The grid of the rows of ``x`` (R, N): the static one, or theirs."""
        if self.grid is not None:
            return self.grid
        low, high = find_range(x, "min-max", bits=self.bits, symmetric=False)
        return grid_of(low[:, None], high[:, None], bits=self.bits, symmetric=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        grid = self.grid_for(rows)
        found = grid.values(grid.codes(rows))
        return found.to(x.dtype).reshape(x.shape)


class QuantizedInputs(nn.Module):
    """A linear layer that rounds its inputs first; simulated, in floating point.

    Args:
        weight: (M, N).
        bias: (M,) or None.
        activations: how its inputs are rounded.
    """

    def __init__(self, weight: Weight, bias: Tensor | None, activations: ActivationGrid) -> None:
        super().__init__()
        self.weight, self.activations = weight, activations
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.weight(self.activations(x))
        return found if self.bias is None else found + self.bias.to(found.dtype)


class IntegerLinear(nn.Module):
    """A linear layer in integers from code to code: products, sums, one dyadic multiplier a channel, no floats.

    Args:
        weight: symmetric, one scale for the matrix or for each row.
        bias: (M,) or None; held as int32 in units of input scale times weight scale.
        inputs, outputs: static grids of what comes in and goes out.

    Raises:
        OptionError: a weight with a zero or with groups, or dynamic activations: their scales cannot be folded into
            one multiplier a channel.
    """

    codes: Tensor
    offset: Tensor
    mantissa: Tensor
    shift: Tensor

    def __init__(self, weight: Quantized, bias: Tensor | None, inputs: ActivationGrid, outputs: ActivationGrid) -> None:
        super().__init__()
        if weight.zero_kind != "none" or weight.format != "integer" or weight.group_size is not None:
            raise OptionError("integer-only: give symmetric integer weights with one scale for the matrix or each row")
        if inputs.grid is None or outputs.grid is None:
            raise OptionError("integer-only: needs activations = static: a scale found on the way is not an integer")
        self.bits, self.inputs, self.outputs = outputs.bits, inputs, outputs
        scale = weight.scale.dense().detach().double().reshape(-1).expand(weight.shape[0])
        scale_in, zero_in = _one(inputs.grid)
        scale_out, self.zero_out = _one(outputs.grid)
        self.multiplier = scale * scale_in / scale_out  # (M,) what the dyadic number stands for
        mantissa, shift = dyadic(self.multiplier)
        codes = weight.codes().int() - 2 ** (weight.bits - 1)
        # sum of w (x - zero) = sum of w x - zero * sum of w: the second part is known beforehand
        offset = -zero_in * codes.sum(1)
        if bias is not None:
            offset = offset + (bias.detach().double() / (scale * scale_in)).round().int()
        for name, tensor in {"codes": codes, "offset": offset, "mantissa": mantissa, "shift": shift}.items():
            self.register_buffer(name, tensor)

    def accumulate(self, codes: Tensor) -> Tensor:
        """(R, M) int32 sums of products of input ``codes`` (R, N) and weights, with the bias."""
        return codes.int() @ self.codes.T + self.offset

    def integers(self, codes: Tensor) -> Tensor:
        """Output codes (R, M) of input ``codes`` (R, N), in integers alone."""
        return requantize(self.accumulate(codes), self.mantissa, self.shift, self.zero_out, self.bits)

    def simulated(self, codes: Tensor) -> Tensor:
        """The same with the exact multiplier in float64."""
        exact = self.accumulate(codes).double() * self.multiplier
        return (exact.round() + self.zero_out).clamp(0, 2**self.bits - 1).long()

    def forward(self, x: Tensor) -> Tensor:
        assert self.inputs.grid is not None
        assert self.outputs.grid is not None
        codes = self.integers(self.inputs.grid.codes(x.reshape(-1, x.shape[-1])))
        return self.outputs.grid.values(codes).to(x.dtype).reshape(*x.shape[:-1], -1)


def _one(grid: Grid) -> tuple[float, int]:
    assert grid.zero is not None
    return float(grid.scale), int(grid.zero)
