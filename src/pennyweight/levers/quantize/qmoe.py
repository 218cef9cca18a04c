"""QMoE: ternary or 2-bit GPTQ over many experts at once, ternary codes in a variable-length dictionary code.

Row 36. Source: E. Frantar and D. Alistarh, "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models",
arXiv:2310.16795: each row has the values minimum, zero and maximum, so that most weights become zero; errors are made
good by later columns (GPTQ, damping 0.1, columns in their order), all experts of a shape in one batch; an expert that
saw no tokens, or whose second moment is singular, is rounded to nearest. The code is `DictionaryCoded`. Differs from
the source: columns are settled on the transposed matrix; the dictionary is made for the zeros that are there. Serves
any matrix, of an expert or not; rows under a few hundred inputs have too few zeros to come below one bit.

Shape letters: E experts, M out features, N in features, L levels of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.errors import DataError, OptionError, ShapeError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.solvers.factor import factorize
from pennyweight.solvers.inputs import matrix_of, second_moment_of, without_dead
from pennyweight.statistics import Statistics
from pennyweight.weights import DictionaryCoded, Grid, Quantized, Weight

_BLOCK = 128


@torch.no_grad()
def solve_levels(columns: Tensor, lower: Tensor, levels: Tensor) -> Tensor:
    """Codes (E, N, M) uint8 of the nearest levels, each error made good by later columns, all experts at once.

    Args:
        columns: (E, N, M) float32, the transposed matrices. Overwritten by the errors made.
        lower: (E, N, N), `Factor.lower` of each.
        levels: (E, M, L), ascending in each row.
    """
    width = columns.shape[1]
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    middles = (levels[..., 1:] + levels[..., :-1]) / 2  # (E, M, L - 1)
    for start in range(0, width, _BLOCK):
        stop = min(width, start + _BLOCK)
        for column in range(start, stop):
            values = columns[:, column]  # (E, M)
            if column > start:
                values -= torch.bmm(lower[:, column : column + 1, start:column], columns[:, start:column])[:, 0]
            code = (values[..., None] > middles).sum(-1)
            codes[:, column] = code
            values -= levels.gather(-1, code[..., None])[..., 0]
        columns[:, stop:].baddbmm_(lower[:, stop:, start:stop], columns[:, start:stop], alpha=-1)
    return codes


@lever(
    "quantize.qmoe",
    reach="weight",
    row=36,
    needs=("second_moment",),
    paper="QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models, arXiv:2310.16795",
)
@dataclass(frozen=True, kw_only=True)
class QMoE:
    """Ternary weights under one bit each by GPTQ and a dictionary code, or 2-bit ones; batched over experts."""

    bits: float = option(1.5, one_of(1.5, 2), "1.5: minimum, zero and maximum of a row, coded; 2: four values, packed")
    zeros: float | None = option(
        None, between(0.334, 0.999), "share of zeros the dictionary is made for; none: as the codes have them"
    )
    damping: float = option(0.1, at_least(0), "added to the diagonal of the second moment, as a share of its mean")

    def __post_init__(self) -> None:
        if self.bits == 2 and self.zeros is not None:
            raise OptionError(f"quantize.qmoe: zeros = {self.zeros} has no effect on 2-bit weights; give bits = 1.5")

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        return self.solve_experts([weight], [statistics])[0]

    @torch.no_grad()
    def solve_experts(self, weights: Sequence[Weight], statistics: Sequence[Statistics]) -> list[Weight]:
        """Weights of one shape, each with its own inputs, in one batch; the same result as `solve` on each.

        Raises:
            ShapeError: shapes that differ, or not as many statistics as weights.
        """
        shapes = {weight.shape for weight in weights}
        if len(shapes) != 1 or len(statistics) != len(weights):
            raise ShapeError(
                f"quantize.qmoe: {len(weights)} weights of shapes {sorted(shapes)} and {len(statistics)} statistics; "
                "give weights of one shape, and statistics for each"
            )
        matrices, lowers = [], []
        for weight, known in zip(weights, statistics, strict=True):
            matrix = matrix_of(weight, "quantize.qmoe")
            moment = second_moment_of(known, matrix.shape[1], "quantize.qmoe")
            lower = self._lower(moment)
            if lower is None:  # round to nearest: no error moves
                lower = torch.eye(matrix.shape[1])
            else:
                (matrix,) = without_dead([matrix], moment.diagonal())
            matrices.append(matrix)
            lowers.append(lower)
        grids = [Grid.fit(matrix, bits=2) for matrix in matrices] if self.bits == 2 else None
        levels = torch.stack([_extremes(m) for m in matrices] if grids is None else [_values(g) for g in grids])
        columns = torch.stack([matrix.T for matrix in matrices]).contiguous()
        codes = solve_levels(columns, torch.stack(lowers), levels).mT
        if grids is not None:
            return [Quantized.from_codes(found, grid) for found, grid in zip(codes, grids, strict=True)]
        names = torch.tensor([1, 0, 2])  # ascending levels are minimum, zero, maximum
        zeros = None if self.zeros is None else round(1000 * self.zeros)
        return [
            DictionaryCoded.encode(names[found.int()], level[:, ::2].half(), zeros=zeros)
            for found, level in zip(codes, levels, strict=True)
        ]

    def _lower(self, moment: Tensor) -> Tensor | None:
        """`Factor.lower`, or None where the second moment is singular."""
        try:
            return factorize(moment, damping=self.damping, where="quantize.qmoe").lower
        except DataError:
            return None

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[QMoE]:
        yield cls()


def _extremes(matrix: Tensor) -> Tensor:
    """(M, 3) minimum (at most 0), zero and maximum (at least 0) of each row, as float16 stores them."""
    low, high = matrix.amin(1).clamp_max(0), matrix.amax(1).clamp_min(0)
    return torch.stack([low, torch.zeros_like(low), high], dim=1).half().float()


def _values(grid: Grid) -> Tensor:
    """(M, L) the values that the codes of a grid of whole rows stand for."""
    codes = torch.arange(2**grid.bits, dtype=torch.uint8).expand(grid.scale.shape[0], -1)
    return grid.values(codes).float()
