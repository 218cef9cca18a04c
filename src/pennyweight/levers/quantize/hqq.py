"""Half-quadratic quantization (HQQ): a zero for each group that keeps a sparse error sparse, found without data.

Source: H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023, and its code
(mobiusml/hqq). The error |W - Q|_p^p with p < 1 forgives outliers; it is split into a shrinkage of the error and a mean
over the group for the zero, alternated until the mean error stops falling; scales stay those of minimum and maximum.
Differs from the source: groups always lie along the inputs (its axis 1), the last one of a row may be shorter; scales
and zeros are stored as float16 step and minimum.

Shape letters: M out features, N in features, G groups of a row, S features of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.solvers.inputs import matrix_of
from pennyweight.statistics import Statistics
from pennyweight.weights import Grid, Quantized, Weight, check_finite

_STEEPEST = 2e4  # of a scale, as codes a unit


@lever(
    "quantize.hqq",
    reach="weight",
    paper="Half-Quadratic Quantization of Large Machine Learning Models (mobiusml/hqq)",
)
@dataclass(frozen=True, kw_only=True)
class HQQ:
    """Round to nearest on a grid whose zeros make most of the error small, at the price of a few large ones."""

    bits: int = option(4, between(1, 8), "bits of a code")
    group_size: int = option(64, at_least(1), "input features that share a scale and a zero")
    lp_norm: float = option(0.7, between(0.1, 1), "exponent of the error")
    beta: float = option(10.0, at_least(1e-3), "weight of the split at first")
    kappa: float = option(1.01, at_least(1), "what it is multiplied by after each round")
    iterations: int = option(20, at_least(0), "rounds at most; 0: minimum to maximum")
    round_zero: bool | None = option(
        None, one_of(True, False, None), "start from whole zeros; none: at 4 bits, as the source does"
    )

    @torch.no_grad()
    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        matrix = check_finite(matrix_of(weight, "quantize.hqq"), "quantize.hqq: matrix")
        rows, columns = matrix.shape
        size = min(self.group_size, columns)
        missing = -columns % size
        real = torch.ones(columns).bool()
        if missing:
            matrix = torch.cat([matrix, matrix[:, -1:].expand(-1, missing)], 1)
            real = torch.arange(columns + missing) < columns
        x, counted = matrix.view(rows, -1, size), real.view(1, -1, size).float()
        scale, zero = self._optimized(x, counted)
        codes = (x * scale + zero).round().clamp(0, 2**self.bits - 1)
        step = 1 / scale
        grid = Grid(self.bits, size, step[..., 0].half(), (-zero * step)[..., 0].half(), "float")
        return Quantized.from_codes(codes.view(rows, -1)[:, :columns].to(torch.uint8), grid)

    def _optimized(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Codes a unit and zero, (M, G, 1) each, of ``x`` (M, G, S) where ``counted`` (1, G, S) is 1."""
        highest = 2**self.bits - 1
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        reach = high - low
        scale = torch.where(reach > 0, highest / reach, torch.ones_like(reach)).clamp_max(_STEEPEST)
        zero = -low * scale
        if self.bits == 4 if self.round_zero is None else self.round_zero:
            zero = zero.round()
        beta, best = self.beta, float("inf")
        total = counted.sum(-1, keepdim=True)
        for _ in range(self.iterations):
            codes = (x * scale + zero).round().clamp(0, highest)
            error = x - (codes - zero) / scale
            zero = ((codes - (x - self._shrunk(error, beta)) * scale) * counted).sum(-1, keepdim=True) / total
            beta *= self.kappa
            mean = float((error.abs() * counted).sum() / (total.sum() * len(x)))
            if mean >= best:
                break
            best = mean
        return scale, zero

    def _shrunk(self, error: Tensor, beta: float) -> Tensor:
        size = error.abs()
        return error.sign() * (size - size.pow(self.lp_norm - 1) / beta).clamp_min(0)

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[HQQ]:
        for bits, group_size in ((3, 64), (4, 64), (8, 128)):
            yield cls(bits=bits, group_size=min(group_size, shape[1]))
