"""Entropy-coded quantization with water-filled steps.

Source: E. Lifar, S. Savkin, O. Ordentlich and Y. Polyanskiy, "WaterSIC: information-theoretically (near) optimal linear
layer quantization", arXiv:2603.04956: round column by column with error feedback, as GPTQ does, but let the step of
column j be inversely proportional to the root of what is left of its input's variance once the later columns are
known, and count entropy instead of width; within 0.255 bit of the rate-distortion limit for any input covariance.

Here: rows too get their own step, inversely proportional to the root of the squared gradient of their output, which is
the same water-filling on the output side of the K-FAC damage ``0.5 tr(G D H D^T)``: ONE number, ``step``, then sets the
rate of a whole model near-optimally. The codes are really range-coded (`EntropyCoded`), so the rate is the file's.
Differs from the source: a dead zone that grows as the rate falls stands in for its LMMSE correction, and no residual
or rotation steps are taken.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pennyweight.damage import Prediction, sample
from pennyweight.errors import FormError, OptionError
from pennyweight.lever import at_least, between, lever, option
from pennyweight.statistics import Statistics
from pennyweight.weights import Cost, Weight, check_finite
from pennyweight.weights.entropy import EntropyCoded, contexts_for, scale_bytes, scale_values

_CURVE_ROWS = 192
_SPREAD_ROWS = 2048
_TRIES = 8  # a secant on the log-step lands within half a percent in two or three


@dataclass(frozen=True)
class Metric:
    """The damage of a change D of a matrix, ``0.5 sum_ij rows_i (D U^-1)_ij^2``, ready for column solvers.

    Attributes:
        upper: (N, N) upper Cholesky factor U of the inverse of the damped second moment: H^-1 = U^T U.
        rows: (M,) damage a unit of squared output error, per row.
    """

    upper: Tensor
    rows: Tensor

    @classmethod
    def of(cls, statistics: Statistics, shape: tuple[int, int], *, damp: float, shrink: float) -> Metric:
        """The metric that ``statistics`` give; without a gradient all rows count one."""
        upper = inverse_factor(statistics.need("second_moment", "quantize.entropy"), damp)
        rows = torch.ones(shape[0]) if statistics.gradient is None else statistics.gradient.float()
        mean = rows.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return cls(upper, (1 - shrink) * rows + shrink * mean)


_FACTORS: list[tuple[Tensor, float, Tensor]] = []  # the last factor: q, k and v, gate and up share theirs


def inverse_factor(second_moment: Tensor, damp: float) -> Tensor:
    """(N, N) float32 upper Cholesky factor U with ``U^T U = (H + damp * mean(diag H) I)^-1``, found in double."""
    for known, known_damp, factor in _FACTORS:
        if known is second_moment and known_damp == damp:
            return factor
    h = check_finite(second_moment, "second moment").double()
    scale = h.diagonal().mean()
    if scale <= 0:
        scale = torch.ones((), dtype=h.dtype)  # inputs that were all zero: every change is harmless, any metric serves
    h = h + damp * scale * torch.eye(len(h), dtype=h.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    _FACTORS[:] = [(second_moment, damp, upper)]
    return upper


def water_filled_steps(metric: Metric, step: float) -> tuple[Tensor, Tensor, float]:
    """One-byte row (M,) and column (N,) scales and the unit they are relative to, so that every code of the matrix
    costs the same damage: ``unit * row_i * column_j ~ step * U_jj / sqrt(rows_i)``."""
    row, column = metric.rows.rsqrt(), metric.upper.diagonal()
    middle_row, middle_column = (float(part.double().log2().median().exp2()) for part in (row, column))
    return scale_bytes(row / middle_row), scale_bytes(column / middle_column), step * middle_row * middle_column


def round_columns(matrix: Tensor, metric: Metric, row: Tensor, column: Tensor, deadzone: float) -> Tensor:
    """Integer codes (M, N) int32 of ``matrix`` under steps ``row[i] * column[j]``, with error feedback.

    Args:
        matrix: (M, N) float32.
        metric: whose ``upper`` carries an error to later columns (eq. 3 of GPTQ).
        row: (M,) float32.
        column: (N,) float32.
        deadzone: codes are rounded after division by ``1 + deadzone / variance`` of their column: an offset towards
            zero where few bits are spent, none where many are.
    """
    left = matrix / row[:, None]  # in units of the row's step; the feedback acts within a row, so it is unaffected
    codes = torch.empty(matrix.shape, dtype=torch.int32)
    upper, width, block = metric.upper, matrix.shape[1], 64
    for start in range(0, width, block):
        stop = min(width, start + block)
        here, errors = left[:, start:stop], torch.empty(stop - start, matrix.shape[0])
        columns = here.T.contiguous()  # (block, M): each step reads and writes whole lines
        inner = upper[start:stop, start:stop]
        for j in range(stop - start):
            scale = column[start + j]
            x = columns[j] / scale
            variance = float(x.dot(x)) / x.numel()
            code = x.mul(1 / (1 + deadzone / max(variance, 1e-3))).round_()
            codes[:, start + j] = code
            errors[j] = (columns[j] - code * scale) / inner[j, j]
            if j + 1 < stop - start:
                columns[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        left[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1)
    return codes


@dataclass(frozen=True)
class _Curve:
    """Stored bits a weight and damage at falling steps, interpolated where the damage is a power of the rate."""

    steps: list[float]
    bits: list[float]
    damage: list[float]

    @classmethod
    def of(cls, weight: Weight, statistics: Statistics, damp: float, shrink: float, deadzone: float) -> _Curve:
        metric = Metric.of(statistics, weight.shape, damp=damp, shrink=shrink)
        part, part_statistics = sample(weight, replace(statistics, gradient=metric.rows), _CURVE_ROWS, seed=0)
        matrix, rows = check_finite(part.dense().detach(), "weight").float(), part_statistics.gradient
        assert rows is not None
        share = matrix.shape[0] / weight.shape[0]
        diagonal = metric.upper.diagonal()
        whitened = matrix * rows.sqrt()[:, None] / diagonal
        highest = 2.2 * float(whitened.square().mean().clamp_min(1e-30).sqrt())
        fixed = 2 * sum(weight.shape) + weight.shape[0] * weight.shape[1] // 1024
        curve = cls([], [], [])
        for octave in range(9):
            step = highest / 2**octave
            x = whitened / step
            codes = (x / (1 + deadzone / x.square().mean(0).clamp_min(1e-3))).round()
            coded = EntropyCoded.encode(
                codes.to(torch.int32), torch.zeros(len(codes), dtype=torch.uint8),
                torch.zeros(codes.shape[1], dtype=torch.uint8), step=1.0, contexts=contexts_for(weight.shape),
            )  # fmt: skip
            scanned = coded.words.nbytes + coded.escapes.nbytes
            curve.steps.append(step)
            curve.bits.append(8 * (scanned / share + coded.tables.nbytes + fixed) / (weight.shape[0] * weight.shape[1]))
            curve.damage.append(0.5 * step**2 * float((x - codes).double().square().sum()) / share)
        return curve

    def bits_at(self, step: float | None) -> float:
        assert step is not None
        return float(np.interp(-math.log2(step), [-math.log2(s) for s in self.steps], self.bits))

    def damage_at(self, bits: float) -> float:
        logs = [math.log2(max(d, 1e-300)) for d in self.damage]
        if bits > self.bits[-1]:  # 6 dB a bit beyond the ladder
            return float(2 ** (logs[-1] - 2 * (bits - self.bits[-1])))
        return float(2 ** np.interp(bits, self.bits, logs))


@lever(
    "quantize.entropy",
    reach="weight",
    needs=("second_moment", "gradient"),
    paper="WaterSIC: information-theoretically (near) optimal linear layer quantization, arXiv:2603.04956",
)
@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Round to integers under water-filled steps and range-code them: the rate is the entropy, not the width."""

    bits: float | None = option(None, between(0.05, 12), "stored bits a weight, scales and tables included")
    step: float | None = option(None, between(1e-12, 1e12), "root of the damage a code may cost; in place of bits")
    damp: float = option(0.01, between(0, 1), "added to the second moment's diagonal, as a share of its mean")
    shrink: float = option(0.1, between(0, 1), "how far row sensitivities are drawn to their mean")
    deadzone: float = option(0.08, at_least(0), "how strongly low-rate codes are drawn to zero; 0 rounds to nearest")

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.step is None):
            raise OptionError("quantize.entropy: give either bits or step")

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        """The entropy-coded weight; with ``bits``, of at most that many stored bits a weight.

        Raises:
            FormError: even the coarsest step stores more than ``bits`` (tables and scales of a tiny matrix).
        """
        matrix = check_finite(weight.dense().detach(), "weight").float()
        metric = Metric.of(statistics, weight.shape, damp=self.damp, shrink=self.shrink)
        if self.step is not None:
            return self._at(matrix, metric, self.step)
        assert self.bits is not None
        allowed = int(self.bits * matrix.numel() / 8)
        # the step at which codes of Gaussian entries would have that entropy: 0.5 log2(2 pi e variance / step^2)
        some = slice(None, None, -(-matrix.shape[0] // _SPREAD_ROWS))
        spread = matrix[some].square() * metric.rows[some, None] / metric.upper.diagonal().square()
        entropy = 0.5 * math.log2(2 * math.pi * math.e) + 0.5 * float(spread.clamp_min(1e-30).log2().mean())
        at, slope, best = entropy - self.bits, -1.0, None  # log2 of the step; bits fall by one an octave, less when few
        before: tuple[float, float] | None = None
        for _ in range(_TRIES):
            found = self._at(matrix, metric, 2**at)
            used = found.cost().bytes
            if used <= allowed and (best is None or used > best.cost().bytes):
                best = found
            if 0.995 * allowed <= used <= allowed:
                break
            bits = 8 * used / matrix.numel()
            if before is not None and before[0] != at:
                slope = min(-0.1, max(-1.2, (bits - before[1]) / (at - before[0])))
            before = (at, bits)
            # a byte aimed too low is lost, one too high costs another try: aim a quarter percent below
            at += max(-3.0, min(3.0, (0.9975 * self.bits - bits) / slope))
        if best is None:
            raise FormError(
                f"quantize.entropy: bits {self.bits} cannot be met for {weight.shape[0]}x{weight.shape[1]}: scales and "
                f"tables alone need more; the last try stores {8 * used / matrix.numel():.3f} bits a weight"
            )
        return best

    def _at(self, matrix: Tensor, metric: Metric, step: float) -> EntropyCoded:
        row, column, unit = water_filled_steps(metric, step)
        values = scale_values(row) * unit
        codes = round_columns(matrix, metric, values, scale_values(column), self.deadzone)
        return EntropyCoded.encode(codes, row, column, step=unit)

    @classmethod
    def predict(cls, settings: Sequence[Entropy], weight: Weight, statistics: Statistics) -> list[Prediction]:
        """Predictions from plain rounding of some rows at a ladder of steps, read off at each rate.

        The damage after error feedback is ``0.5 sum_ij g_i (e_ij / U_jj)^2`` over the rounding errors e themselves, so
        rounding without feedback already tells it, up to what feedback does to the distribution that is rounded.
        """
        found: list[Prediction] = []
        curves: dict[tuple[float, float, float], _Curve] = {}
        for setting in settings:
            key = (setting.damp, setting.shrink, setting.deadzone)
            if key not in curves:
                curves[key] = _Curve.of(weight, statistics, *key)
            curve = curves[key]
            bits = curve.bits_at(setting.step) if setting.bits is None else setting.bits
            assert bits is not None
            m, n = weight.shape
            cost = Cost(params=m * n + m + n, bytes=int(bits * m * n / 8), flops=2 * m * n + m + n)
            found.append(Prediction(setting, cost, curve.damage_at(bits)))
        return found

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[Entropy]:
        """Rates from 0.5 to 8 bits, an eighth apart where it matters; small matrices start higher."""
        for eighths in (*range(4, 32), *range(32, 48, 2), 48, 52, 56, 64):
            bits = eighths / 8
            if 8 * 3 * sum(shape) < 0.25 * bits * shape[0] * shape[1]:
                yield cls(bits=bits)
