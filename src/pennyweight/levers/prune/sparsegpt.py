"""SparseGPT: pruning column by column, each error made good by the columns still to come; quantized on the way if
asked.

Source: E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv:2301.00774.
Differs from the source: the share of zeros is met exactly (the official code zeroes one weight more in each block).
With ``bits`` and no pattern, every row of a block keeps as many weights, so that the kept ones are groups that share
a scale; their grid is fitted to them alone. With a pattern the grid is fitted to the matrix beforehand, as in the
official code.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.lever import ANY, at_least, between, lever, one_of, option
from pennyweight.solvers.columns import solve_columns
from pennyweight.solvers.factor import factor_of
from pennyweight.solvers.inputs import prunable, second_moment_of, without_dead
from pennyweight.solvers.masks import (
    DTYPES,
    check_width,
    parse_pattern,
    settings_worth_offering,
    share,
    sparse,
    sparsity_of,
)
from pennyweight.solvers.pruning import Pruning
from pennyweight.solvers.rounding import GridOptions, Rounding
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight
from pennyweight.weights.grid import Grid
from pennyweight.weights.quantized import Quantized
from pennyweight.weights.sparse import NofM, Sparse


@lever(
    "prune.sparsegpt",
    reach="weight",
    needs=("second_moment",),
    paper="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv:2301.00774",
)
@dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """Zero weights column by column; the columns still to come make good each error on the calibration data.

    The identity at sparsity 0, but for inputs that are zero throughout the calibration data.
    """

    sparsity: float | None = option(None, between(0, 1), "share of zeros in each block; none: what the pattern says")
    pattern: str | None = option(None, ANY, "kept:of, such as 2:4, in every run of inputs; none: anywhere in the block")
    block: int = option(128, at_least(1), "input features among which zeros are chosen, where there is no pattern")
    bits: int | None = option(
        None, between(1, 8), "bits of the kept values, rounded in the same pass; none: not rounded"
    )
    group_size: int | None = option(None, at_least(1), "with bits: inputs that share a scale; none: block, or the row")
    zero: str = option("integer", one_of("none", "integer", "float"), "with bits: zero of a group; none: symmetric")
    search: int = option(0, at_least(0), "with bits: ranges tried for each group; 0: from minimum to maximum")
    damping: float = option(0.01, at_least(0), "added to the diagonal of the second moment, as a share of its mean")
    dtype: str = option("float16", one_of(*DTYPES), "what kept values are stored in, where they are not rounded")

    def __post_init__(self) -> None:
        where = "prune.sparsegpt"
        sparsity_of(self.sparsity, self.pattern, where)
        if self.bits is None:
            for name, default in (("group_size", None), ("zero", "integer"), ("search", 0)):
                if getattr(self, name) != default:
                    raise OptionError(f"{where}: {name} has no effect without bits; give bits, say 4")
            return
        if self.dtype != "float16":
            raise OptionError(f"{where}: dtype has no effect with bits = {self.bits}; leave one of the two out")
        if self.pattern is None and self.group_size not in (None, self.block):
            raise OptionError(
                f"{where}: group_size = {self.group_size} with block = {self.block}: without a pattern, "
                "what a row keeps of a block shares a scale; give block alone"
            )
        of = 1 if self.pattern is None else parse_pattern(self.pattern, where)[1]
        if self.group_size is not None and self.group_size % of:
            raise OptionError(
                f"{where}: group_size = {self.group_size} cuts the runs of {of} of pattern {self.pattern}; "
                f"give a multiple of {of}"
            )

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        return self.solve_group([weight], statistics)[0]

    @torch.no_grad()
    def solve_group(self, weights: Sequence[Weight], statistics: Statistics) -> list[Weight]:
        """Several weights that read the same inputs, solved in one pass over their stacked rows.

        The same result as `solve` on each.
        """
        where = "prune.sparsegpt"
        matrices = [prunable(weight, where) for weight in weights]
        width = matrices[0].shape[1]
        self._check_width(width)
        moment = second_moment_of(statistics, width, where)
        factor = factor_of(moment, damping=self.damping, where=where)
        matrices = without_dead(matrices, moment.diagonal())
        heights = [matrix.shape[0] for matrix in matrices]
        pattern = None if self.pattern is None else parse_pattern(self.pattern, where)
        sparsity = sparsity_of(self.sparsity, self.pattern, where)
        block = min(self.block, width)
        nothing_kept = share(sparsity, block) == block
        rounding = None if self.bits is None or nothing_kept else self._rounding(matrices, moment.diagonal())
        rule = Pruning(
            factor.diagonal,
            heights,
            sparsity=sparsity,
            pattern=pattern,
            block=block,
            by_row=rounding is not None,
            rounding=rounding,
        )
        solve_columns(torch.cat(matrices).T.contiguous(), factor.lower, rule)
        pruned = torch.split(rule.pruned.T, heights)
        if rounding is None:
            kept = torch.split(rule.values.T, heights)
            return [sparse(k, p, self.pattern, self.dtype) for k, p in zip(kept, pruned, strict=True)]
        made = [
            _holding(codes, grid, p.contiguous(), pattern)
            for (codes, grid), p in zip(rounding.results(), pruned, strict=True)
        ]
        return list(made)

    def _check_width(self, width: int) -> None:
        if self.pattern is not None:
            check_width(width, self.pattern, "prune.sparsegpt")
        elif self.bits is not None and self.block < width and width % self.block:
            fitting = [str(n) for n in (256, 128, 96, 64, 48, 32, 16) if width % n == 0]
            remedy = f"choose {', '.join(fitting)}" if fitting else f"choose {width}"
            raise OptionError(
                f"prune.sparsegpt: block {self.block} does not divide the {width} inputs, "
                f"which bits needs without a pattern; {remedy}"
            )

    def _rounding(self, matrices: Sequence[Tensor], energy: Tensor) -> Rounding:
        assert self.bits is not None
        group_size = self.block if self.pattern is None else self.group_size
        options = GridOptions(self.bits, group_size, self.zero, search=self.search)
        heights = [matrix.shape[0] for matrix in matrices]
        grids = None if self.pattern is None else [options.fit(matrix) for matrix in matrices]
        return Rounding(options, heights, energy.numel(), grids=grids, device=energy.device)

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[SparseGPT]:
        for options in settings_worth_offering(shape):
            yield cls(**options)
        for block in (64, 96, 128):
            if shape[1] % block == 0:
                for bits in (3, 4):
                    yield cls(sparsity=0.5, bits=bits, block=block)
                return


def _holding(codes: Tensor, grid: Grid, pruned: Tensor, pattern: tuple[int, int] | None) -> Weight:
    """The sparse weight (M, N) whose kept values are those ``codes`` on that ``grid``."""
    if pattern is not None:
        n, m = pattern
        runs = NofM.keep(codes.float(), ~pruned, n=n, m=m)
        group_size = None if grid.group_size is None else grid.group_size // m * n
        return runs.with_values(_rounded(runs.values, replace(grid, group_size=group_size)))
    places = Sparse.keep(codes.float(), ~pruned)
    assert places.values is not None, "with nothing kept there is nothing to round"
    # row after row of groups that keep as many: one long row of groups
    one_row = replace(
        grid,
        group_size=places.kept // grid.scale.numel(),
        scale=grid.scale.view(1, -1),
        zero=None if grid.zero is None else grid.zero.view(1, -1),
    )
    return places.with_values(_rounded(places.values, one_row))


def _rounded(codes: Weight, grid: Grid) -> Quantized:
    return Quantized.from_codes(codes.dense().to(torch.uint8), grid)
