"""LoRC: a quantized weight and the low-rank part of what rounding lost.

Row 118. Source: Z. Yao, X. Wu, C. Li, S. Youn and Y. He, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs
from Comprehensive Study to Low Rank Compensation", arXiv:2303.08302: the truncated SVD of W - Q is kept beside Q, its
factors sharing the singular values evenly. Differs from the source: the part kept may be the one that matters most to
the outputs on calibration data (``weighted``); 8-bit factors have one scale for each direction.

Rounding errors are nearly white, so that a rank r takes off little more than its share of the squared error; on narrow
layers the bytes are better spent on finer groups (`quantize.gptq`), which the planner sees in its prices.

Shape letters: M out features, N in features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pennyweight.damage import Prediction, by_solving
from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.solvers.inputs import matrix_of, second_moment_of, without_dead
from pennyweight.solvers.low_rank import damped, low_rank
from pennyweight.solvers.rounding import SCALE_BITS, GridOptions
from pennyweight.statistics import Statistics
from pennyweight.weights import Dense, LowRank, Product, Quantized, Sum, Weight


def compensation(residual: Tensor, rank: int, *, moment: Tensor | None, factor_bits: int, where: str) -> Weight:
    """The weight of rank ``rank`` that gives back most of ``residual`` (M, N).

    Args:
        residual: (M, N), what rounding lost: the matrix minus the rounded one.
        rank: R, at most the smaller side.
        moment: (N, N) positive definite second moment of the inputs; None: the residual itself is what counts.
        factor_bits: 16 (float16) or 8 (integers, a float16 scale for each direction of each factor).
        where: named in errors.
    """
    up, down = (factor.float() for factor in low_rank(residual, rank, moment, where))
    if factor_bits == 16:
        return LowRank(up.half(), down.half())
    # by directions: their sizes differ more than entries within one, and there are fewer of them than rows
    held, kept = (Quantized.nearest(factor, bits=8, symmetric=True) for factor in (up.T.contiguous(), down))
    return Product(held.T, kept)


@lever(
    "quantize.lorc",
    reach="weight",
    row=118,
    needs=("second_moment",),
    paper="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank "
    "Compensation, arXiv:2303.08302",
)
@dataclass(frozen=True, kw_only=True)
class LoRC:
    """Quantize, and keep a low-rank part of the rounding error beside it.

    With 16-bit factors of full rank exact up to their rounding, but for inputs that are always zero.
    """

    method: Literal["gptq", "rtn"] = option("gptq", one_of("gptq", "rtn"), "how the weight is rounded")
    bits: int = option(4, between(1, 8), "bits of a code")
    group_size: int | None = option(128, at_least(1), "input features that share a scale; none: the whole row")
    zero: str = option("integer", one_of("none", "integer", "float"), "zero of a group; none: symmetric")
    format: str = option("integer", one_of("integer", "e4m3", "e5m2", "e2m1"), "what a code means")
    search: int = option(0, at_least(0), "ranges tried for each group; 0: from minimum to maximum")
    scale_bits: int = option(16, one_of(*SCALE_BITS), "bits of a scale; under 16 they are quantized in turn")
    rank: int = option(8, at_least(1), "directions of the rounding error that are given back")
    factor_bits: int = option(16, one_of(8, 16), "bits of a factor's entry; 8: integers, one scale a direction")
    weighted: bool = option(
        True, one_of(True, False), "give back what the outputs miss most; false: what the matrix misses most"
    )
    damping: float = option(0.01, at_least(0), "added to the diagonal of the second moment, as a share of its mean")

    def __post_init__(self) -> None:
        GridOptions(self.bits, self.group_size, self.zero, self.format, self.search, self.scale_bits).check(
            "quantize.lorc"
        )

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that these settings read."""
        return frozenset({"second_moment"} if self.weighted or self.method == "gptq" else ())

    @torch.no_grad()
    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        """The rounded weight plus its low-rank compensation.

        Raises:
            OptionError: a rank beyond the smaller side.
        """
        matrix = matrix_of(weight, "quantize.lorc")
        if self.rank > min(matrix.shape):
            raise OptionError(
                f"quantize.lorc: rank = {self.rank} for a {matrix.shape[0]}x{matrix.shape[1]} matrix; "
                f"give at most {min(matrix.shape)}"
            )
        moment = None
        if self.needs:
            moment = second_moment_of(statistics, matrix.shape[1], "quantize.lorc")
            (matrix,) = without_dead([matrix], moment.diagonal())
        base = self._base().solve(Dense(matrix), statistics)
        metric = damped(moment, self.damping) if self.weighted and moment is not None else None
        part = compensation(
            matrix - base.dense(), self.rank, moment=metric, factor_bits=self.factor_bits, where="quantize.lorc"
        )
        return Sum(base, part)

    def _base(self) -> GPTQ | RTN:
        """The lever that rounds."""
        plain = RTN(
            bits=self.bits,
            group_size=self.group_size,
            zero=self.zero,
            format=self.format,
            search=self.search,
            scale_bits=self.scale_bits,
        )
        if self.method == "rtn":
            return plain
        return GPTQ(**vars(plain), damping=self.damping)

    @classmethod
    def predict(cls, settings: Sequence[LoRC], weight: Weight, statistics: Statistics) -> list[Prediction]:
        """Predictions from the whole matrix: a few of its rows have errors of lower rank than all of them."""
        return by_solving(settings, weight, statistics)

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[LoRC]:
        for bits, rank in ((2, 16), (3, 8), (4, 8)):
            if 2 * rank <= min(shape):  # else the factors are no smaller than the codes they mend
                yield cls(bits=bits, group_size=min(128, shape[1]), rank=rank, factor_bits=8)
