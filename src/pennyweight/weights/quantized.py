"""Quantized weights: packed codes of 1 to 8 bits on a grid of scales and zeros.

What a code means is said in `pennyweight.weights.grid`. Scales and zeros are weights themselves: doubly quantized
scales (T. Dettmers et al., "QLoRA", arXiv:2305.14314, section 3) are a nested `Quantized`.

Shape letters: M out features, N in features, G groups of a row, B bytes of a row of codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import FormError, ShapeError
from pennyweight.weights import one_row
from pennyweight.weights.by_rows import by_rows
from pennyweight.weights.dense import Dense
from pennyweight.weights.grid import Grid, ZeroKind, check_format, float_levels, group_count
from pennyweight.weights.packing import pack, packed_width, unpack
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, form


@form("integers")
class Integers(Weight):
    """Whole numbers of 1 to 8 bits, packed: the zeros of a grid.

    Args:
        packed: (M, B) uint8, see `pennyweight.weights.packing`.
        bits: 1 to 8.
        columns: N.

    Cost: M*N parameters at ``bits`` bits, rows padded to whole bytes; 2*M*N FLOPs a row. Exact.
    """

    tensors = ("packed",)
    packed: Tensor

    def __init__(self, packed: Tensor, *, bits: int, columns: int) -> None:
        check_packed(packed, bits, columns, "Integers")
        super().__init__(shape=(packed.shape[0], columns))
        self.bits = bits
        self.register_buffer("packed", packed)

    @classmethod
    def of(cls, codes: Tensor, bits: int) -> Integers:
        """``codes`` (M, N), whole numbers of ``bits`` bits."""
        return cls(pack(codes, bits), bits=bits, columns=codes.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self, x)

    def dense(self) -> Tensor:
        return unpack(self.packed, self.bits, self.shape[1]).float()

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        return unpack(self.packed[index], self.bits, self.shape[1]).float()

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "columns": self.shape[1]}

    def cost(self) -> Cost:
        count = self.shape[0] * self.shape[1]
        return Cost(params=count, bytes=self.packed.numel(), flops=2 * count)


def check_packed(packed: Tensor, bits: int, columns: int, where: str) -> None:
    """Refuse what is not a matrix of ``columns`` packed codes."""
    if not 1 <= bits <= 8:
        raise FormError(f"{where}: {bits} bits; give 1 to 8")
    if packed.dtype != torch.uint8:
        raise FormError(f"{where}: packed codes are {packed.dtype}; give uint8")
    if columns < 1 or packed.ndim != 2 or packed.shape[1] != packed_width(columns, bits):
        raise ShapeError(
            f"{where}: packed codes of shape {tuple(packed.shape)} are not rows of {columns} codes of {bits} bits; "
            f"give (out, {packed_width(columns, bits)})"
        )


@form("quantized")
class Quantized(Weight):
    """``W`` on a grid: packed codes, and a scale (and zero) for each group of each row.

    Args:
        packed: (M, B) uint8, see `pennyweight.weights.packing`.
        scale: (M, G), or (1, 1) for the whole matrix.
        zero: the shape of ``scale``, or None.
        bits: 1 to 8.
        columns: N.
        group_size: input features that share a scale, None for the whole row; the last group may be shorter.
        zero_kind: "none", "integer" or "float".
        format: "integer", "unsigned", "e4m3", "e5m2" or "e2m1".

    Scales and float zeros are trained, codes are not. Computes in float32 (float64 where the scales are).

    Cost: M*N codes packed, and the cost of scale and zero; 2*M*N FLOPs a row. Exact for a matrix that lies on the grid.
    """

    tensors = ("packed",)
    parts = ("scale", "zero")
    packed: Tensor
    scale: Weight
    zero: Weight | None

    def __init__(
        self,
        packed: Tensor,
        scale: Weight,
        zero: Weight | None = None,
        *,
        bits: int,
        columns: int,
        group_size: int | None = None,
        zero_kind: ZeroKind = "none",
        format: str = "integer",
    ) -> None:
        check_format(format, bits, zero_kind, "Quantized")
        check_packed(packed, bits, columns, "Quantized")
        super().__init__(shape=(packed.shape[0], columns))
        fitting = (self.shape[0], group_count(columns, group_size))
        if scale.shape != fitting and not (scale.shape == (1, 1) and group_size is None):
            raise ShapeError(
                f"Quantized: scale {scale.shape} for {self.shape} in groups of {group_size}; give {fitting}"
            )
        if (zero is None) != (zero_kind == "none") or (zero is not None and zero.shape != scale.shape):
            there = "none" if zero is None else f"one of shape {zero.shape}"
            raise ShapeError(f"Quantized: zero_kind {zero_kind} and scale {scale.shape}, but the zero is {there}")
        self.bits, self.group_size, self.format = bits, group_size, format
        self.zero_kind: ZeroKind = zero_kind
        self.register_buffer("packed", packed)
        self.scale, self.zero = scale, zero

    @classmethod
    def nearest(
        cls,
        matrix: Tensor,
        *,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = False,
        zero_kind: ZeroKind = "integer",
        format: str = "integer",
        search: int = 0,
        importance: Tensor | None = None,
        scale_dtype: torch.dtype = torch.float16,
        per_tensor: bool = False,
    ) -> Quantized:
        """``matrix`` (M, N) rounded to the nearest point of the grid that `Grid.fit` finds; the same arguments."""
        grid = Grid.fit(
            matrix,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            zero_kind=zero_kind,
            format=format,
            importance=importance,
            search=search,
            scale_dtype=scale_dtype,
            per_tensor=per_tensor,
        )
        return cls.from_codes(grid.codes(matrix.detach()), grid)

    @classmethod
    def from_codes(cls, codes: Tensor, grid: Grid) -> Quantized:
        """The weight with ``codes`` (M, N), whole numbers, on ``grid``."""
        if codes.ndim != 2:
            raise ShapeError(f"Quantized: codes of shape {tuple(codes.shape)} are not a matrix; give (out, in)")
        if grid.format in ("e4m3", "e5m2") and not bool(torch.isfinite(float_levels(grid.format)[codes.long()]).all()):
            raise FormError(f"Quantized: some codes are the NaN or infinity of {grid.format}; mend the codes")
        zero = grid.stored_zero
        if zero is None and grid.zero is not None:
            zero = Integers.of(grid.zero, grid.bits) if grid.zero_kind == "integer" else Dense(grid.zero)
        return cls(
            pack(codes, grid.bits),
            Dense(grid.scale) if grid.stored_scale is None else grid.stored_scale,
            zero,
            bits=grid.bits,
            columns=codes.shape[1],
            group_size=grid.group_size,
            zero_kind=grid.zero_kind,
            format=grid.format,
        )

    @property
    def grid(self) -> Grid:
        """Its grid, differentiable in scale and float zero."""
        zero = None if self.zero is None else self.zero.dense()
        return self._grid(self.scale.dense(), zero)

    def _grid(self, scale: Tensor, zero: Tensor | None) -> Grid:
        return Grid(self.bits, self.group_size, scale, zero, self.zero_kind, self.format, self.scale, self.zero)

    def codes(self) -> Tensor:
        """(M, N) uint8."""
        return unpack(self.packed, self.bits, self.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.scale.dtype, torch.float32)  # as `grid` computes

    def forward(self, x: Tensor) -> Tensor:
        once = self._has_routine and one_row.usable(x, self, f"{self.bits} bits")
        if once or (self._has_routine and one_row.expandable(x, self)):
            grid = [*self.scale.parameters(), *self.scale.buffers()]
            grid += [] if self.zero is None else [*self.zero.parameters(), *self.zero.buffers()]
            product = one_row.multiply if once else one_row.expanded
            return product(self, (self.packed, *grid), self._prepared, x)
        return by_rows(self, x)

    @property
    def _has_routine(self) -> bool:
        return self.scale.shape[0] == self.shape[0] and self.format in ("integer", "unsigned")

    def prepared(self) -> one_row.Prepared | None:
        return self._prepared() if self._has_routine else None

    def _prepared(self) -> one_row.Prepared:
        with torch.no_grad():
            scale, offset = self.grid.affine()
        group = self.shape[1] if self.group_size is None else self.group_size
        return one_row.packed(self.packed, scale, offset, columns=self.shape[1], bits=self.bits, group=group)

    def dense(self) -> Tensor:
        return self.grid.values(self.codes())

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        if self.scale.shape[0] == self.shape[0]:
            grid = self._grid(self.scale.rows(flat), None if self.zero is None else self.zero.rows(flat))
        else:
            grid = self.grid
        found = grid.values(unpack(self.packed[flat], self.bits, self.shape[1]))
        return found.view(*index.shape, self.shape[1])

    def settings(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "columns": self.shape[1],
            "group_size": self.group_size,
            "zero_kind": self.zero_kind,
            "format": self.format,
        }

    def cost(self) -> Cost:
        count = self.shape[0] * self.shape[1]
        grid = self.scale.cost() + (Cost() if self.zero is None else self.zero.cost())
        return Cost(count + grid.params, self.packed.numel() + grid.bytes, 2 * count)


def doubled(grid: Grid, *, bits: int = 8, group_size: int | None = None) -> Grid:
    """``grid`` with its scales, and float zeros, quantized in turn; what it says is what will be stored.

    Args:
        grid: as `Grid.fit` gives it.
        bits: bits of a scale or zero.
        group_size: groups of a row whose scales share a scale; None for all of a row.
    """

    def compact(held: Tensor) -> Quantized:
        # scales are rarely negative: the bit of their sign is better spent on their size
        format = "unsigned" if bool((held >= 0).all()) else "integer"
        return Quantized.nearest(held, bits=bits, group_size=group_size, symmetric=True, format=format, search=8)

    scale = compact(grid.scale)
    zero = compact(grid.zero) if grid.zero is not None and grid.zero_kind == "float" else None
    return dataclasses.replace(
        grid,
        scale=scale.dense().detach(),
        zero=grid.zero if zero is None else zero.dense().detach(),
        stored_scale=scale,
        stored_zero=zero,
    )
