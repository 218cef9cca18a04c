"""Test and train error of ridge and random-feature regression, from the eigenvalues of the kernel alone.

Row 53. Source: J. Simon, D. Karkada et al., "More is Better in Modern Machine Learning: when Infinite
Overparameterization is Optimal and Overfitting is Obligatory", arXiv:2311.14646. Differs from the source: its two
nested equations are one here. With z = sum_i lambda_i/(lambda_i + gamma) both give
ridge = (n - z) (k - z) gamma / k, which rises with gamma, so one root in one dimension is all there is; ridge 0 needs
no limit taken by hand.

The ridge is added to the kernel matrix itself (not n times it). Errors are mean squares per test point, the noise
included; ``noise`` is its variance. NumPy in float64: in float32 the roots fail without a word.

Shape letters: I modes of the kernel, n training points, k random features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar

from pennyweight.elementwise import numbers
from pennyweight.errors import DataError, OptionError

Array = NDArray[np.float64]


class KernelRidge(NamedTuple):
    """Predicted errors of kernel ridge regression.

    Attributes:
        kappa: effective regularization: modes well above it are learned, those below are not.
        e0: by what noise and unlearned modes are magnified.
        test: mean squared error on new points, noise included.
        train: on the training points.
    """

    kappa: float
    e0: float
    test: float
    train: float


class RandomFeatures(NamedTuple):
    """Predicted errors of ridge regression on k random features (kernel divided by k).

    Attributes:
        kappa: as of the kernel; equal to ``gamma`` in the limit of many features.
        gamma: at which the eigenvalues are cut.
        test: mean squared error on new points, noise included.
        train: on the training points.
    """

    kappa: float
    gamma: float
    test: float
    train: float


class Optimum(NamedTuple):
    """The ridge of least test error, and the errors there."""

    ridge: float
    test: float
    train: float


class _Problem(NamedTuple):
    n: float
    k: float  # math.inf: the kernel itself
    eigvals: Array
    coeffs2: Array
    noise: float

    def modes(self, gamma: float) -> Array:  # (I,) share learned of each
        return np.asarray(self.eigvals / (self.eigvals + gamma)) if gamma > 0 else np.ones(self.eigvals.size)

    def ridge(self, gamma: float) -> float:
        z = float(self.modes(gamma).sum())
        wide = 1.0 if math.isinf(self.k) else (self.k - z) / self.k
        return (self.n - z) * wide * gamma

    def lowest(self) -> float:
        """gamma without a ridge: where as many modes are learned as there are points or features; 0 for fewer."""
        least = min(self.n, self.k)
        if self.eigvals.size <= least:
            return 0.0
        top = math.log(float(self.eigvals.sum()) / least)
        low = math.log(float(self.eigvals.min())) - 60.0
        if self.modes(math.exp(low)).sum() < least:
            return 0.0
        return math.exp(brentq(lambda at: float(self.modes(math.exp(at)).sum()) - least, low, top + 1e-9, xtol=1e-14))

    def solve(self, ridge: float) -> float:
        least = self.lowest()
        if ridge == 0:
            return least
        low = math.log(least) if least > 0 else math.log(ridge / self.n) - 60.0
        # ridge(gamma) >= (n - z)(k - z) gamma / k grows like n gamma once nothing is learned
        high = max(math.log(2 * ridge / self.n + 4 * float(self.eigvals.sum()) / min(self.n, self.k)), low + 1e-12)
        while self.ridge(math.exp(high)) < ridge:
            high += 1.0
        return math.exp(brentq(lambda at: self.ridge(math.exp(at)) - ridge, low, high, xtol=1e-14, rtol=1e-14))

    def errors(self, gamma: float) -> tuple[float, float, float, float]:
        """kappa, factor, test, train."""
        learned = self.modes(gamma)
        z, q = float(learned.sum()), float((learned**2).sum())
        n, k = self.n, self.k
        missed = learned / (self.eigvals + gamma) if gamma > 0 else np.zeros(learned.size)  # lambda/(lambda+gamma)^2
        if math.isinf(k):
            kappa, left = gamma, n - q
            bias = float(((1 - learned) ** 2 * self.coeffs2).sum())
        else:
            kappa = gamma * max(k - z, 0.0) / k
            if k - q <= 0:
                return kappa, math.inf, math.inf, math.nan
            left = n - (q * (k - 2 * z) + z * z) / (k - q)
            bias = float((((1 - learned) - kappa * missed * k / (k - q)) * self.coeffs2).sum())
        if left <= 1e-12 * n:
            return kappa, math.inf, math.inf, math.nan
        test = n / left * (bias + self.noise)
        return kappa, n / left, test, (max(n - z, 0.0) / n) ** 2 * test


def _problem(n: float, k: float, eigvals: Any, coeffs2: Any, ridge: float, noise: float) -> _Problem:
    try:
        values, squares = np.asarray(eigvals, dtype=float).ravel(), np.asarray(coeffs2, dtype=float).ravel()
    except (TypeError, ValueError) as error:
        raise DataError(f"kernel_theory: {error}; give eigenvalues and squared coefficients in numbers") from None
    if values.size == 0 or values.shape != squares.shape:
        raise DataError(
            f"kernel_theory: {values.size} eigenvalues and {squares.size} squared coefficients; give one of each a mode"
        )
    if not (np.isfinite(values).all() and (values >= 0).all() and np.isfinite(squares).all() and (squares >= 0).all()):
        raise DataError("kernel_theory: eigenvalues and squared coefficients must be finite and not negative")
    numbers("kernel_theory", n=n, k=k, ridge=ridge, noise=noise)
    for name, value, low in (("n", n, 0), ("k", k, 0), ("ridge", ridge, -1e-300), ("noise", noise, -1e-300)):
        if not value > low or (math.isinf(value) and name != "k"):
            raise OptionError(f"kernel_theory: {name} = {value!r}; give n, k > 0 and a ridge and noise of 0 or more")
    # what no mode of the kernel reaches is never learned: it counts as noise
    reached = values > 0
    if not reached.any():
        raise DataError("kernel_theory: every eigenvalue is 0; nothing can be learned")
    return _Problem(float(n), float(k), values[reached], squares[reached], noise + float(squares[~reached].sum()))


def krr(n: float, eigvals: Any, coeffs2: Any, ridge: float = 0.0, noise: float = 0.0) -> KernelRidge:
    """Kernel ridge regression on ``n`` points.

    Args:
        n: training points.
        eigvals: (I,) of the kernel under the distribution of the data.
        coeffs2: (I,) squared coefficients of the target in the eigenfunctions.
        ridge: added to the diagonal of the (n, n) kernel matrix.
        noise: variance of the targets' noise.

    Returns:
        The predicted errors; exact in the limit of many points for Gaussian-like features, and close from some tens.

    Raises:
        DataError: lengths that differ, values below 0.
        OptionError: n, ridge or noise out of range.
    """
    problem = _problem(n, math.inf, eigvals, coeffs2, ridge, noise)
    kappa, e0, test, train = problem.errors(problem.solve(ridge))
    return KernelRidge(kappa, e0, test, train)


def rf(n: float, k: float, eigvals: Any, coeffs2: Any, ridge: float = 0.0, noise: float = 0.0) -> RandomFeatures:
    """Ridge regression on ``k`` random features and ``n`` points; ``k = math.inf`` is `krr`.

    Args and errors as there; infinite test error where points equal features and nothing is ridged.
    """
    problem = _problem(n, k, eigvals, coeffs2, ridge, noise)
    gamma = problem.solve(ridge)
    kappa, _, test, train = problem.errors(gamma)
    return RandomFeatures(kappa, gamma, test, train)


def optimal_ridge(n: float, eigvals: Any, coeffs2: Any, noise: float = 0.0, k: float = math.inf) -> Optimum:
    """The ridge of least predicted test error, 0 included, for ``k`` features or the kernel itself."""
    problem = _problem(n, k, eigvals, coeffs2, 0.0, noise)
    least = problem.lowest()
    low = math.log(least) if least > 0 else math.log(float(problem.eigvals.min())) - 40.0
    high = math.log(float(problem.eigvals.sum())) + 10.0

    def test(at: float) -> float:
        found = problem.errors(math.exp(at))[2]
        return found if math.isfinite(found) else 1e300

    grid = np.linspace(low, high, 400)
    values = [test(float(at)) for at in grid]
    at = int(np.argmin(values))
    best = float(grid[at])
    if 0 < at:
        bounds = (float(grid[at - 1]), float(grid[min(at + 1, grid.size - 1)]))
        best = float(minimize_scalar(test, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)
    gamma = math.exp(best)
    if values[0] <= test(best):
        gamma = least
    _, _, error, train = problem.errors(gamma)
    return Optimum(0.0 if gamma == least else max(problem.ridge(gamma), 0.0), error, train)


def optimal_fitting_ratio(alpha: float, beta: float, noise: float) -> float:
    """Best ratio of train to test error for eigenvalues i^-alpha and squared coefficients i^-beta.

    Near 0: to fit the training set almost exactly is not harmless but required.

    Args:
        alpha: above 1.
        beta: above 1, below 2 alpha + 1.
        noise: variance over the test error that would be reached without noise.
    """
    if not (alpha > 1 and beta > 1 and noise >= 0):
        raise OptionError(
            f"optimal_fitting_ratio: alpha = {alpha!r}, beta = {beta!r}, noise = {noise!r}; give > 1, > 1 and >= 0"
        )

    def error(ratio: float) -> float:
        root = math.sqrt(ratio)
        left = 1 - root
        return float((left + alpha * noise * left**beta) / (1 + (alpha - 1) * root) * left**-beta)

    grid = np.concatenate([[0.0], np.geomspace(1e-12, 1 - 1e-6, 4000)])
    values = [error(float(ratio)) for ratio in grid]
    at = int(np.argmin(values))
    if at in (0, grid.size - 1):
        return float(grid[at])
    bounds = (float(grid[at - 1]), float(grid[at + 1]))
    return float(minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-14}).x)


class Structure(NamedTuple):
    """Eigenvalues, and squared coefficients of a target in the eigenvectors, of a measured kernel matrix."""

    eigvals: Array
    coeffs2: Array


def measured(kernel: Any, target: Any) -> Structure:
    """The structure of a kernel matrix (n, n) and targets (n,) or (n, c), summed over the c outputs.

    Eigenvalues of K/n with eigenvectors scaled by sqrt(n): v_i = psi_i^T y / n.
    """
    matrix, y = np.asarray(kernel, dtype=float), np.asarray(target, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(y) != len(matrix):
        raise DataError(f"kernel_theory: a kernel {matrix.shape} and targets {y.shape}; give (n, n) and (n,) or (n, c)")
    n = len(matrix)
    values, vectors = np.linalg.eigh(matrix / n)
    found = (vectors.T @ y.reshape(n, -1) / math.sqrt(n)) ** 2
    return Structure(np.maximum(values[::-1], 0.0), found.sum(1)[::-1])


class WidthReport(NamedTuple):
    """Held-out error at the tuned ridge, by width.

    Attributes:
        widths: features used.
        test: mean squared error on held-out rows.
        standard_error: of each step from one width to the next, over held-out rows.
        ridge: tuned by leave-one-out on the training rows.
        free: no step to a larger width raises the error by more than two standard errors.
    """

    widths: tuple[int, ...]
    test: tuple[float, ...]
    standard_error: tuple[float, ...]
    ridge: tuple[float, ...]
    free: bool


def width_is_free(
    model_features: Any,
    data: Any,
    *,
    widths: Sequence[int] | None = None,
    held_out: float = 0.5,
    seed: int = 0,
) -> WidthReport:
    """Does more width ever hurt, when the ridge is tuned for each? Measured on a model's own features.

    Args:
        model_features: (n, K) array whose first k columns are the features of width k, or a callable of the inputs
            that gives it.
        data: targets (n,) or (n, c); or (inputs, targets) when ``model_features`` is a callable.
        widths: to try; None for doublings up to K.
        held_out: share of rows to judge by.
        seed: of the split.

    Raises:
        DataError: shapes that do not fit, or too few rows.
    """
    if callable(model_features):
        inputs, targets = data
        features = np.asarray(model_features(inputs), dtype=float)
    else:
        features, targets = np.asarray(model_features, dtype=float), data
    y = np.asarray(targets, dtype=float).reshape(len(targets), -1)
    if features.ndim != 2 or len(features) != len(y) or len(y) < 8:
        raise DataError(
            f"width_is_free: features {features.shape} and targets {y.shape}; give (n, K) and n targets, n >= 8"
        )
    order = np.random.default_rng(seed).permutation(len(y))
    cut = max(2, round((1 - held_out) * len(y)))
    train, test = order[:cut], order[cut:]
    if not len(test):
        raise DataError(f"width_is_free: held_out = {held_out} leaves no rows to judge by")
    top = features.shape[1]
    chosen = tuple(widths or sorted({*(2**p for p in range(2, 40) if 2**p < top), top}))
    if min(chosen) < 1 or max(chosen) > top or list(chosen) != sorted(chosen):
        raise DataError(f"width_is_free: widths {chosen}; give rising ones within the {top} features")
    losses, ridges = [], []
    mean = y[train].mean(0)
    for k in chosen:
        inner, outer = features[train, :k] / math.sqrt(k), features[test, :k] / math.sqrt(k)
        ridge, predict = _tuned(inner, y[train] - mean)
        losses.append((((predict(outer) + mean) - y[test]) ** 2).sum(1))
        ridges.append(ridge)
    steps = [0.0] + [float((b - a).std(ddof=1) / math.sqrt(len(test))) for a, b in itertools.pairwise(losses)]
    means = [float(loss.mean()) for loss in losses]
    free = all(b - a <= 2 * e for a, b, e in zip(means, means[1:], steps[1:], strict=False))
    return WidthReport(chosen, tuple(means), tuple(steps), tuple(ridges), free)


def _tuned(features: Array, y: Array) -> tuple[float, Callable[[Array], Array]]:
    """Ridge of least leave-one-out error (closed form), and the predictor with it."""
    left, singular, right = np.linalg.svd(features, full_matrices=False)
    squares, turned = singular**2, left.T @ y
    best: tuple[float, float] | None = None
    for ridge in np.geomspace(1e-10, 1e2, 61) * float(squares[0] or 1.0):
        keep = squares / (squares + ridge)
        leverage = (left**2 * keep).sum(1)
        error = float((((y - left @ (keep[:, None] * turned)) / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).mean())
        if best is None or error < best[0]:
            best = error, float(ridge)
    assert best is not None
    weights = right.T @ ((singular / (squares + best[1]))[:, None] * turned)
    return best[1], lambda rows: rows @ weights
