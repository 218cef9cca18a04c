"""Weights under training: they stand in compact layers while a quantizer learns, and are frozen to `Quantized`.

They are never saved; `Weight.cost` is that of what they freeze to.

Shape letters: M out features, N in features, G groups of a row, K rank.
"""

from __future__ import annotations

import dataclasses
from typing import TypeGuard

import torch
from torch import Tensor, nn

from pennyweight.solvers.fake_quant import affine, flushed, in_groups, out_of_groups, stepped, stored
from pennyweight.weights import Cost, Dense, Quantized, Weight
from pennyweight.weights.grid import Grid
from pennyweight.weights.transposed import Transposed

_FLOOR = 1e-4  # the least scale, as in EfficientQAT, unless some start below it


class Rounded(Weight):
    """A matrix trained through its rounding, with its scales and integer zeros; computes with what it freezes to.

    Args:
        matrix: (M, N), to start from.
        grid: to start from; with integer zeros and no nested scales.
    """

    def __init__(self, matrix: Tensor, grid: Grid) -> None:
        assert grid.zero_kind == "integer", grid.zero_kind
        assert grid.zero is not None
        super().__init__(shape=(matrix.shape[0], matrix.shape[1]))
        self.bits, self.group_size = grid.bits, grid.group_size
        self.matrix = nn.Parameter(matrix.detach().float().clone())
        self.scale = nn.Parameter(grid.scale.detach().float().clone())
        self.zero = nn.Parameter(grid.zero.float())
        self.floor = min(_FLOOR, float(self.scale.detach().min()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    def dense(self) -> Tensor:
        scale = stored(self.scale, self.floor)[..., None]
        entries = affine(in_groups(self.matrix, self.group_size), scale, self.zero[..., None], self.bits)
        return out_of_groups(entries, self.shape[1])

    @property
    def T(self) -> Weight:
        return Transposed(self)

    @torch.no_grad()
    def frozen(self) -> Quantized:
        """What it computes with, exactly, in codes."""
        scale = stored(self.scale.detach(), self.floor).half()
        zero = self.zero.detach().round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        grid = Grid(self.bits, self.group_size, scale, zero, "integer")
        return Quantized.from_codes(grid.codes(self.matrix.detach()), grid)

    def cost(self) -> Cost:
        return self.frozen().cost()


class Rescaled(Weight):
    """Codes that stay as they are, and a trained factor for the scale of every group.

    Args:
        weight: quantized, with a scale for every row that is stored as it is; see `rescalable`.

    Float zeros stay as they are, too.
    """

    levels: Tensor
    shift: Tensor | None

    def __init__(self, weight: Quantized) -> None:
        assert rescalable(weight)
        super().__init__(shape=weight.shape)
        self.held = [weight]  # in a list: no part of this module, so that its scales are not trained themselves
        grid = weight.grid
        plain = dataclasses.replace(grid, scale=torch.ones_like(grid.scale.detach(), dtype=torch.float32))
        if grid.zero_kind == "float":
            assert plain.zero is not None
            plain = dataclasses.replace(plain, zero=torch.zeros_like(plain.scale))
        # whole numbers up to 256 and small floats: bfloat16 holds them all
        self.register_buffer("levels", plain.values(weight.codes()).bfloat16())
        shift = grid.zero.detach().float() if grid.zero_kind == "float" and grid.zero is not None else None
        self.register_buffer("shift", shift)
        self.register_buffer("start", grid.scale.detach().float())
        self.factor = nn.Parameter(torch.ones_like(self.start))

    start: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return flushed(x, self._made, self.factor)

    def _made(self, factor: Tensor) -> Tensor:
        group_size, scale = self.held[0].group_size, (self.start * factor)[..., None]
        entries = in_groups(self.levels, group_size) * scale
        if self.shift is not None:
            entries = entries + self.shift[..., None]
        return out_of_groups(entries, self.shape[1])

    def dense(self) -> Tensor:
        return self._made(self.factor)

    @property
    def T(self) -> Weight:
        return Transposed(self)

    def frozen(self) -> Quantized:
        """The quantized weight with its new scales, stored as wide as the old ones."""
        return rescaled(self.held[0], self.factor.detach())

    def cost(self) -> Cost:
        return self.held[0].cost()


def rescalable(weight: object) -> TypeGuard[Quantized]:
    """Whether ``weight`` is quantized, its scales one or more a row and stored as they are."""
    return (
        isinstance(weight, Quantized) and isinstance(weight.scale, Dense) and weight.scale.shape[0] == weight.shape[0]
    )


@torch.no_grad()
def rescaled(weight: Quantized, factor: Tensor) -> Quantized:
    """``weight`` with its scales times ``factor`` (M, G): the same codes, zeros and bytes."""
    assert rescalable(weight)
    held = weight.scale.dense().detach()
    scale = Dense((held.float() * factor).to(held.dtype))
    return Quantized(weight.packed, scale, weight.zero, **weight.settings())


class Merged(Weight):
    """``W + factor * up @ down``, rounded to ``step * level + offset``: the low-rank part is merged before rounding.

    Args:
        matrix: W, (M, N), which stays as it is.
        bits: of a code, at least 2.
        group_size: input features that share a step and an offset; None for the whole row.
        up: (M, K), zeros to start at W itself.
        down: (K, N).
        factor: of the product.
        offsets: train an offset for every group.

    Starts with the narrowest steps that clamp nothing: ``max(min W / low, max W / high)`` of each group, offset 0.
    """

    matrix: Tensor
    offset: nn.Parameter | None

    def __init__(
        self, matrix: Tensor, *, bits: int, group_size: int | None, up: Tensor, down: Tensor, factor: float,
        offsets: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(shape=(matrix.shape[0], matrix.shape[1]))
        self.bits, self.group_size, self.factor = bits, group_size, factor
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.register_buffer("matrix", matrix.detach().float())
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        entries = in_groups(self.matrix, group_size)
        step = torch.maximum(entries.amin(-1) / self.low, entries.amax(-1) / self.high)
        step = torch.where(step > 0, step, torch.ones_like(step))
        self.step = nn.Parameter(step)
        self.register_parameter("offset", nn.Parameter(torch.zeros_like(step)) if offsets else None)
        self.floor = min(_FLOOR, float(step.min()))

    def forward(self, x: Tensor) -> Tensor:
        return flushed(x, self._made, *self._parts())

    def dense(self) -> Tensor:
        return self._made(*self._parts())

    def _parts(self) -> tuple[Tensor, ...]:
        parts = (self.matrix, self.up, self.down, self.step)
        return parts if self.offset is None else (*parts, self.offset)

    def _made(self, matrix: Tensor, up: Tensor, down: Tensor, step: Tensor, offset: Tensor | None = None) -> Tensor:
        merged = in_groups(torch.addmm(matrix, up, down, alpha=self.factor), self.group_size)
        step = stored(step, self.floor)
        if offset is not None:
            offset = self._stored_offset(step, offset)[..., None]
        return out_of_groups(stepped(merged, step[..., None], offset, self.low, self.high), self.shape[1])

    def _stored_offset(self, step: Tensor, offset: Tensor) -> Tensor:
        """The offset that float16 holds: what is stored is the value of the lowest level."""
        with torch.no_grad():
            held = torch.where(offset == 0, offset, (offset + self.low * step).half().float() - self.low * step)
        return offset + (held - offset).detach()

    @property
    def T(self) -> Weight:
        return Transposed(self)

    @torch.no_grad()
    def frozen(self) -> Quantized:
        """What it computes with, in codes: symmetric where no offset was learned, else with float zeros."""
        step = stored(self.step, self.floor)
        learned = self.offset is not None and bool(self.offset.any())
        offset = self._stored_offset(step, self.offset) if self.offset is not None else torch.zeros_like(step)
        merged = in_groups(torch.addmm(self.matrix, self.up, self.down, alpha=self.factor), self.group_size)
        level = ((merged - offset[..., None]) / step[..., None]).clamp_(self.low, self.high).round_()
        codes = out_of_groups(level - self.low, self.shape[1]).to(torch.uint8)
        zero = (offset + self.low * step).half() if learned else None
        grid = Grid(self.bits, self.group_size, step.half(), zero, "float" if learned else "none")
        return Quantized.from_codes(codes, grid)

    def cost(self) -> Cost:
        return self.frozen().cost()
