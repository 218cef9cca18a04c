"""Rounding as a rule of the column solver: the nearest code of a grid, fitted before or on the way.

Shape letters: M out features (rows of several matrices may be stacked), N in features, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.weights.grid import Grid
from pennyweight.weights.quantized import doubled

#: How wide scales and float zeros are stored: in float16, or quantized in turn ("double quantization").
SCALE_BITS = (4, 5, 6, 7, 8, 16)
#: Floating-point formats, and the bits of each.
FLOATS = {"e4m3": 8, "e5m2": 8, "e2m1": 4, "e3m0": 4, "nl4": 4}


@dataclass(frozen=True)
class GridOptions:
    """The options of a grid, as every quantizing lever has them."""

    bits: int
    group_size: int | None
    zero: str = "integer"
    format: str = "integer"
    search: int = 0
    scale_bits: int = 16

    def check(self, where: str) -> None:
        """Refuse options that do not go together.

        Raises:
            OptionError: in the words of the lever named ``where``.
        """
        if self.format in FLOATS and self.bits != FLOATS[self.format]:
            raise OptionError(
                f"{where}: bits = {self.bits} for format {self.format}; give bits = {FLOATS[self.format]}"
            )
        if self.format in FLOATS and self.zero != "none":
            raise OptionError(
                f"{where}: zero = {self.zero!r} for format {self.format}, which has none; give zero = 'none'"
            )

    def fit(self, matrix: Tensor, importance: Tensor | None = None) -> Grid:
        """The grid of a whole matrix (M, N), its scales as they will be stored."""
        grid = self._fit(matrix, self.group_size, importance)
        return grid if self.scale_bits == 16 else doubled(grid, bits=self.scale_bits)

    def fit_group(self, columns: Tensor, importance: Tensor | None = None) -> Grid:
        """The grid of one group (M, S)."""
        return self._fit(columns, None, importance)

    def _fit(self, matrix: Tensor, group_size: int | None, importance: Tensor | None) -> Grid:
        return Grid.fit(
            matrix,
            bits=self.bits,
            group_size=group_size,
            symmetric=self.zero == "none",
            zero_kind="float" if self.zero == "float" else "integer",
            format=self.format,
            importance=importance,
            search=self.search,
        )


class Rounding:
    """Rounds each column to the nearest code of its group's grid.

    Args:
        options: of the grid.
        heights: rows of each of the stacked matrices.
        width: N.
        grids: one a matrix, fitted beforehand; or None to fit each group when it is reached, to the columns as the
            errors before them have left them.
        order: (N,) the column of the matrix that each solved column is, or None for the same.
        importance: (N,) in the order of the matrix: how much the squared error of an input counts when a grid is
        fitted. device: where the matrices lie.
    """

    def __init__(
        self,
        options: GridOptions,
        heights: list[int],
        width: int,
        *,
        grids: list[Grid] | None,
        order: Tensor | None = None,
        importance: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        assert grids is not None or order is None, "groups fitted on the way are groups of neighbors"
        size = width if options.group_size is None else min(options.group_size, width)
        columns = torch.arange(width) if order is None else order.cpu()
        self.options, self.heights, self.order, self.importance = options, heights, order, importance
        self.grids = grids
        self.stretch = size if grids is None else width
        self._group = columns.div(size, rounding_mode="floor").tolist()
        self._groups: list[_Integers | _Floats] = [] if grids is None else _groups(_stacked(grids))
        self._fitted: list[Grid] = []
        self._codes = torch.empty(width, sum(heights), dtype=torch.uint8, device=device)

    def open(self, start: int, stop: int, columns: Tensor) -> None:
        if self.grids is None:
            importance = None if self.importance is None else self.importance[start:stop]
            self._fitted.append(self.options.fit_group(columns.T, importance))
            self._groups += _groups(self._fitted[-1])

    def settle(self, column: int, values: Tensor) -> None:
        self._groups[self._group[column]].settle(values, self._codes[column])

    def results(self) -> list[tuple[Tensor, Grid]]:
        """Codes (M, N) uint8 and grid of each matrix, once every column is settled."""
        codes = self._codes
        if self.order is not None:
            codes = torch.empty_like(codes).index_copy_(0, self.order, codes)
        rows = spans(self.heights)
        grids = self.grids or [_slice(self._fitted, span, self.options.group_size) for span in rows]
        return [(codes[:, span].T.contiguous(), grid) for span, grid in zip(rows, grids, strict=True)]


def spans(heights: list[int]) -> list[slice]:
    """The rows of each of the stacked matrices."""
    ends = list(accumulate(heights))
    return [slice(end - height, end) for end, height in zip(ends, heights, strict=True)]


def _stacked(grids: list[Grid]) -> Grid:
    """One grid over the rows of all."""
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return replace(
        grids[0],
        scale=torch.cat([grid.scale for grid in grids]),
        zero=torch.cat(zeros) if zeros else None,
        stored_scale=None,
        stored_zero=None,
    )


def _slice(groups: list[Grid], rows: slice, group_size: int | None) -> Grid:
    """The grid of some ``rows``, out of the grids of each group."""
    zeros = [group.zero[rows] for group in groups if group.zero is not None]
    scale = torch.cat([group.scale[rows] for group in groups], dim=1)
    return replace(groups[0], group_size=group_size, scale=scale, zero=torch.cat(zeros, dim=1) if zeros else None)


def _groups(grid: Grid) -> list[_Integers | _Floats]:
    kind = _Floats if grid.format in FLOATS else _Integers
    return [kind(grid, group) for group in range(grid.groups)]


class _Integers:
    """One group of an integer grid, ready to settle columns in as few passes as can be."""

    def __init__(self, grid: Grid, group: int) -> None:
        self.scale = grid.scale[:, group].float().contiguous()  # (M,), as are all
        zero = torch.zeros_like(self.scale) if grid.zero is None else grid.zero[:, group].float().contiguous()
        self.shift = zero if grid.zero_kind == "float" else None
        half = 2.0 ** (grid.bits - 1)
        lowest = {"none": torch.full_like(zero, -half), "integer": -zero, "float": torch.zeros_like(zero)}
        self.low = lowest[grid.zero_kind]
        self.high = self.low + (2.0**grid.bits - 1)

    def settle(self, values: Tensor, codes: Tensor) -> None:
        if self.shift is not None:
            values.sub_(self.shift)
        level = values.div(self.scale).round_()
        torch.clamp(level, self.low, self.high, out=level)
        values.addcmul_(level, self.scale, value=-1)
        codes.copy_(level.sub_(self.low))


class _Floats:
    """One group of a floating-point grid."""

    def __init__(self, grid: Grid, group: int) -> None:
        self.grid = replace(grid, group_size=None, scale=grid.scale[:, group : group + 1].contiguous())

    def settle(self, values: Tensor, codes: Tensor) -> None:
        found = self.grid.codes(values[:, None])
        codes.copy_(found[:, 0])
        values.sub_(self.grid.values(found)[:, 0])
