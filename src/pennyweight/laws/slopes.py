"""Slopes of loss against scale, compared with intervals; laws of time-series models.

Row 42. Source: Q. Yao et al., "Towards Neural Scaling Laws for Time Series Foundation Models", arXiv:2410.12360:
least squares of log10 loss on log10 of size, data or compute. Differs from the source: slopes come with bootstrap
intervals, for x0 = 10^(-b/k) of so flat a law has no digit that means anything.

Shape letters: B resamples, n points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pennyweight.errors import DataError
from pennyweight.laws.forms import Array, find
from pennyweight.laws.law import Range
from pennyweight.laws.table import read


class Slope(NamedTuple):
    """``log10 L = intercept + slope log10 x``; ``decade_ratio`` is the loss ratio for ten times more of x."""

    slope: float
    intercept: float
    interval: Range
    decade_ratio: float


class SlopeComparison(NamedTuple):
    """Two slopes and their difference ``a - b``: a is steeper (scales better) where its interval lies below 0."""

    a: Slope
    b: Slope
    difference: float
    interval: Range

    @property
    def distinct(self) -> bool:
        """Does the interval of the difference exclude 0?"""
        return self.interval.low > 0 or self.interval.high < 0


def _logs(points: Any, axis: str | None) -> tuple[Array, Array]:
    table = read(points, find("power"), axis=axis)
    if len(np.unique(table.x[0])) < 2:
        raise DataError("compare_slopes: one value of x only; a slope needs two")
    return np.log10(table.x[0]), np.log10(table.y)


def _least_squares(x: Array, y: Array) -> tuple[Array, Array]:  # (..., n) -> slope, intercept
    center_x, center_y = x.mean(-1, keepdims=True), y.mean(-1, keepdims=True)
    spread = ((x - center_x) ** 2).sum(-1)
    slope = ((x - center_x) * (y - center_y)).sum(-1) / spread
    return slope, center_y[..., 0] - slope * center_x[..., 0]


def _resampled(x: Array, y: Array, count: int, rng: np.random.Generator) -> Array:
    index = rng.integers(0, x.size, (count, x.size))
    for _ in range(1000):  # a resample of one x has no slope: draw it again
        flat = np.ptp(x[index], axis=1) == 0
        if not flat.any():
            break
        index[flat] = rng.integers(0, x.size, (int(flat.sum()), x.size))
    return _least_squares(x[index], y[index])[0]


def slope(points: Any, *, axis: str | None = None, bootstrap: int = 1000, seed: int = 0, level: float = 0.95) -> Slope:
    """The slope of one set of points, with its bootstrap interval."""
    return _slope(points, axis, bootstrap, np.random.default_rng(seed), level)[0]


def _slope(
    points: Any, axis: str | None, bootstrap: int, rng: np.random.Generator, level: float
) -> tuple[Slope, Array]:
    x, y = _logs(points, axis)
    steep, intercept = (float(value) for value in _least_squares(x, y))
    samples = _resampled(x, y, bootstrap, rng)
    return Slope(steep, intercept, _range(samples, level), 10.0**steep), samples


def _range(samples: Array, level: float) -> Range:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Range(float(low), float(high))


def compare_slopes(
    a: Any, b: Any, bootstrap: int = 1000, *, axis: str | None = None, seed: int = 0, level: float = 0.95
) -> SlopeComparison:
    """Do two families scale alike? Both slopes and their difference, with bootstrap intervals.

    Args:
        a: points of the first family, as `pennyweight.laws.fit` takes them.
        b: of the second.
        bootstrap: resamples of the points of each.
        axis: the column of the variable.
        seed: of the bootstrap.
        level: of the intervals.

    Raises:
        DataError: a loss at or below 0 (likelihoods of continuous data): no power law there.
    """
    if bootstrap < 1:
        raise DataError(f"compare_slopes: bootstrap = {bootstrap}; intervals need at least 1 resample, better 1000")
    rng = np.random.default_rng(seed)
    first, first_samples = _slope(a, axis, bootstrap, rng, level)
    second, second_samples = _slope(b, axis, bootstrap, rng, level)
    return SlopeComparison(first, second, first.slope - second.slope, _range(first_samples - second_samples, level))
