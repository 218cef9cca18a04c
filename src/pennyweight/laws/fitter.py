"""The one robust fitter behind every law here.

Objective: the *sum* over points of the Huber function (threshold 1e-3) of the residual of log loss, after J. Hoffmann
et al., arXiv:2203.15556, section D.2. The sum matters: T. Besiroglu et al., "Chinchilla Scaling: A replication
attempt", arXiv:2404.10102, found that the mean is so small that L-BFGS-B stops early.

Method: variables and target are divided by their geometric means, which makes starts free of units and takes most of
the correlation out of coefficients and exponents. All starts are screened in one vectorized pass; the best are polished
together by Levenberg-Marquardt steps on the quadratic that touches the Huber function from above (weights
min(1, threshold/|r|)). The bootstrap is the same polish with a thousand sets of row weights at once. Differs from the
sources: they run L-BFGS from every start, one after another.

Shape letters: K parameter sets, P parameters, V variables, n points.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import qmc

from pennyweight.errors import DataError, OptionError
from pennyweight.laws.forms import Array, Form, find
from pennyweight.laws.law import FitReport, Law, Range
from pennyweight.laws.table import Points, read, read_csv

HUBER = 1e-3
STARTS = 4096
SURVIVORS = 32
#: Exponents of published laws lie around this. Used only where points are no more than parameters, with HUBER as noise:
#: there rounding alone decides the exponent (row 59: 0.38 to 1 from four accuracies of three digits).
EXPONENT, EXPONENT_SPREAD = 0.35, 0.2
_CHUNK = 1 << 18  # elements a screening pass holds at once: stays in cache


@dataclass(frozen=True)
class _Problem:
    """Points in normalized units: every variable and a positive target have geometric mean 1."""

    form: Form
    x: Array  # (V, n) normalized
    y: Array  # (n,) log target or target, normalized
    log_scale: Array  # (V,)
    log_target: float
    delta: float
    prior: tuple[Array, Array] | None = None  # mean and precision of the internal parameters, where points are too few

    @classmethod
    def of(cls, form: Form, x: Array, y: Array, delta: float) -> _Problem:
        log_scale = np.array(
            [
                float(np.log(values).mean()) if variable.grows and (values > 0).all() else 0.0
                for variable, values in zip(form.variables, x, strict=True)
            ]
        )
        log_target = float(np.log(y).mean()) if form.space == "log" else 0.0
        normalized = np.log(y) - log_target if form.space == "log" else y
        prior = None
        if y.size <= len(form.parameters):
            free = np.array([p.unit == "exponent" and not p.positive for p in form.parameters])
            prior = np.full(free.size, EXPONENT), free * (HUBER / EXPONENT_SPREAD) ** 2
        return cls(form, x / np.exp(log_scale)[:, None], normalized, log_scale, log_target, delta, prior)

    def into(self, theta: Array) -> Array:
        return self.form.rescaled(theta, self.log_scale, self.log_target)

    def out(self, theta: Array) -> Array:
        return self.form.rescaled(theta, -self.log_scale, -self.log_target)

    def huber(self, residual: Array) -> Array:
        size = np.abs(residual)
        if math.isinf(self.delta):
            return 0.5 * size * size
        inside = np.minimum(size, self.delta)
        return inside * (size - 0.5 * inside)

    def objective(self, theta: Array, weights: Array | float = 1.0) -> Array:
        """(K,) objectives; infinite where the form overflows."""
        step = max(1, _CHUNK // (self.x.shape[1] * len(self.form.parameters)))
        found = np.empty(len(theta))
        with np.errstate(all="ignore"):  # a start far out may overflow; it then simply loses
            for start in range(0, len(theta), step):
                part = slice(start, start + step)
                value = self.huber(self.form.value(theta[part], self.x) - self.y)
                each = weights if isinstance(weights, float) else weights[part]
                found[part] = (value * each).sum(1)
                if self.prior is not None:
                    found[part] += 0.5 * (self.prior[1] * (theta[part] - self.prior[0]) ** 2).sum(1)
                limits = self.form.limits(theta[part], self.x)
                if limits is not None:
                    found[part] += 0.5 * (np.maximum(limits[0], 0.0) ** 2).sum(1)
        return np.where(np.isfinite(found), found, np.inf)

    def polish(self, theta: Array, weights: Array, iterations: int = 300) -> tuple[Array, Array]:
        """Minimize from every row of ``theta`` (K, P) under row weights (K, n); all rows advance together."""
        theta, objective = theta.copy(), self.objective(theta, weights)
        damping = np.full(len(theta), 1e-3)
        still = np.zeros(len(theta), dtype=int)  # steps in a row that changed nothing worth having
        for _ in range(iterations):
            live = np.flatnonzero((still < 5) & np.isfinite(objective) & (damping < 1e12))
            if not live.size:
                break
            with np.errstate(all="ignore"):
                value, slope = self.form.evaluate(theta[live], self.x)
                residual = value - self.y
                touch = weights[live] * np.minimum(1.0, self.delta / np.maximum(np.abs(residual), 1e-300))
                gradient = ((touch * residual)[:, None] @ slope)[:, 0]
                curvature = slope.transpose(0, 2, 1) @ (touch[:, :, None] * slope)
                if self.prior is not None:
                    gradient += self.prior[1] * (theta[live] - self.prior[0])
                    curvature += np.diag(self.prior[1])
                limits = self.form.limits(theta[live], self.x)
                if limits is not None:
                    over, tilt = np.maximum(limits[0], 0.0), limits[1] * (limits[0] > 0)[..., None]
                    gradient += (over[:, None] @ tilt)[:, 0]
                    curvature += tilt.transpose(0, 2, 1) @ tilt
            diagonal = np.einsum("kpp->kp", curvature)
            # a parameter without influence gets a small pull of its own, so that the system stays solvable
            floor = 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
            eye = np.eye(theta.shape[1])
            curvature = curvature + (damping[live, None] * (diagonal + floor) + floor)[:, :, None] * eye
            good = np.isfinite(curvature).all((1, 2)) & np.isfinite(gradient).all(1)
            curvature[~good], gradient[~good] = eye, 0.0
            step = -np.linalg.solve(curvature, gradient[..., None])[..., 0]
            step *= np.minimum(1.0, 5.0 / np.maximum(np.abs(step).max(1, keepdims=True), 1e-300))
            trial = theta[live] + step
            reached = self.objective(trial, weights[live])
            better = reached < objective[live]
            gain = objective[live] - reached
            slow = ~better | (gain <= 1e-12 * objective[live])
            still[live] = np.where(slow, still[live] + 1, 0)
            theta[live[better]], objective[live[better]] = trial[better], reached[better]
            damping[live] = np.where(better, np.maximum(damping[live] / 4, 1e-14), damping[live] * 5)
        return theta, objective

    def starts(self, count: int) -> Array:
        low, high = self.form.start_box(self.x, self.y)
        draws = qmc.Sobol(len(low), scramble=True, rng=np.random.default_rng(0)).random_base2(
            max(1, math.ceil(math.log2(count)))
        )
        return np.asarray(low + (high - low) * draws[:count])

    def best(self, starts: Array, survivors: int) -> tuple[Array, Array]:
        """The polished survivors, best first: parameters and objectives."""
        order = np.argsort(self.objective(starts), kind="stable")[:survivors]
        theta, objective = self.polish(starts[order], np.ones((len(order), self.y.size)))
        order = np.argsort(objective, kind="stable")
        return theta[order], objective[order]


def fit(
    points: Any,
    form: str | Form = "power_const",
    *,
    axis: str | None = None,
    target: str | None = None,
    units: Mapping[str, float] | None = None,
    delta: float = HUBER,
    starts: int | ArrayLike = STARTS,
    survivors: int = SURVIVORS,
    bootstrap: int = 0,
    seed: int = 0,
    holdout: bool = True,
    ood: Any = None,
) -> Law:
    """Fit a law to measured points.

    Args:
        points: columns by name, rows by name, a table with the target last, or the path of a CSV file; see
            `pennyweight.laws.table.read`.
        form: name of the form (`pennyweight laws list`).
        axis: the column that is the variable of a one-variable form.
        target: the column predicted.
        units: factors by column, ``{"D": 1e9}`` when D is written in billions.
        delta: Huber threshold; ``math.inf`` is least squares.
        starts: how many starts are screened, or the starts themselves, (K, P) natural parameters.
        survivors: how many of the best are polished.
        bootstrap: resamples for the intervals; 0 for none.
        seed: of the bootstrap.
        holdout: also refit without the largest rows, and report the error on them.
        ood: points of an out-of-distribution set; their own law is then the ``ood`` of the answer.

    Raises:
        DataError: too few points, a column missing or constant, variables that only vary together.
        UnitError: columns whose units cannot belong together.
    """
    began = time.perf_counter()
    form = find(form)
    if not delta > 0:
        raise OptionError(f"fit: delta = {delta!r}; give a positive Huber threshold, or math.inf for least squares")
    if bootstrap < 0 or survivors < 1:
        raise OptionError(f"fit: bootstrap = {bootstrap}, survivors = {survivors}; give at least 0 and at least 1")
    table = read(points, form, axis=axis, target=target, units=units)
    _enough(form, table)
    problem = _Problem.of(form, table.x, table.y, delta)
    first = _starts(problem, starts)
    polished, objectives = problem.best(first, survivors)
    if not np.isfinite(objectives[0]):
        raise DataError(
            f"{form.name}: no start gives a finite objective; check the units of the points, or give starts"
        )
    theta = polished[0]
    samples, intervals = None, {}
    if bootstrap:
        samples = problem.out(_bootstrap(problem, polished, bootstrap, seed))
        natural = form.natural(samples)
        with np.errstate(invalid="ignore"):
            low, high = np.quantile(natural, [0.025, 0.975], axis=0)
        intervals = {name: Range(float(a), float(b)) for name, a, b in zip(form.names, low, high, strict=True)}
    held_out, held_points = _largest_out(problem, polished) if holdout else (None, 0)
    report = _report(problem, table, theta, objectives, len(first), bootstrap, intervals)
    report = replace(report, held_out_error=held_out, held_out_points=held_points, seconds=time.perf_counter() - began)
    constants = form.natural(problem.out(theta[None]))[0]
    outside = None
    if ood is not None:
        outside = fit(
            ood, form, axis=axis, target=target, units=units, delta=delta, starts=starts, survivors=survivors,
            bootstrap=bootstrap, seed=seed, holdout=holdout,
        )  # fmt: skip
    return Law(
        form,
        dict(zip(form.names, constants.tolist(), strict=True)),
        fit_range={
            (table.axis or v.name) if len(form.variables) == 1 else v.name: (float(a.min()), float(a.max()))
            for v, a in zip(form.variables, table.x, strict=True)
        },
        source=f"fitted here to {table.y.size} points",
        report=report,
        samples=samples,
        axis=table.axis,
        ood=outside,
    )


def fit_csv(path: str | Path, form: str | Form, **options: Any) -> Law:
    """Fit a law to the columns of a CSV file; options as `fit`."""
    return fit(read_csv(path), form, **options)


def _starts(problem: _Problem, starts: int | ArrayLike) -> Array:
    if isinstance(starts, int):
        if starts < 1:
            raise OptionError(f"fit: starts = {starts}; give at least 1")
        return problem.starts(starts)
    given = np.atleast_2d(np.asarray(starts, dtype=float))
    if given.shape[1] != len(problem.form.parameters):
        raise OptionError(
            f"fit: starts of shape {given.shape}; give one column for each of {', '.join(problem.form.names)}"
        )
    return problem.into(problem.form.internal(given))


def _enough(form: Form, table: Points) -> None:
    count, distinct = len(form.parameters), len(np.unique(np.vstack([table.x, table.y]).T, axis=0))
    if distinct < count:
        raise DataError(
            f"{form.name}: {distinct} distinct points for {count} parameters ({', '.join(form.names)}); "
            f"give at least {count}, better {2 * count} or more"
        )
    names = [(table.axis or v.name) if len(form.variables) == 1 else v.name for v in form.variables]
    for name, values in zip(names, table.x, strict=True):
        if len(np.unique(values)) < 2:
            raise DataError(
                f"{form.name}: {name} is {values[0]:g} in every point; vary it, or choose a form without it"
            )
    if np.ptp(table.y) == 0:
        raise DataError(f"{form.name}: the target is {table.y[0]:g} in every point; there is no law to fit")
    sizes = [index for index, v in enumerate(form.variables) if v.grows and (table.x[index] > 0).all()]
    if len(sizes) > 1:
        logs = np.log(table.x[sizes])
        singular = np.linalg.svd(logs - logs.mean(1, keepdims=True), compute_uv=False)
        if singular[-1] <= 1e-9 * singular[0]:
            raise DataError(
                f"{form.name}: {' and '.join(names[i] for i in sizes)} only vary together (a fixed ratio); "
                "what belongs to which cannot be told; add runs off that line"
            )


def _bootstrap(problem: _Problem, polished: Array, count: int, seed: int) -> Array:
    rng, n = np.random.default_rng(seed), problem.y.size
    need = len(problem.form.parameters)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=count).astype(float)
    for _ in range(100):  # a resample with fewer distinct rows than parameters has no unique fit: draw it again
        thin = np.flatnonzero((weights > 0).sum(1) < min(need, n))
        if not thin.size:
            break
        weights[thin] = rng.multinomial(n, np.full(n, 1 / n), size=thin.size)
    # from the two best distinct optima: on another resample the runner-up may win
    other = next((row for row in polished[1:] if np.abs(row - polished[0]).max() > 1e-2), None)
    found, reached = problem.polish(np.repeat(polished[:1], count, axis=0), weights)
    if other is not None:
        again, lower = problem.polish(np.repeat(other[None], count, axis=0), weights)
        found = np.where((lower < reached)[:, None], again, found)
    return found


def _largest_out(problem: _Problem, polished: Array) -> tuple[float | None, int]:
    """Mean error on the largest tenth of the rows when fitted without them: relative, or absolute in linear space."""
    growing = [i for i, v in enumerate(problem.form.variables) if v.grows and (problem.x[i] > 0).all()]
    if not growing:
        return None, 0
    size = np.log(problem.x[growing]).sum(0)
    kept = size < np.sort(size)[-max(1, size.size // 10)]
    if kept.sum() <= len(problem.form.parameters):
        return None, 0
    rest = replace(problem, x=problem.x[:, kept], y=problem.y[kept])
    if any(len(np.unique(row)) < 2 for row in rest.x):
        return None, 0
    theta, _ = rest.best(np.vstack([polished[:8], rest.starts(256)]), 16)
    gap = (problem.form.value(theta[:1], problem.x)[0] - problem.y)[~kept]
    error = np.abs(np.expm1(gap)) if problem.form.space == "log" else np.abs(gap)
    return float(error.mean()), int((~kept).sum())


def _report(
    problem: _Problem,
    table: Points,
    theta: Array,
    objectives: Array,
    starts: int,
    bootstrap: int,
    intervals: dict[str, Range],
) -> FitReport:
    form, n = problem.form, problem.y.size
    value, slope = form.evaluate(theta[None], problem.x)
    residual = value[0] - problem.y
    predicted = np.exp(value[0] + problem.log_target) if form.space == "log" else value[0]
    top = np.abs(table.y).max()  # squares of what is far from 1 would overflow
    shown = table.y / top
    worst = int(np.abs(residual).argmax())
    notes = list(table.notes)
    size = np.linalg.norm(slope[0], axis=0)
    lost = size < 1e-5 * size.max()
    for name in np.array(form.names)[lost]:
        notes.append(f"{name} has no influence at the optimum: these points do not show it")
    shaped = slope[0][:, ~lost] / size[~lost]
    if np.linalg.cond(shaped) > 1e7:
        direction = np.linalg.svd(shaped)[2][-1]
        mixed = [name for name, part in zip(np.array(form.names)[~lost], direction, strict=True) if abs(part) > 0.3]
        notes.append(f"{' and '.join(mixed)} cannot be told apart on these points; trust predictions, not their values")
    natural = form.natural(problem.out(theta[None]))[0]
    for variable, power in form.falls:
        if (exponent := natural[form.names.index(power)]) < 0:
            column = (table.axis or variable) if len(form.variables) == 1 else variable
            notes.append(f"{power} = {exponent:.4g} is negative: on these points the {form.target} rises with {column}")
    if n == len(form.parameters):
        notes.append(
            "as many points as parameters: nothing checks the law, and exponents were drawn toward "
            f"{EXPONENT} +- {EXPONENT_SPREAD}"
        )
    return FitReport(
        points=n,
        objective=float(problem.huber(residual).sum()),
        delta=problem.delta,
        space=form.space,
        r_squared=float(1 - ((predicted / top - shown) ** 2).sum() / ((shown - shown.mean()) ** 2).sum()),
        worst_residual=float(abs(residual[worst])),
        worst_point=worst + 1,
        starts=starts,
        agreeing=float((objectives <= objectives[0] + 1e-6 * max(objectives[0], 1e-12)).mean()),
        held_out_error=None,
        held_out_points=0,
        intervals=intervals,
        bootstrap=bootstrap,
        seconds=0.0,
        notes=tuple(notes),
    )
