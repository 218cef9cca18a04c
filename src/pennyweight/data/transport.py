"""How good a mixture of data sources will be: pilots, optimal transport, and a straight line in log n.

Row 65. Source: F. Kang et al., "Performance Scaling via Optimal Transport: Enabling Data Selection from Partially
Revealed Sources", arXiv:2307.02460 (projektor): at a fixed pilot size performance is linear in the transport distance
to the validation set, with coefficients quadratic in the ratios; sizes beyond the pilots follow
V(n) = [ln(n/n0) V(n1) - ln(n/n1) V(n0)] / ln(n1/n0), with nothing fitted. Differs from the source: the least squares
are ridged by leave-one-out (few pilots, many coefficients), and the best ratio climbs the predicted surface itself by
the dual's gradient through finite differences.

Shape letters: S sources, n points of one set, m of the other, F features, R pilot ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from pennyweight.errors import DataError, OptionError

Array = NDArray[np.float64]
#: A prediction further than this many times beyond the larger pilot is marked.
BEYOND = 10.0


def sinkhorn(
    cost: Any, regularization: float = 0.05, *, iterations: int = 1000, tolerance: float = 1e-3
) -> tuple[float, Array, Array]:
    """Entropic optimal transport between uniform weights.

    Args:
        cost: (n, m).
        regularization: strength of the entropy, as a share of the mean cost.
        iterations: at most.
        tolerance: change of the potentials, as a share of the strength, at which to stop.

    Returns:
        The cost of the plan, and the dual potentials (n,) and (m,), each up to a shared constant.
    """
    matrix = np.asarray(cost, dtype=float)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise DataError(f"sinkhorn: a cost of shape {matrix.shape}; give a finite (n, m)")
    if not regularization > 0:
        raise OptionError(f"sinkhorn: regularization = {regularization}; give a positive number")
    n, m = matrix.shape
    strength = regularization * max(float(matrix.mean()), 1e-300)
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(iterations):  # in logarithms: a small strength under- and overflows otherwise
        before = f
        f = -strength * (logsumexp((g - matrix) / strength, axis=1) - math.log(m))
        g = -strength * (logsumexp((f[:, None] - matrix) / strength, axis=0) - math.log(n))
        if np.abs(f - before).max() < tolerance * strength:
            break
    plan = np.exp((f[:, None] + g - matrix) / strength) / (n * m)
    return float((plan * matrix).sum()), f, g


def _label_costs(features: Array, labels: Any, others: Array, other_labels: Any) -> tuple[Array, Any, Any]:
    """Squared distance between classes: of their means, plus Bures of their diagonal spreads."""
    here, there = np.unique(labels), np.unique(other_labels)
    table = np.empty((here.size, there.size))
    for i, a in enumerate(here):
        for j, b in enumerate(there):
            x, y = features[labels == a], others[other_labels == b]
            table[i, j] = ((x.mean(0) - y.mean(0)) ** 2).sum() + ((x.std(0) - y.std(0)) ** 2).sum()
    return table, np.searchsorted(here, labels), np.searchsorted(there, other_labels)


def labelled_cost(features: Any, labels: Any, others: Any, other_labels: Any) -> Array:
    """The cost (n, m) of moving labelled points: squared distance of features plus that of their classes."""
    x, y = np.asarray(features, float), np.asarray(others, float)
    a, b = np.asarray(labels), np.asarray(other_labels)
    table, here, there = _label_costs(x, a, y, b)
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.asarray(np.maximum(squares, 0.0) + table[here[:, None], there])


def distance(features: Any, labels: Any, others: Any, other_labels: Any, *, regularization: float = 0.1) -> float:
    """Debiased transport distance between two labelled sets: 0 for identical ones, up to rounding."""

    def cost(one: tuple[Any, Any], two: tuple[Any, Any]) -> float:
        matrix = labelled_cost(*one, *two)
        _, f, g = sinkhorn(matrix, regularization * scale / max(float(matrix.mean()), 1e-300))
        return float(f.mean() + g.mean())

    here, there = (features, labels), (others, other_labels)
    scale = float(labelled_cost(*here, *there).mean())
    return cost(here, there) - (cost(here, here) + cost(there, there)) / 2


def project(n: float, n0: float, n1: float, v0: float, v1: float) -> float:
    """The value at ``n`` of the line in log n through (n0, v0) and (n1, v1)."""
    if not 0 < n0 < n1 or not n > 0:
        raise OptionError(f"projektor: sizes {n0:g} < {n1:g} and {n:g}; give two rising positive ones and a positive n")
    return (math.log(n / n0) * v1 - math.log(n / n1) * v0) / math.log(n1 / n0)


@dataclass(frozen=True)
class Projection:
    """A predicted performance, whether it was clipped, and how far beyond the larger pilot it lies."""

    value: float
    clipped: bool
    factor: float

    @property
    def warning(self) -> str | None:
        """What to say aloud, or None."""
        if self.clipped:
            return "warning: the line in log n left the range of the score and was clipped"
        return f"warning: {self.factor:.3g} times beyond the larger pilot" if self.factor > BEYOND else None


@dataclass(frozen=True)
class Surface:
    """Performance at one pilot size as a function of the ratios."""

    linear: Array  # of the ratios
    coefficients: Array
    center: Array
    scale: Array
    error: float  # leave-one-out, root mean square

    def __call__(self, q: Array, transport: float) -> float:
        row = (_design(q, transport) - self.center) / self.scale
        return float(q @ self.linear + row @ self.coefficients)


def _design(q: Array, transport: float) -> Array:
    return np.concatenate([[transport], q * transport, q**2 * transport, q**2])


def _fit(ratios: Array, transports: Array, values: Array) -> Surface:
    design = np.stack([_design(q, t) for q, t in zip(ratios, transports, strict=True)])
    center, scale = design.mean(0), design.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    x = (design - center) / scale
    # the ratios themselves are not shrunk: what the ridge leaves at its strongest is the model linear in them
    plain = np.linalg.svd(ratios, full_matrices=False)[0][:, : np.linalg.matrix_rank(ratios)]
    bent, rest = x - plain @ (plain.T @ x), values - plain @ (plain.T @ values)
    left, singular, right = np.linalg.svd(bent, full_matrices=False)
    turned = left.T @ rest
    tried = []
    for ridge in np.geomspace(1e-3, 1e5, 41):
        keep = singular**2 / (singular**2 + ridge)
        leverage = (left**2 * keep).sum(1) + (plain**2).sum(1)
        gap = ((rest - left @ (keep * turned)) / np.maximum(1 - leverage, 1e-6)) ** 2
        tried.append((float(gap.mean()), float(gap.std() / math.sqrt(gap.size)), float(ridge)))
    least = min(tried)
    # the strongest ridge within a standard error of the best: the way to larger n magnifies what was fitted to noise
    best = max((one for one in tried if one[0] <= least[0] + least[1]), key=lambda one: one[2])
    coefficients = right.T @ (singular / (singular**2 + best[2]) * turned)
    linear = np.linalg.lstsq(ratios, values - x @ coefficients, rcond=None)[0]
    return Surface(linear, coefficients, center, scale, math.sqrt(best[0]))


@dataclass(frozen=True)
class Projektor:
    """Predicts a mixture's performance at any size: call it with ratios and a size.

    Attributes:
        sizes: of the pilots.
        surfaces: one a size.
        transport: the distance of a mixture of given ratios to the validation set.
        pilots: ratios that were tried.
        sources: how many there are.
        best_score: where the score ends (1 for accuracies), or None.
    """

    sizes: tuple[int, int]
    surfaces: tuple[Surface, Surface]
    transport: Callable[[Array], float] = field(repr=False)
    pilots: tuple[Array, ...] = ()
    sources: int = 0
    best_score: float | None = 1.0

    def _checked(self, q: Any) -> Array:
        try:
            ratios = np.asarray(q, dtype=float)
        except (TypeError, ValueError) as error:
            raise DataError(f"projektor: {error}; give {self.sources} shares that sum to 1") from None
        if ratios.shape != (self.sources,) or (ratios < -1e-9).any() or abs(ratios.sum() - 1) > 1e-6:
            raise DataError(f"projektor: ratios {ratios.tolist()}; give {self.sources} shares that sum to 1")
        return ratios

    def project(self, q: Any, n: float) -> Projection:
        """The prediction with what is to be said about it."""
        ratios = self._checked(q)
        transport = self.transport(ratios)
        values = [surface(ratios, transport) for surface in self.surfaces]
        value = project(n, *self.sizes, *values)
        top = math.inf if self.best_score is None else self.best_score
        return Projection(min(value, top), value > top, n / self.sizes[1])

    def __call__(self, q: Any, n: float) -> float:
        return self.project(q, n).value

    def best_q(self, n: float, *, iterations: int = 100, rate: float = 0.2) -> Array:
        """Ratios of the best predicted performance at ``n``: projected ascent from the best pilot."""
        q = max(self.pilots, key=lambda one: self._value(one, n))
        value, slope, step = self._value(q, n), self._slope(q, n), rate
        for _ in range(iterations):
            there = simplex(q + step * slope / max(float(np.linalg.norm(slope)), 1e-300))
            reached = self._value(there, n)
            if reached > value:
                q, value, slope = there, reached, self._slope(there, n)
            else:
                step *= 0.5
                if step < 0.01:
                    break
        return q

    def _value(self, q: Array, n: float) -> float:
        transport = self.transport(q)
        return project(n, *self.sizes, *(surface(q, transport) for surface in self.surfaces))

    def _slope(self, q: Array, n: float, width: float = 0.02) -> Array:
        slope = np.zeros(self.sources)
        for i in range(self.sources):  # along directions that stay in the simplex
            direction = np.eye(self.sources)[i] - q
            slope[i] = (self._value(q + width * direction, n) - self._value(q, n)) / width
        return slope


def simplex(q: Array) -> Array:
    """The nearest point of the simplex (J. Duchi et al., 2008)."""
    ordered = np.sort(q)[::-1]
    sums = (np.cumsum(ordered) - 1) / np.arange(1, q.size + 1)
    last = int(np.flatnonzero(ordered > sums)[-1])
    return np.asarray(np.maximum(q - sums[last], 0.0))


def centroid_accuracy(features: Array, labels: Array, others: Array, other_labels: Array) -> float:
    """Accuracy on the second set of ridge regression on one-hot labels of the first: a plain, fast pilot model."""
    classes = np.unique(np.concatenate([labels, other_labels]))
    mean = features.mean(0)
    x = np.hstack([features - mean, np.ones((len(features), 1))])
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += 1e-2 * np.trace(gram) / len(gram)
    weights = np.linalg.solve(gram, x.T @ (labels[:, None] == classes))
    guess = classes[(np.hstack([others - mean, np.ones((len(others), 1))]) @ weights).argmax(1)]
    return float((guess == other_labels).mean())


def projektor(
    sources: Sequence[tuple[Any, Any]],
    valid: tuple[Any, Any],
    pilot_sizes: tuple[int, int],
    ratios: Any = None,
    *,
    score: Callable[[Array, Array, Array, Array], float] | None = None,
    draws: int = 3,
    points: int = 100,
    best_score: float | None = 1.0,
    seed: int = 0,
) -> Projektor:
    """Learn to predict the performance of mixtures from small pilots.

    Args:
        sources: (features, labels) of each: what is revealed of it, at least the larger pilot.
        valid: the same of the validation set.
        pilot_sizes: two rising numbers of points, n0 < n1.
        ratios: (R, S) mixtures to train pilots on; None for the vertices, the edges' middles and the center.
        score: performance, larger is better, of a model trained on (features, labels) and judged on others; by default
            the accuracy of a ridge classifier.
        draws: pilots a mixture and size, averaged.
        points: of a mixture, for the transport distance; the same for all.
        best_score: where predictions are clipped; None for no limit.
        seed: of the draws.

    Raises:
        DataError: fewer than two sources, or one with fewer points than the larger pilot.
    """
    sets = [(np.asarray(x, float), np.asarray(y)) for x, y in sources]
    judge = (np.asarray(valid[0], float), np.asarray(valid[1]))
    if len(pilot_sizes) != 2:
        raise DataError(f"projektor: pilot_sizes = {pilot_sizes!r}; give two rising numbers of points")
    low, high = pilot_sizes
    if len(sets) < 2 or not 2 <= low < high:
        raise DataError(f"projektor: {len(sets)} sources, pilots of {low} and {high}; give 2 sources and rising sizes")
    for number, (x, y) in enumerate(sets, start=1):
        if len(x) != len(y) or len(x) < high:
            raise DataError(f"projektor: source {number} reveals {len(x)} points; the larger pilot needs {high}")
    grid = _default_ratios(len(sets)) if ratios is None else np.asarray(ratios, dtype=float)
    if grid.ndim != 2 or grid.shape[1] != len(sets) or (np.abs(grid.sum(1) - 1) > 1e-6).any() or (grid < 0).any():
        raise DataError(f"projektor: ratios of shape {grid.shape}; give rows of {len(sets)} shares that sum to 1")
    measure = score or centroid_accuracy
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(x)) for x, _ in sets]
    cut = judge if len(judge[0]) <= points else tuple(part[rng.permutation(len(judge[0]))[:points]] for part in judge)

    def transport(q: Array) -> float:
        return distance(*_mixed(sets, orders, q, min(points, high)), *cut)

    kept: dict[bytes, float] = {}

    def remembered(q: Array) -> float:
        key = np.round(np.clip(q, 0, 1), 3).tobytes()
        if key not in kept:
            kept[key] = transport(np.clip(q, 0, 1))
        return kept[key]

    distances = np.array([remembered(q) for q in grid])
    surfaces = []
    for size in (low, high):
        values = []
        for q in grid:
            found = []
            for _ in range(draws):
                drawn = [rng.permutation(len(x)) for x, _ in sets]
                found.append(measure(*_mixed(sets, drawn, q, size), *judge))
            values.append(float(np.mean(found)))
        surfaces.append(_fit(grid, distances, np.array(values)))
    return Projektor((low, high), (surfaces[0], surfaces[1]), remembered, tuple(grid), len(sets), best_score)


def _mixed(sets: Sequence[tuple[Array, Any]], orders: Sequence[Any], q: Array, size: int) -> tuple[Array, Any]:
    exact = np.asarray(q) * size
    counts = np.floor(exact).astype(int)
    for at in np.argsort(counts - exact, kind="stable")[: size - counts.sum()]:  # largest remainders
        counts[at] += 1
    taken = [order[:count] for order, count in zip(orders, counts, strict=True)]
    features = np.concatenate([x[at] for (x, _), at in zip(sets, taken, strict=True)])
    labels = np.concatenate([y[at] for (_, y), at in zip(sets, taken, strict=True)])
    return features, labels


def _default_ratios(count: int) -> Array:
    vertices = np.eye(count)
    middles = [(a + b) / 2 for i, a in enumerate(vertices) for b in vertices[:i]]
    inner = [(vertices[i] + 1) / (count + 1) for i in range(count)]
    return np.stack([*vertices, *middles, *inner, np.full(count, 1 / count)])
