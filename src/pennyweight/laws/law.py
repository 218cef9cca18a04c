"""A law: a form with its constants, what they were fitted on, and the receipt that every prediction carries.

Shape letters: V variables, n points, P parameters, B bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

from pennyweight.errors import DataError, OptionError
from pennyweight.laws.forms import Array, Form, find

#: A prediction further than this many times beyond the largest fitted value is marked, or refused.
DECLARED_FACTOR = 10.0


class Range(NamedTuple):
    """An interval of a quantity at a stated level."""

    low: float
    high: float


@dataclass(frozen=True)
class Extrapolation:
    """How far a point lies outside the fitted range.

    Attributes:
        factors: for each variable that grows, the value over the largest fitted one (below the range: the smallest
            fitted over the value); 1 inside.
        factor: the largest of them.
        declared: the factor beyond which a prediction is not to be trusted.
    """

    factors: Mapping[str, float]
    declared: float

    @property
    def factor(self) -> float:
        return max(self.factors.values(), default=1.0)

    @property
    def beyond(self) -> bool:
        return self.factor > self.declared

    @property
    def text(self) -> str:
        """One line of plain words."""
        if self.factor <= 1:
            return "inside the fitted range"
        worst = max(self.factors, key=lambda name: self.factors[name])
        known = f"{worst} lies {self.factor:.3g} times outside the fitted range"
        return f"warning: {known}, more than the declared {self.declared:g}" if self.beyond else known


@dataclass(frozen=True)
class FitReport:
    """How a law was fitted, and how well it holds.

    Attributes:
        points: rows used.
        objective: the sum-Huber objective at the optimum.
        delta: the Huber threshold, in the space of the residuals.
        space: "log" (residuals of log target) or "linear".
        r_squared: of the target itself.
        worst_residual: the largest absolute residual, in that space, and ``worst_point`` its row (from 1).
        starts: starts screened.
        agreeing: share of the polished starts that ended within 1e-6 of the best objective.
        held_out_error: mean relative error on the largest rows when fitted without them; None when too few rows.
        held_out_points: how many rows that was.
        intervals: 95 % bootstrap interval of each natural parameter; empty without a bootstrap.
        bootstrap: resamples drawn.
        seconds: wall time of the fit.
        notes: what a reader must know (a floor that vanished, parameters that cannot be told apart ...).
    """

    points: int
    objective: float
    delta: float
    space: str
    r_squared: float
    worst_residual: float
    worst_point: int
    starts: int
    agreeing: float
    held_out_error: float | None
    held_out_points: int
    intervals: Mapping[str, Range]
    bootstrap: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LawReceipt:
    """Which law, which constants, which units, where it was fitted, and how far this use of it reaches."""

    form: str
    formula: str
    source: str
    constants: Mapping[str, float]
    units: Mapping[str, str]
    fit_range: Mapping[str, tuple[float, float]]
    at: Mapping[str, float]
    extrapolation: Extrapolation | None
    fit: FitReport | None

    @property
    def warning(self) -> str | None:
        """What to say aloud, or None."""
        if self.extrapolation is None:
            return "warning: the fitted range of these constants is not known" if not self.fit_range else None
        return self.extrapolation.text if self.extrapolation.beyond else None

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        found: dict[str, Any] = {
            "form": self.form,
            "formula": self.formula,
            "source": self.source,
            "constants": dict(self.constants),
            "units": dict(self.units),
            "fit_range": {name: list(span) for name, span in self.fit_range.items()},
            "at": dict(self.at),
            "warning": self.warning,
        }
        if self.extrapolation is not None:
            found["extrapolation"] = {"factor": self.extrapolation.factor, "declared": self.extrapolation.declared}
        if self.fit is not None:
            fit = dict(vars(self.fit))
            fit["intervals"] = {name: list(span) for name, span in self.fit.intervals.items()}
            fit["notes"] = list(self.fit.notes)
            found["fit"] = fit
        return found


@dataclass(frozen=True)
class Prediction:
    """A predicted value, its interval where the law was bootstrapped, and the receipt of the law."""

    value: float
    interval: Range | None
    level: float
    receipt: LawReceipt


@dataclass(frozen=True, repr=False)
class Law:
    """A form with constants. Call it with its variables: ``law(N=7e9, D=1.4e12)``.

    Attributes:
        form: the form.
        constants: natural parameters by name.
        fit_range: smallest and largest fitted value of each variable; empty when not known.
        source: where the constants come from.
        report: how they were fitted, when they were fitted here.
        samples: (B, P) internal parameters of the bootstrap, for intervals of anything derived.
        axis: the name people gave the one variable of a one-variable form.
        ood: the law of the out-of-distribution points fitted along with it, if any.
    """

    form: Form
    constants: Mapping[str, float]
    fit_range: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    source: str = "given constants"
    report: FitReport | None = None
    samples: Array | None = field(default=None, repr=False)
    axis: str | None = None
    ood: Law | None = None

    def __post_init__(self) -> None:
        missing = [name for name in self.form.names if name not in self.constants]
        unknown = [name for name in self.constants if name not in self.form.names]
        if missing or unknown:
            what = ", ".join([*(f"no {name}" for name in missing), *(f"unknown {name}" for name in unknown)])
            raise OptionError(f"{self.form.name}: {what}; it takes {', '.join(self.form.names)}")

    def __repr__(self) -> str:
        constants = ", ".join(f"{name}={value:.6g}" for name, value in self.constants.items())
        return f"Law({self.form.formula}; {constants}; {self.source})"

    def __getattr__(self, name: str) -> float:
        # constants read as attributes: law.alpha. Guarded, for copy and pickle look up names before __init__ ran
        constants = self.__dict__.get("constants", {})
        if name in constants:
            return float(constants[name])
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    @property
    def params(self) -> Mapping[str, float]:
        """The natural constants by name, as ``constants``."""
        return self.constants

    @property
    def parameters(self) -> Array:
        """(P,) natural constants, in the order of the form."""
        return np.array([float(self.constants[name]) for name in self.form.names])

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of what the law depends on."""
        return tuple(self._shown(v.name) for v in self.form.variables)

    def _shown(self, name: str) -> str:
        return self.axis if self.axis and len(self.form.variables) == 1 else name

    def _point(self, args: tuple[Any, ...], x: Mapping[str, Any]) -> tuple[Array, tuple[int, ...]]:
        names = [v.name for v in self.form.variables]
        given = dict(zip(names, args, strict=False))
        for name, value in x.items():
            given[names[0] if len(names) == 1 and name == self.axis else name] = value
        if len(args) > len(names) or set(given) != set(names):
            raise OptionError(
                f"{self.form.name} is a law of {', '.join(self.variables)}; "
                f"given: {', '.join(map(str, [*args, *x])) or 'nothing'}"
            )
        try:
            arrays = np.broadcast_arrays(*(np.asarray(given[name], dtype=float) for name in names))
        except (TypeError, ValueError) as error:
            raise OptionError(f"{self.form.name}: {error}; give numbers, or arrays of one shape") from None
        flat = np.stack([a.reshape(-1) for a in arrays])
        self.form.check(flat)
        return flat, arrays[0].shape

    def _internal(self) -> Array:  # (1, P)
        for name in self.form.names:
            value = float(self.constants[name])
            if not math.isfinite(value) or (value == 0 and name in getattr(self.form, "scales", ())):
                raise DataError(
                    f"{self.form.name}: {name} = {value:g} is beyond what numbers hold, and nothing follows from it; "
                    "these points show no such law, or they want another unit"
                )
        return self.form.internal(self.parameters[None])

    def _evaluate(self, theta: Array, flat: Array) -> Array:  # (B, P), (V, n) -> (B, n)
        value = self.form.value(theta, flat)
        return np.exp(value) if self.form.space == "log" else value

    def __call__(self, *args: Any, **x: Any) -> Any:
        """The predicted target; a float for numbers, an array for arrays."""
        flat, shape = self._point(args, x)
        value = self._evaluate(self._internal(), flat)[0].reshape(shape)
        return float(value) if shape == () else value

    def predict(
        self, *args: Any, level: float = 0.95, max_factor: float = DECLARED_FACTOR, beyond: str = "warn", **x: Any
    ) -> Prediction:
        """The target at one point with its interval and receipt.

        Args:
            args: the variables in order, or by name.
            level: of the interval.
            max_factor: the declared extrapolation factor.
            beyond: "warn" writes a warning into the receipt, "refuse" raises.
            x: the variables by name.

        Raises:
            DataError: ``beyond="refuse"`` and the point lies further out than ``max_factor``.
        """
        if beyond not in ("warn", "refuse"):
            raise OptionError(f"predict: beyond = {beyond!r}; give 'warn' or 'refuse'")
        flat, _ = self._point(args, x)
        if flat.shape[1] != 1:
            raise OptionError(f"predict: {flat.shape[1]} points given; give one, or call the law for many")
        receipt = self.receipt(dict(zip(self.variables, flat[:, 0].tolist(), strict=True)), max_factor=max_factor)
        if beyond == "refuse" and receipt.extrapolation is not None and receipt.extrapolation.beyond:
            raise DataError(
                f"{self.form.name}: refused: {receipt.extrapolation.text.removeprefix('warning: ')}; "
                "fit larger runs or raise max_factor"
            )
        value = self._evaluate(self._internal(), flat)[0, 0]
        return Prediction(
            float(value), self.interval(lambda theta: self._evaluate(theta, flat)[:, 0], level), level, receipt
        )

    def interval(self, derived: Any, level: float = 0.95) -> Range | None:
        """Bootstrap interval of ``derived(theta)``, a function of (B, P) internal parameters; None without samples."""
        if self.samples is None:
            return None
        values = np.asarray(derived(self.samples))
        values = values[np.isfinite(values)]
        if not values.size:
            return None
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return Range(float(low), float(high))

    def receipt(self, at: Mapping[str, float] | None = None, *, max_factor: float = DECLARED_FACTOR) -> LawReceipt:
        """The receipt of the law, and of its use at one point."""
        at = dict(at or {})
        factors = {}
        for variable in self.form.variables:
            name = self._shown(variable.name)
            if variable.grows and name in at and name in self.fit_range:
                low, high = self.fit_range[name]
                value = at[name]
                factors[name] = max(1.0, value / high, low / value if value > 0 else math.inf)
        return LawReceipt(
            form=self.form.name,
            formula=self.form.formula,
            source=self.source,
            constants=dict(self.constants),
            units={self._shown(v.name): v.unit for v in self.form.variables}
            | {p.name: p.unit for p in self.form.parameters},
            fit_range=dict(self.fit_range),
            at=at,
            extrapolation=Extrapolation(factors, max_factor) if factors else None,
            fit=self.report,
        )

    def inverse(self, wanted: str, target: Any, **x: Any) -> Any:
        """The value of ``wanted`` at which the law predicts ``target``; nan where none does.

        Closed form where the form has one, otherwise a root in the fitted range widened to 1e3 on both sides.
        """
        names = [v.name for v in self.form.variables]
        inner = names[0] if len(names) == 1 and wanted in (self.axis, "x") else wanted
        if inner not in names:
            raise OptionError(
                f"{self.form.name}: {wanted!r} is not a variable of this law ({', '.join(self.variables)})"
            )
        self._internal()  # refuses constants that say nothing
        others = {name: np.asarray(value, dtype=float) for name, value in x.items()}
        shape = np.broadcast_shapes(np.shape(target), *(a.shape for a in others.values()))
        flat = np.broadcast_to(np.asarray(target, dtype=float), shape).reshape(-1)
        spread = {name: np.broadcast_to(a, shape).reshape(-1) for name, a in others.items()}
        try:
            found = self.form.inverse(self.parameters, inner, flat, spread)
        except OptionError:
            found = np.array(
                [self._root(inner, value, {k: float(a[i]) for k, a in spread.items()}) for i, value in enumerate(flat)]
            )
        found = np.asarray(found).reshape(shape)
        return float(found) if shape == () else found

    def _root(self, wanted: str, target: float, x: Mapping[str, float]) -> float:
        variable = next(v for v in self.form.variables if v.name == wanted)
        low, high = self.fit_range.get(wanted, (1e-3, 1e18))
        grid = np.geomspace(max(low / 1e3, variable.low or 1e-12), min(high * 1e3, variable.high), 400)
        gap = (
            np.asarray(self(**{wanted: grid}, **{name: np.full(grid.size, value) for name, value in x.items()}))
            - target
        )
        crossing = np.flatnonzero(np.sign(gap[:-1]) != np.sign(gap[1:]))
        if not crossing.size:
            return math.nan
        at = crossing[0]
        return float(brentq(lambda value: self(**{wanted: value}, **x) - target, grid[at], grid[at + 1], rtol=1e-12))


def law(form: str | Form, *, source: str = "given constants", axis: str | None = None, **constants: float) -> Law:
    """A law from known constants: ``law("chinchilla", E=1.82, A=478, alpha=0.347, B=2144, beta=0.367)``."""
    return Law(find(form), constants, source=source, axis=axis)
