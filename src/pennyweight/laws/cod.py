"""Accuracy of a large model on a benchmark, predicted item cluster by item cluster.

Row 154. Source: C. Xu et al., "Unveiling Downstream Performance Scaling of LLMs: A Clustering-Based Perspective",
arXiv:2502.17262: items are clustered by their pass rates over small models; each cluster gets
y(C) = g + (1-g) exp(-a C^-b - c), C over the smallest budget; clusters that rise with a > 1, b > 0.1, 0 <= c < 1 are
kept and extrapolated; a monotone cubic through (0, 0) and (1, 1) maps the accuracy of the kept items to that of all.

Differs from the source in three places. Rates are compared as arcsin(sqrt(rate)), in which sampling noise is the same
at every rate. The bandwidth of the mean shift is taken from distances to neighbors, as no value was given. Beyond the
calibrated models the items left out hold the accuracy they have there: the pull of (1, 1) alone overstated benchmarks
with unsolvable items (0.71 true, 0.72 to 0.77 predicted, over six simulations).

Shape letters: n items, m models (ascending compute).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import least_squares

from pennyweight.errors import DataError
from pennyweight.laws import fitter
from pennyweight.laws.forms import Array
from pennyweight.laws.law import Law

OUTLIER = -1
_RMSE = 0.005


@dataclass(frozen=True)
class Cluster:
    """Items of like difficulty.

    Attributes:
        items: their rows.
        accuracy: (m,) mean pass rates.
        law: the fitted curve in C over the smallest budget; None when none could be fitted.
        why_not: why it is not extrapolated; None when it is.
    """

    items: NDArray[np.intp]
    accuracy: Array
    law: Law | None
    why_not: str | None


def mean_shift(
    vectors: Array, *, bandwidth: float | None = None, diameter: float | None = None, min_size: int = 10
) -> NDArray[np.intp]:
    """Cluster labels (n,) of difficulty vectors (n, m); -1 for items of no cluster.

    Mean shift with a flat kernel; an item joins a mode only within half of ``diameter``, and clusters below
    ``min_size`` dissolve.

    Args:
        vectors: (n, m).
        bandwidth: radius of the kernel; by default the median distance to the neighbor whose rank is a twentieth of the
            items (at least ``min_size``).
        diameter: widest a cluster may be; 5 bandwidths by default.
        min_size: smallest cluster.
    """
    points = np.asarray(vectors, float)
    n = len(points)
    if bandwidth is None:
        rank = min(n - 1, max(min_size, n // 20))
        bandwidth = float(np.median(np.partition(_distances(points, points), rank, axis=1)[:, rank]))
    if diameter is None:
        diameter = 5 * bandwidth
    bandwidth = max(bandwidth, 1e-9)
    modes = points.copy()
    for _ in range(100):
        near = (_distances(modes, points) <= bandwidth).astype(float)
        moved = near @ points / np.maximum(near.sum(1, keepdims=True), 1.0)
        shift = np.abs(moved - modes).max()
        modes = moved
        if shift < 1e-6 * bandwidth:
            break
    density = (_distances(modes, points) <= bandwidth).sum(1)
    centers: list[Array] = []
    for index in np.argsort(-density, kind="stable"):  # the densest mode of each neighborhood stands for it
        if not centers or _distances(modes[index][None], np.stack(centers)).min() > bandwidth:
            centers.append(modes[index])
    gaps = _distances(points, np.stack(centers))
    labels = np.where(gaps.min(1) <= diameter / 2, gaps.argmin(1), OUTLIER)
    kept = [label for label in range(len(centers)) if (labels == label).sum() >= min_size]
    relabelled = np.full(n, OUTLIER)
    for new, old in enumerate(kept):
        relabelled[labels == old] = new
    return relabelled


def _distances(a: Array, b: Array) -> Array:  # (p, m), (q, m) -> (p, q)
    square: Array = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(square, 0.0)))


@dataclass(frozen=True)
class Mapping:
    """A monotone cubic from subset to full accuracy, through (0, 0) and (1, 1).

    Attributes:
        knots: subset accuracies.
        heights: full accuracies there.
        rmse: over the calibrating models.
        reach: the largest calibrated subset accuracy.
        share: of the items that are in the subset; beyond ``reach`` only they gain.
    """

    knots: Array
    heights: Array
    rmse: float
    reach: float = 1.0
    share: float = 1.0

    def __call__(self, subset: Any) -> Any:
        """Full accuracy."""
        clipped = np.clip(subset, 0.0, 1.0)
        value = PchipInterpolator(self.knots, self.heights)(np.minimum(clipped, self.reach))
        value = value + self.share * np.maximum(clipped - self.reach, 0.0)
        return float(value) if np.ndim(subset) == 0 else value


def fit_mapping(subset: Any, full: Any, *, share: float, rmse: float = _RMSE, most: int = 6) -> Mapping:
    """Fit subset to full accuracy, adding inner knots until the root mean square error is below ``rmse``.

    Args:
        subset: accuracy of models on the kept items.
        full: accuracy of the same models on all items.
        share: of the items that were kept.
        rmse: to reach.
        most: inner knots at most; never more than the models allow.
    """
    x, y = np.asarray(subset, float), np.asarray(full, float)
    best: Mapping | None = None
    for inner in range(0, min(most, len(np.unique(x)) - 1) + 1):
        knots = np.unique(np.concatenate([[0.0], np.quantile(x, (np.arange(inner) + 0.5) / max(inner, 1)), [1.0]]))
        heights, error = _heights(knots, x, y)
        if best is None or error < best.rmse:
            best = Mapping(knots, heights, error, float(x.max()), share)
        if best.rmse < rmse:
            break
    assert best is not None
    return best


def _heights(knots: Array, x: Array, y: Array) -> tuple[Array, float]:
    def heights(logits: Array) -> Array:  # increments of a softmax: monotone, 0 to 1, whatever the logits
        share = np.exp(logits - logits.max())
        return np.concatenate([[0.0], np.cumsum(share / share.sum())])

    def residual(logits: Array) -> Array:
        return np.asarray(PchipInterpolator(knots, heights(logits))(np.clip(x, 0, 1)) - y)

    start = np.log(np.diff(knots))
    if len(knots) == 2:
        return np.array([0.0, 1.0]), float(np.sqrt((residual(start) ** 2).mean()))
    found = least_squares(residual, start)
    return heights(found.x), float(np.sqrt((found.fun**2).mean()))


@dataclass(frozen=True)
class COD:
    """A fitted benchmark: its clusters, and the way from the predictable items to all.

    Attributes:
        clusters: every cluster, kept or not.
        labels: (n,) cluster of each item, -1 for none.
        compute: (m,) of the fitted models.
        mapping: subset to full accuracy.
    """

    clusters: Sequence[Cluster]
    labels: NDArray[np.intp]
    compute: Array
    mapping: Mapping
    _scale: float = field(repr=False, default=1.0)

    @property
    def predictable_items(self) -> NDArray[np.intp]:
        """Rows of the items that are extrapolated."""
        kept = [c.items for c in self.clusters if c.why_not is None]
        return np.sort(np.concatenate(kept)) if kept else np.array([], dtype=int)

    def predict_subset(self, C: float) -> float:
        """Accuracy on the predictable items at compute ``C``."""
        if not C > 0:
            raise DataError(f"cod.predict: C = {C!r}; give compute above 0, in the unit of the fit")
        kept = [c for c in self.clusters if c.why_not is None]
        values = [float(c.law(C / self._scale)) for c in kept if c.law is not None]
        return float(np.average(values, weights=[len(c.items) for c in kept]))

    def predict(self, C: float) -> float:
        """Accuracy on the whole benchmark at compute ``C``."""
        return float(self.mapping(self.predict_subset(C)))

    def explain(self) -> str:
        """A line a cluster: size, accuracy from first to last model, constants, kept or why not."""
        lines = []
        for number, c in enumerate(self.clusters):
            curve = "no curve" if c.law is None else ", ".join(f"{k} {v:.3g}" for k, v in c.law.constants.items())
            rates = f"{c.accuracy[0]:.3f} -> {c.accuracy[-1]:.3f}"
            lines.append(f"cluster {number}: {len(c.items)} items, {rates}; {curve}; {c.why_not or 'extrapolated'}")
        lines.append(f"outliers: {int((self.labels == OUTLIER).sum())} items")
        share = len(self.predictable_items) / len(self.labels)
        lines.append(f"predictable: {share:.1%} of the items; mapping to all within {self.mapping.rmse:.4f}")
        return "\n".join(lines)


def _why_not(accuracy: Array, law: Law | None, tolerance: float) -> str | None:
    if law is None:
        return "no curve could be fitted"
    if (np.diff(accuracy) < -tolerance).any():
        return "not monotone"
    if np.ptp(accuracy) <= 2 * tolerance:
        return "flat"
    a, b, c = law.constants["a"], law.constants["b"], law.constants["c"]
    if not a > 1:
        return f"a = {a:.3g} is not above 1"
    if not b > 0.1:
        return f"b = {b:.3g} is not above 0.1"
    if not 0 <= c < 1:
        return f"c = {c:.3g} is not in [0, 1)"
    return None


def fit(
    passrates: Any,
    compute: Any,
    *,
    external: Any = None,
    bandwidth: float | None = None,
    diameter: float | None = None,
    min_size: int = 10,
    tolerance: float = 0.02,
) -> COD:
    """Fit a benchmark.

    Args:
        passrates: (n, m) share of samples of each model that solve each item.
        compute: (m,) training compute of the models, any unit.
        external: (n, e) pass rates of further models, to calibrate the mapping only.
        bandwidth: of the mean shift, in arcsin(sqrt(rate)).
        diameter: widest a cluster may be, in the same.
        min_size: smallest cluster.
        tolerance: fall of a cluster's accuracy between models that still counts as monotone (sampling noise).

    Raises:
        DataError: shapes that do not fit, rates outside [0, 1], fewer than five models, or nothing predictable.
    """
    try:
        rates, budget = np.asarray(passrates, float), np.asarray(compute, float)
    except (TypeError, ValueError) as error:
        raise DataError(f"cod.fit: {error}; give pass rates (items, models) and compute (models,) in numbers") from None
    if rates.ndim != 2 or budget.shape != (rates.shape[1],):
        raise DataError(
            f"cod.fit: pass rates {rates.shape} and compute {budget.shape}; give (items, models) and (models,)"
        )
    if not (np.isfinite(rates) & (rates >= 0) & (rates <= 1)).all():
        raise DataError("cod.fit: pass rates must lie in [0, 1]")
    if not (np.isfinite(budget) & (budget > 0)).all():
        raise DataError("cod.fit: compute must be positive and finite for every model")
    if len(np.unique(budget)) < 5:
        raise DataError(f"cod.fit: {len(np.unique(budget))} budgets; the curve has 4 constants, give at least 5 models")
    order = np.argsort(budget)
    rates, budget = rates[:, order], budget[order]
    scaled = budget / budget[0]
    vectors = np.arcsin(np.sqrt(rates))
    labels = mean_shift(vectors, bandwidth=bandwidth, diameter=diameter, min_size=min_size)
    clusters = []
    for label in range(labels.max() + 1):
        items = np.flatnonzero(labels == label)
        accuracy = rates[items].mean(0)
        law = None
        if np.ptp(accuracy) > 0:
            law = fitter.fit({"C": scaled, "accuracy": accuracy}, "acc_exp", holdout=False, starts=1024)
        clusters.append(Cluster(items, accuracy, law, _why_not(accuracy, law, tolerance)))
    kept = [c.items for c in clusters if c.why_not is None]
    if not kept:
        raise DataError(f"cod.fit: none of {len(clusters)} clusters can be extrapolated; add models or samples an item")
    chosen = np.concatenate(kept)
    pool = rates if external is None else np.concatenate([rates, np.asarray(external, float)], axis=1)
    mapping = fit_mapping(pool[chosen].mean(0), pool.mean(0), share=len(chosen) / len(rates))
    return COD(tuple(clusters), labels, budget, mapping, float(budget[0]))
