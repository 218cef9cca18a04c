"""Blocks: solved on the very grid of a GGUF block type, so that an export rounds nothing a second time.

The scales are searched under the inputs' second moments, the codes settled column by column as GPTQ does, then scales
are fitted again under the whole second moment with the codes held, and codes settled anew: each row keeps the best.

Source: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323 (the codes), and the block layouts of ggml (the grids). Differs from the sources: scales have two
levels, found as `pennyweight.solvers.block_types` says, and codes and scales are settled in turn.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.damage import Prediction, damage, sample
from pennyweight.errors import OptionError
from pennyweight.lever import at_least, lever, one_of, option
from pennyweight.solvers.block_types import TYPES, BlockType, chosen_rows, fit, refitted
from pennyweight.solvers.columns import solve_columns
from pennyweight.solvers.factor import factor_of
from pennyweight.solvers.inputs import matrix_of, second_moment_of, without_dead
from pennyweight.solvers.rounding import GridOptions, Rounding
from pennyweight.statistics import Statistics
from pennyweight.weights import Cost, Weight
from pennyweight.weights.grid import Grid
from pennyweight.weights.quantized import Quantized

_ROWS = 96  # a prediction is made from
_SEARCHED = 12  # ranges that it tries


@lever(
    "quantize.blocks",
    reach="weight",
    needs=("second_moment",),
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv:2210.17323",
)
@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Round on the grid of a GGUF block type; the codes go into a file for llama.cpp as they are."""

    type: str = option("Q4_0", one_of(*TYPES), "of block; those that end in K need inputs in multiples of 256")
    search: int = option(32, at_least(1), "ranges tried for each group of inputs")
    passes: int = option(2, at_least(1), "times the codes are settled, with scales fitted to them in between")
    damping: float = option(0.01, at_least(0), "added to the diagonal of the second moment, as a share of its mean")

    @torch.no_grad()
    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        """A `Quantized` weight on the grid; of each row the best of all passes under the second moment.

        Raises:
            OptionError: blocks of the type do not divide the inputs.
        """
        matrix = matrix_of(weight, "quantize.blocks")  # (M, N)
        kind = self._fitting(matrix.shape[1])
        moment = second_moment_of(statistics, matrix.shape[1], "quantize.blocks").float()
        energy = moment.diagonal()
        (matrix,) = without_dead([matrix], energy)
        grid = fit(kind, matrix, energy, search=self.search)
        factor = factor_of(
            statistics.need("second_moment", "quantize.blocks"), damping=self.damping, order="descending",
            where="quantize.blocks",
        )  # fmt: skip
        best: tuple[Tensor, Grid] | None = None
        least = matrix.new_full((matrix.shape[0],), torch.inf)
        for _ in range(self.passes):
            assert factor.order is not None
            columns = matrix.T[factor.order]  # (N, M), a copy: overwritten
            options = GridOptions(kind.bits, kind.size, grid.zero_kind, kind.format)
            rule = Rounding(
                options, [matrix.shape[0]], matrix.shape[1], grids=[grid], order=factor.order, device=matrix.device
            )
            solve_columns(columns, factor.lower, rule)
            ((codes, grid),) = rule.results()
            for tried in (grid, refitted(kind, matrix, codes, grid, moment)):
                off = matrix - tried.values(codes)
                loss = ((off @ moment) * off).sum(1)
                better = loss < least
                best = (codes, tried) if best is None else (
                    torch.where(better[:, None], codes, best[0]), chosen_rows(better, tried, best[1])
                )  # fmt: skip
                least = torch.where(better, loss, least)
            assert best is not None
            grid = best[1]
        assert best is not None
        return Quantized.from_codes(*best)

    def _fitting(self, columns: int) -> BlockType:
        kind = TYPES[self.type]
        if columns % kind.span:
            fitting = ", ".join(name for name, other in TYPES.items() if columns % other.span == 0)
            raise OptionError(
                f"quantize.blocks: type {self.type} stores {kind.span} inputs at a time, which does not divide "
                f"{columns}; give {fitting or 'another lever: no type does'}"
            )
        return kind

    @classmethod
    def predict(cls, settings: Sequence[Blocks], weight: Weight, statistics: Statistics) -> list[Prediction]:
        """Exact costs, and the damage of some rows solved in one pass, scaled by what all rows count for."""
        part, of_part = sample(weight, statistics, _ROWS, seed=0)
        rows, some = weight.shape[0], part.shape[0]
        share = some / rows
        if statistics.gradient is not None and of_part.gradient is not None:
            share = float(of_part.gradient.sum() / statistics.gradient.sum().clamp_min(1e-30))
        found = []
        for setting in settings:
            quick = replace(setting, passes=1, search=min(setting.search, _SEARCHED))
            solved = quick.solve(part, of_part)
            cost = solved.cost()  # every row costs the same
            whole = Cost(*(number * rows // some for number in (cost.params, cost.bytes, cost.flops)))
            found.append(Prediction(setting, whole, damage(solved.dense() - part.dense(), of_part) / max(share, 1e-12)))
        return found

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[Blocks]:
        for name, kind in TYPES.items():
            if shape[1] % kind.span == 0:
                yield cls(type=name)
