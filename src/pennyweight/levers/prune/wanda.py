"""Wanda: weights are pruned by magnitude times input norm, compared within each output row.

Source: M. Sun, Z. Liu, A. Bair and J. Z. Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
arXiv:2306.11695. Differs from the source: nothing.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pennyweight.lever import ANY, between, lever, one_of, option
from pennyweight.solvers.inputs import prunable
from pennyweight.solvers.masks import DTYPES, pruned_mask, settings_worth_offering, sparse, sparsity_of
from pennyweight.solvers.scores import wanda
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight


@lever(
    "prune.wanda",
    reach="weight",
    needs=("second_moment",),
    paper="A Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695",
)
@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Zero the weights of smallest magnitude times input norm in each row; the others stay as they are.

    Equal to magnitude pruning within rows where all inputs have one norm.
    """

    sparsity: float | None = option(None, between(0, 1), "share of zeros in each row; none: what the pattern says")
    pattern: str | None = option(None, ANY, "kept:of, such as 2:4, in every run of inputs; none: anywhere in the row")
    dtype: str = option("float16", one_of(*DTYPES), "what the kept values are stored in")

    def __post_init__(self) -> None:
        sparsity_of(self.sparsity, self.pattern, "prune.wanda")

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        matrix = prunable(weight, "prune.wanda")
        sparsity = sparsity_of(self.sparsity, self.pattern, "prune.wanda")
        scores = wanda(matrix, statistics, "prune.wanda")
        pruned = pruned_mask(scores, sparsity, self.pattern, by_row=True, where="prune.wanda")
        return sparse(matrix, pruned, self.pattern, self.dtype)

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[Wanda]:
        for options in settings_worth_offering(shape):
            yield cls(**options)
