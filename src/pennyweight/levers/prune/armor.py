"""ARMOR: a 2:4 core between two small block-diagonal matrices, fitted together.

Row 110. Source: L. Liu et al., "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization",
arXiv:2510.05528; see `pennyweight.solvers.armor` for the method. Differs from the source: the block may be chosen from
the shape, as large as a share of the parameters allows (128 takes 5 % of a 3,584-wide layer and 44 % of a 576-wide
one); A and B may be solved exactly, which takes tens of iterations where Adam takes thousands.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from pennyweight.errors import OptionError
from pennyweight.lever import ANY, at_least, between, lever, one_of, option
from pennyweight.solvers.armor import Fit
from pennyweight.solvers.inputs import matrix_of, second_moment_of
from pennyweight.solvers.masks import DTYPES, check_width, parse_pattern
from pennyweight.statistics import Statistics
from pennyweight.weights import BlockDiagonal, NofM, Product, Weight

_NAME = "prune.armor"


@lever(
    _NAME,
    reach="weight",
    row=110,
    needs=("second_moment",),
    paper="ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization, arXiv:2510.05528",
)
@dataclass(frozen=True, kw_only=True)
class ARMOR:
    """Prune to N:M between two block-diagonal matrices that make good for it.

    With no iterations the NoWag pattern with the matrix's own values.
    """

    pattern: str = option("2:4", ANY, "kept:of in every run of inputs")
    block: int | None = option(None, at_least(1), "side of the diagonal blocks; none: the largest within overhead")
    overhead: float = option(0.05, between(0, 1), "without block: most parameters of the two, as a share of the matrix")
    iterations: int = option(300, at_least(0), "turns of moving the two, and of solving one run a pair of blocks")
    solver: Literal["exact", "adam"] = option(
        "exact", one_of("exact", "adam"), "how the two are moved: to their least squares, or by Adam with the core"
    )
    rate: float = option(1e-4, at_least(0), "for adam: learning rate")
    patience: int = option(100, at_least(1), "iterations without the loss falling after which it stops")
    seed: int = option(0, at_least(0), "of the runs drawn")
    dtype: str = option("float16", one_of(*DTYPES), "what all values are stored in")

    def __post_init__(self) -> None:
        parse_pattern(self.pattern, _NAME)
        if self.block is not None and self.overhead != 0.05:
            raise OptionError(f"{_NAME}: overhead has no effect with block = {self.block}; leave one of the two out")
        if self.solver == "exact" and self.rate != 1e-4:
            raise OptionError(f"{_NAME}: rate has no effect with solver exact; give solver adam, or leave it out")

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        matrix = matrix_of(weight, _NAME)
        kept, of = parse_pattern(self.pattern, _NAME)
        check_width(matrix.shape[1], self.pattern, _NAME)
        energy = second_moment_of(statistics, matrix.shape[1], _NAME).diagonal()
        block = self.block_of((matrix.shape[0], matrix.shape[1]))
        fit = Fit(matrix, energy, kept=kept, of=of, block=block)
        found = fit.run(
            self.iterations,
            rate=self.rate if self.solver == "adam" else None,
            generator=torch.Generator(matrix.device).manual_seed(self.seed),
            patience=self.patience,
        )
        dtype = DTYPES[self.dtype]
        return Product(
            BlockDiagonal(found.left.to(dtype)),
            NofM.keep(found.core.to(dtype), found.mask, n=kept, m=of),
            BlockDiagonal(found.right.to(dtype)),
        )

    def block_of(self, shape: tuple[int, int]) -> int:
        """The side of the blocks for a matrix of ``shape``: a multiple of the pattern's run.

        Raises:
            OptionError: none fits.
        """
        _, of = parse_pattern(self.pattern, _NAME)
        fitting = _blocks(shape, of)
        if self.block is not None:
            if self.block not in fitting:
                raise OptionError(
                    f"{_NAME}: block {self.block} does not fit a {shape[0]}x{shape[1]} matrix at {self.pattern}; "
                    f"choose {', '.join(map(str, fitting)) or 'another lever'}"
                )
            return self.block
        if not fitting:
            raise OptionError(f"{_NAME}: no block fits a {shape[0]}x{shape[1]} matrix at {self.pattern}; leave it out")
        within = [block for block in fitting if block * sum(shape) <= self.overhead * shape[0] * shape[1]]
        return max(within, default=fitting[0])

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[ARMOR]:
        if _blocks(shape, 4):
            yield cls()


def _blocks(shape: tuple[int, int], of: int) -> list[int]:
    """Sides that divide both of ``shape`` and hold whole runs of ``of``, up to 128, increasing."""
    sides = range(of, min(*shape, 128) + 1, of)
    return [side for side in sides if shape[0] % side == 0 and shape[1] % side == 0]
