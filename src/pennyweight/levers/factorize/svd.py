"""Low-rank factors by singular value decomposition, plain or weighted by the activations.

Sources: the plain one is Eckart and Young's, see `pennyweight.weights.low_rank`; X. Wang et al., "SVD-LLM:
Truncation-aware Singular Value Decomposition for Large Language Model Compression", arXiv:2403.07378: with H = S S^T
the second moment of the inputs, truncating the SVD of W S loses exactly the discarded singular values in the outputs.
Differs from the source: see `pennyweight.solvers.low_rank`; factors are balanced for 16-bit storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.damage import Prediction, damage
from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.solvers.inputs import matrix_of, second_moment_of
from pennyweight.solvers.low_rank import check_one_size, damped, low_rank
from pennyweight.solvers.masks import DTYPES
from pennyweight.statistics import Statistics
from pennyweight.weights import LowRank, Weight


@lever(
    "factorize.svd",
    reach="weight",
    needs=("second_moment",),
    paper="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression, "
    "arXiv:2403.07378",
)
@dataclass(frozen=True, kw_only=True)
class SVD:
    """Keep the largest singular directions, of the outputs on the calibration data or of the matrix itself.

    Exact at full rank, up to rounding in ``dtype``.
    """

    rank: int | None = option(None, at_least(1), "directions kept; none: what density says")
    density: float | None = option(
        None, between(0, 1), "parameters of the factors, as a share of the matrix; sets the rank"
    )
    whiten: bool = option(
        True, one_of(True, False), "weight errors by the inputs' second moment; false: plain, no data"
    )
    damping: float = option(1e-4, at_least(0), "added to the diagonal of the second moment, as a share of its mean")
    dtype: str = option("float16", one_of(*DTYPES), "what the factors are stored in")

    def __post_init__(self) -> None:
        check_one_size(self.rank, self.density, "factorize.svd")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that these settings read."""
        return frozenset({"second_moment"} if self.whiten else ())

    def rank_for(self, shape: tuple[int, int]) -> int:
        """The rank for a matrix of ``shape``.

        Raises:
            OptionError: beyond the rank a matrix of this shape can have, or a density that leaves no rank.
        """
        full = min(shape)
        if self.rank is not None:
            if self.rank > full:
                raise OptionError(
                    f"factorize.svd: rank = {self.rank} for a {shape[0]}x{shape[1]} matrix; give at most {full}"
                )
            return self.rank
        assert self.density is not None
        rank = int(self.density * shape[0] * shape[1] / sum(shape) + 1e-9)
        if rank == 0:
            least = sum(shape) / (shape[0] * shape[1])
            raise OptionError(
                f"factorize.svd: density = {self.density} leaves a {shape[0]}x{shape[1]} matrix no rank; "
                f"give at least {least:.4f}"
            )
        return rank

    @torch.no_grad()
    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        return self._rounded(*self._factors(matrix_of(weight, "factorize.svd"), statistics))

    def _factors(self, matrix: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """(M, R) and (R, N) in double, in order: the first r directions of them are the factors of rank r."""
        rank = self.rank_for((matrix.shape[0], matrix.shape[1]))
        moment = None
        if self.whiten:
            moment = damped(second_moment_of(statistics, matrix.shape[1], "factorize.svd"), self.damping)
        return low_rank(matrix, rank, moment, "factorize.svd")

    def _rounded(self, up: Tensor, down: Tensor) -> LowRank:
        dtype = DTYPES[self.dtype]
        return LowRank(up.to(dtype), down.to(dtype))

    @classmethod
    @torch.no_grad()
    def predict(cls, settings: Sequence[SVD], weight: Weight, statistics: Statistics) -> list[Prediction]:
        """Predictions from the whole matrix, factorized once for all ranks: a few of its rows have another rank."""
        matrix = matrix_of(weight, "factorize.svd")
        shape = (matrix.shape[0], matrix.shape[1])
        largest: dict[tuple[bool, float], SVD] = {}
        for setting in settings:
            seen = (setting.whiten, setting.damping)
            largest[seen] = max(setting, largest.get(seen, setting), key=lambda one: one.rank_for(shape))
        factors = {seen: setting._factors(matrix, statistics) for seen, setting in largest.items()}
        found = []
        for setting in settings:
            up, down = factors[setting.whiten, setting.damping]
            rank = setting.rank_for(shape)
            solved = setting._rounded(up[:, :rank], down[:rank])
            found.append(Prediction(setting, solved.cost(), damage(solved.dense().float() - matrix, statistics)))
        return found

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[SVD]:
        for density in (0.3, 0.5, 0.7, 0.85):
            if density * min(shape) * max(shape) >= sum(shape):
                yield cls(density=density)
