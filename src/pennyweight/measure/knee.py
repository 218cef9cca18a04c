"""Where a curve of harm turns: the breakpoint of two straight lines, with a bootstrap interval.

Row 15. Source: A. Jaiswal, S. Liu, T. Chen and Z. Wang, "The Emergence of Essential Sparsity in Large Pre-trained
Models: The Weights that Matter", arXiv:2306.03805: performance over one-shot sparsity is flat, and from a sharp point
on it drops. Differs from the source: it reads the point off a plot; here it is the breakpoint of the best continuous
fit of two lines that turn upward, and samples are resampled for its interval.

A collapsed model cannot get worse: what comes after the last stretch at least half as steep as the steepest one says
nothing of the knee and is left out. A curve that rises without a turn costs from its first point on, and has its knee
there; one that does not rise has it at its last.

Shape letters: W samples (windows), S points of a curve, R curves (resamples).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pennyweight.errors import DataError
from pennyweight.measure.power import LEVEL
from pennyweight.measure.stats import RESAMPLES, Array, Samples, bootstrap

#: Candidates of the breakpoint between two neighboring points.
FINENESS = 20
#: A turn that explains less than this share of a curve's variance is rounding.
_NO_TURN = 1e-9


@dataclass(frozen=True)
class Knee:
    """The breakpoint of a curve and its interval.

    Attributes:
        at: where it lies; the first point of a curve that rises all along, the last of one that does not rise.
        low: lower end of the interval.
        high: upper end.
        level: of the interval.
        before: slope of the fit up to the knee, harm a unit of the axis; 0 for a knee at the first point.
        after: slope beyond it; NaN for a knee at the last point.
        n: samples behind it.
    """

    at: float
    low: float
    high: float
    level: float
    before: float
    after: float
    n: int

    @property
    def turns(self) -> bool:
        """Whether harm rises from the knee on, and faster than before it."""
        return self.after > self.before

    @property
    def words(self) -> str:
        """``0.52 [0.50, 0.55]``."""
        return f"{self.at:.2f} [{self.low:.2f}, {self.high:.2f}]"


def knee(
    points: Sequence[float], harm: Samples, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Knee:
    """The knee of the mean curve, samples resampled whole for its interval.

    Args:
        points: (S,) where the curve was measured, rising; at least 4.
        harm: (W, S) of each sample at each point, larger is worse.
        level: of the percentile interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: fewer than four points, points that do not rise, or a harm that is not finite.

    Exact (to 1/20 of the distance of two points) for a curve of two lines with two points or more on each.
    """
    x = np.asarray(points, dtype=np.float64)
    values = np.asarray(harm.detach().cpu() if hasattr(harm, "detach") else harm, dtype=np.float64)
    if x.ndim != 1 or len(x) < 4 or not (np.diff(x) > 0).all():
        raise DataError(f"knee: points {list(points)}; give at least four that rise")
    if values.ndim != 2 or values.shape[1] != len(x):
        raise DataError(f"knee: harm of shape {values.shape} for {len(x)} points; give (samples, points)")
    found = bootstrap(values, lambda drawn: breaks(x, drawn.mean(1)), level=level, resamples=resamples, seed=seed)
    mean = values.mean(0)
    kept = int(_kept(x, mean[None])[0])
    inside = x[0] < found.value < x[-1]
    columns = 3 if inside else 2
    _, slope, *turn = np.linalg.lstsq(_design(x[:kept], found.value)[:, :columns], mean[:kept], rcond=None)[0].tolist()
    return Knee(
        at=found.value,
        low=found.low,
        high=found.high,
        level=level,
        before=slope if found.value > x[0] else 0.0,
        after=slope + sum(turn) if found.value < x[-1] else float("nan"),
        n=found.n,
    )


def breaks(x: Array, curves: Array) -> Array:
    """The breakpoint (R,) of each of ``curves`` (R, S) over ``x`` (S,); see `Knee.at`."""
    found = np.full(len(curves), x[-1])
    kept = _kept(x, curves)
    for length in np.unique(kept):
        these = kept == length
        found[these] = _breaks(x[:length], curves[these][:, :length], x[-1])
    return found


def _kept(x: Array, curves: Array) -> npt.NDArray[np.int64]:
    """(R,) points up to where each curve levels off."""
    slopes = np.diff(curves, axis=1) / np.diff(x)
    steep = slopes >= 0.5 * slopes.max(1, keepdims=True).clip(min=0)
    last = len(x) - 2 - np.argmax(steep[:, ::-1], axis=1)  # of the steep ones; of none, argmax is 0: the last
    return np.asarray(np.maximum(last + 2, 4), dtype=np.int64)


def _breaks(x: Array, curves: Array, never: float) -> Array:
    # at the second point and not before: the first alone has no slope; and so at the end
    between = [np.linspace(a, b, FINENESS, endpoint=False) for a, b in pairwise(x[1:-1])]
    candidates = np.concatenate([*between, x[-2:-1]])
    centered = curves - curves.mean(1, keepdims=True)
    total = np.square(centered).sum(1)
    line, upper = np.linalg.qr(_design(x, x[-1])[:, :2])
    along = centered @ line
    best = total - np.square(along).sum(1) - _NO_TURN * total
    rises = along[:, 1] / upper[1, 1] * (x[-1] - x[0]) > _NO_TURN * np.abs(curves).max(1)
    found = np.where(rises, x[0], never)
    for candidate in candidates:
        design = _design(x, candidate)
        basis, upper = np.linalg.qr(design)
        inside = centered @ basis  # (R, 3)
        left = total - np.square(inside).sum(1)
        better = (left < best) & (inside[:, 2] / upper[2, 2] > 0)  # the last coefficient: by how much it turns
        best, found = np.where(better, left, best), np.where(better, candidate, found)
    return found


def _design(x: Array, at: float) -> Array:
    return np.stack([np.ones_like(x), x, np.maximum(0, x - at)], axis=1)
