"""Magnitude pruning: the smallest weights go.

Row 196. Source: M. Zhu and S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", arXiv:1710.01878. This lever prunes once; `pennyweight.levers.prune.gradual` is the paper's schedule for
training loops. Differs from the source: N:M patterns as well.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pennyweight.lever import ANY, between, lever, one_of, option
from pennyweight.solvers.inputs import prunable
from pennyweight.solvers.masks import DTYPES, pruned_mask, settings_worth_offering, sparse, sparsity_of
from pennyweight.solvers.scores import magnitude
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight


@lever(
    "prune.magnitude",
    reach="weight",
    row=196,
    paper="To prune, or not to prune: exploring the efficacy of pruning for model compression, arXiv:1710.01878",
)
@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Zero the smallest weights of the matrix; needs no data."""

    sparsity: float | None = option(None, between(0, 1), "share of zeros; none: what the pattern says")
    pattern: str | None = option(
        None, ANY, "kept:of, such as 2:4, in every run of inputs; none: anywhere in the matrix"
    )
    dtype: str = option("float16", one_of(*DTYPES), "what the kept values are stored in")

    def __post_init__(self) -> None:
        sparsity_of(self.sparsity, self.pattern, "prune.magnitude")

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        matrix = prunable(weight, "prune.magnitude")
        sparsity = sparsity_of(self.sparsity, self.pattern, "prune.magnitude")
        pruned = pruned_mask(magnitude(matrix), sparsity, self.pattern, by_row=False, where="prune.magnitude")
        return sparse(matrix, pruned, self.pattern, self.dtype)

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[Magnitude]:
        for options in settings_worth_offering(shape):
            yield cls(**options)
