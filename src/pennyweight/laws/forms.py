"""Parametric forms of scaling laws: named parameters, units, domain guards, gradients, inverses, and their registry.

Every form is written once, for a whole batch of parameter sets at a time, in *internal* parameters: logarithms of what
must be positive (coefficients, scales), plain numbers for exponents. In them a sum of power laws is a log-sum-exp of
linear functions, which is what makes thousands of starts in one pass cheap (`pennyweight.laws.fitter`). People read and
write *natural* parameters (A, alpha, x0 ...); `Form.internal` and `Form.natural` go between the two.

Source of the log-sum-exp parametrization: J. Hoffmann et al., "Training Compute-Optimal Large Language Models",
arXiv:2203.15556, section D.2. Each form names its own source.

Shape letters: K parameter sets, P parameters, V variables, n points, T terms of a sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pennyweight.errors import DataError, OptionError

Array = NDArray[np.float64]
Space = Literal["log", "linear"]


@dataclass(frozen=True)
class Variable:
    """What a law depends on: its column name, its unit, other names it goes by, and where it is defined."""

    name: str
    unit: str
    synonyms: tuple[str, ...] = ()
    low: float = 0.0
    high: float = float("inf")
    low_included: bool = False
    grows: bool = True  # a size that extrapolation goes up in (N, D, C ...), not a ratio or a loss

    def check(self, values: Array, where: str) -> None:
        """Refuse values outside the domain.

        Raises:
            DataError: a value that is not finite, or outside (low, high].
        """
        below = values < self.low if self.low_included else values <= self.low
        wrong = ~np.isfinite(values) | below | (values > self.high)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            sign = ">=" if self.low_included else ">"
            top = "" if np.isinf(self.high) else f" and <= {self.high:g}"
            raise DataError(
                f"{where}: {self.name} ({self.unit}) is {values[at]:g} in point {at + 1} of {values.size}; "
                f"the law is defined for {self.name} {sign} {self.low:g}{top}"
            )


@dataclass(frozen=True)
class Parameter:
    """One number a form is fitted for.

    Attributes:
        name: as formulae here and in the sheets write it.
        unit: in words.
        positive: kept positive by fitting its logarithm.
        start: (low, high) of the starts, internal, after variables and target were brought to a geometric mean of 1.
    """

    name: str
    unit: str
    positive: bool
    start: tuple[float, float]


def coefficient(name: str, unit: str = "as the target") -> Parameter:
    """A positive factor of a term, from a thousandth of the typical target up to a little over it."""
    return Parameter(name, unit, True, (-6.0, 0.7))


def exponent(name: str, low: float = 0.01, high: float = 1.5) -> Parameter:
    """A power, free in sign once the fit runs."""
    return Parameter(name, "exponent", False, (low, high))


class Form(ABC):
    """A parametric law. Final classes below say how it is evaluated; instances say which law it is."""

    name: str
    formula: str
    variables: tuple[Variable, ...]
    parameters: tuple[Parameter, ...]
    target: str
    space: Space  # of the residuals: "log" for positive losses
    row: int | None
    paper: str
    summary: str

    def __repr__(self) -> str:
        return f"Form({self.name}: {self.formula})"

    @abstractmethod
    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """Prediction in `space` (K, n) and its derivative by the internal parameters (K, n, P).

        Args:
            theta: (K, P) internal parameters.
            x: (V, n) variables, natural.
        """

    def value(self, theta: Array, x: Array) -> Array:
        """The prediction alone, (K, n), in `space`."""
        return self.evaluate(theta, x)[0]

    @abstractmethod
    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        """Internal parameters of the same law, variables divided by exp(log_scale), the target by exp(log_target)."""

    def natural(self, theta: Array) -> Array:
        """(K, P) internal to natural."""
        positive = self._positive
        return np.where(positive, np.exp(np.where(positive, theta, 0.0)), theta)

    def internal(self, natural: Array) -> Array:
        """(K, P) natural to internal.

        Raises:
            OptionError: a parameter that must be positive is not.
        """
        natural = np.asarray(natural, dtype=float)
        for index, parameter in enumerate(self.parameters):
            if parameter.positive and not (natural[..., index] >= 0).all():
                raise OptionError(f"{self.name}: {parameter.name} = {natural[..., index].min():g} must not be negative")
        # a coefficient of 0 is a term that is not there; a logarithm of -690 says so and stays finite in products
        return np.where(self._positive, np.log(np.where(self._positive, np.maximum(natural, 1e-300), 1.0)), natural)

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        """The value of variable ``wanted`` at which the law gives ``target``, in closed form.

        Raises:
            OptionError: this form has no closed form for it.
        """
        raise OptionError(f"{self.name}: no closed form for {wanted}")

    def limits(self, theta: Array, x: Array) -> tuple[Array, Array] | None:
        """What a meaningful law keeps at or below 0, (K, m), and its slopes (K, m, P); None without such limits."""
        return None

    @property
    def falls(self) -> tuple[tuple[str, str], ...]:
        """(variable, exponent) of the terms in which the target should fall as the variable grows."""
        return ()

    @property
    def _positive(self) -> NDArray[np.bool_]:
        return np.array([parameter.positive for parameter in self.parameters])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(parameter.name for parameter in self.parameters)

    def column(self, theta: Array, name: str) -> Array:
        """One parameter of every set, (K,)."""
        return theta[..., self.names.index(name)]

    def check(self, x: Array) -> None:
        """Refuse variables outside the domain."""
        for variable, values in zip(self.variables, x, strict=True):
            variable.check(values, self.name)

    def start_box(self, x: Array, y: Array) -> tuple[Array, Array]:
        """(P,) lowest and highest internal start, for normalized variables ``x`` (V, n) and target ``y`` (n,)."""
        low, high = np.array([parameter.start for parameter in self.parameters]).T
        return low, high


@dataclass(frozen=True)
class Term:
    """``sign * coefficient * prod variable^(direction * exponent)`` of a `Posynomial`."""

    coefficient: str
    powers: tuple[tuple[str, str, int], ...] = ()  # (variable, exponent, +1 or -1)
    sign: int = 1


@dataclass(frozen=True, kw_only=True, repr=False)
class Posynomial(Form):
    """A sum of power-law terms, which covers most published laws.

    With ``scales`` = {x0: (A, alpha)} the coefficient A is shown to people as ``x0 = A^(1/alpha)``.
    """

    name: str
    formula: str
    variables: tuple[Variable, ...]
    parameters: tuple[Parameter, ...]
    terms: tuple[Term, ...]
    target: str = "loss"
    space: Space = "log"
    row: int | None = None
    paper: str = ""
    summary: str = ""
    exponential: tuple[str, ...] = ()  # variables that enter as 2^x (bits)
    scales: Mapping[str, str] = field(default_factory=dict)  # natural scale parameter -> its exponent

    def __post_init__(self) -> None:
        known = {parameter.name for parameter in self.parameters}
        used = {t.coefficient for t in self.terms} | {p for t in self.terms for _, p, _ in t.powers}
        assert known == used, f"{self.name}: parameters {known ^ used} are declared or used, not both"
        assert self.space == "linear" or all(t.sign == 1 for t in self.terms), (
            f"{self.name}: a log needs positive terms"
        )

    @property
    def falls(self) -> tuple[tuple[str, str], ...]:
        return tuple((v, p) for term in self.terms if term.sign > 0 for v, p, direction in term.powers if direction < 0)

    def _logs(self, x: Array) -> Array:  # (V, n): what the exponents multiply
        exponential = np.array([v.name in self.exponential for v in self.variables])[:, None]
        with np.errstate(divide="ignore"):
            return np.where(exponential, x * np.log(2.0), np.log(np.where(exponential, 1.0, x)))

    def _design(self, x: Array) -> Array:  # (T, n, P): log term = design @ theta
        logs, n = self._logs(x), x.shape[1]
        variables = [v.name for v in self.variables]
        design = np.zeros((len(self.terms), n, len(self.parameters)))
        for row, term in zip(design, self.terms, strict=True):
            row[:, self.names.index(term.coefficient)] = 1.0
            for variable, power, direction in term.powers:
                row[:, self.names.index(power)] += direction * logs[variables.index(variable)]
        return design

    def _log_terms(self, theta: Array, design: Array) -> Array:  # (K, T, n)
        terms, n, _ = design.shape
        return (theta @ design.reshape(terms * n, -1).T).reshape(len(theta), terms, n)

    def value(self, theta: Array, x: Array) -> Array:
        logs = self._log_terms(theta, self._design(x))
        if self.space == "linear":
            signs = np.array([float(t.sign) for t in self.terms])
            return np.asarray(np.einsum("t,ktn->kn", signs, np.exp(logs)))
        top = logs.max(1)
        return np.asarray(top + np.log(np.exp(logs - top[:, None]).sum(1)))

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        design = self._design(x)
        logs = self._log_terms(theta, design)
        if self.space == "linear":
            weights = np.exp(logs) * np.array([float(t.sign) for t in self.terms])[:, None]
            value = weights.sum(1)
        else:
            top = logs.max(1, keepdims=True)
            weights = np.exp(logs - top)
            total = weights.sum(1, keepdims=True)
            value, weights = (top + np.log(total))[:, 0], weights / total
        # a loop over the few terms: one einsum over (k, t, n, p) is four times slower
        gradient = np.zeros((len(theta), x.shape[1], len(self.parameters)))
        for index in range(len(self.terms)):
            for p in np.flatnonzero(design[index].any(0)):
                gradient[:, :, p] += weights[:, index] * design[index, :, p]
        return value, gradient

    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        theta = np.array(theta, dtype=float)
        variables = [v.name for v in self.variables]
        for term in self.terms:
            shift = np.full(theta.shape[:-1], -log_target)
            for variable, power, direction in term.powers:
                if variable not in self.exponential:
                    shift = shift + direction * self.column(theta, power) * log_scale[variables.index(variable)]
            theta[..., self.names.index(term.coefficient)] += shift
        return theta

    def natural(self, theta: Array) -> Array:
        theta = np.array(theta, dtype=float)
        for scale, power in self.scales.items():
            theta[..., self.names.index(scale)] /= self.column(theta, power)
        with np.errstate(over="ignore"):  # x0 = A^(1/alpha) of a flat law is astronomically large; say inf, do not warn
            return super().natural(theta)

    def internal(self, natural: Array) -> Array:
        theta = super().internal(natural)
        for scale, power in self.scales.items():
            theta[..., self.names.index(scale)] *= self.column(theta, power)
        return theta

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        holding = [t for t in self.terms if any(v == wanted for v, _, _ in t.powers)]
        if len(holding) != 1 or wanted in self.exponential:
            return super().inverse(natural, wanted, target, x)
        theta = self.internal(np.atleast_2d(natural))[0]
        point = np.stack([np.asarray(x.get(v.name, 1.0), dtype=float) * np.ones_like(target) for v in self.variables])
        logs = self._log_terms(theta[None], self._design(point))[0]  # (T, n), `wanted` at 1
        this = self.terms.index(holding[0])
        signs = np.array([float(t.sign) for t in self.terms])
        others = np.delete(np.exp(logs) * signs[:, None], this, axis=0).sum(0)
        slope = sum(d * self.column(theta, p) for v, p, d in holding[0].powers if v == wanted)
        room = (target - others) * holding[0].sign
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            found = np.exp((np.log(room) - logs[this]) / slope)
        return np.where(room > 0, found, np.nan)


REGISTRY: dict[str, Form] = {}


def register(form: Form) -> Form:
    """Add a form to the registry under its name."""
    assert form.name not in REGISTRY, f"form {form.name} registered twice"
    REGISTRY[form.name] = form
    return form


def find(name: str | Form) -> Form:
    """The form called ``name``.

    Raises:
        OptionError: no such form; the nearest names are offered.
    """
    if isinstance(name, Form):
        return name
    if name not in REGISTRY:
        near = get_close_matches(str(name), REGISTRY, n=3) or sorted(REGISTRY)
        raise OptionError(
            f"no law form is called {name!r}; did you mean {', '.join(near)}? list: `pennyweight laws list`"
        )
    return REGISTRY[name]


def all_forms() -> Sequence[Form]:
    """Every form, by name."""
    return [REGISTRY[name] for name in sorted(REGISTRY)]


N = Variable("N", "parameters (say which: the papers differ)", ("params", "parameters", "model_size"))
D = Variable("D", "tokens", ("tokens", "train_tokens", "dataset_size"))
S = Variable("S", "optimizer steps", ("steps",))
X = Variable("x", "any one unit: parameters, tokens, PF-days ...", ("N", "D", "C"))

register(
    Posynomial(
        name="power",
        formula="L = (x0/x)^alpha",
        variables=(X,),
        parameters=(Parameter("x0", "as x", True, (-1.0, 1.0)), exponent("alpha")),
        terms=(Term("x0", (("x", "alpha", -1),)),),
        scales={"x0": "alpha"},
        row=42,
        paper="J. Kaplan et al., Scaling Laws for Neural Language Models, arXiv:2001.08361",
        summary="a pure power law: no floor, right only over a small range",
    )
)
register(
    Posynomial(
        name="power_const",
        formula="L = L_inf + (x0/x)^alpha",
        variables=(X,),
        parameters=(coefficient("L_inf"), Parameter("x0", "as x", True, (-6.0, 1.0)), exponent("alpha")),
        terms=(Term("L_inf"), Term("x0", (("x", "alpha", -1),))),
        scales={"x0": "alpha"},
        row=50,
        paper="T. Henighan et al., Scaling Laws for Autoregressive Generative Modeling, arXiv:2010.14701",
        summary="a power law above a floor; the floor estimates the entropy of the data",
    )
)
register(
    Posynomial(
        name="chinchilla",
        formula="L = E + A/N^alpha + B/D^beta",
        variables=(N, D),
        parameters=(coefficient("E"), coefficient("A"), exponent("alpha"), coefficient("B"), exponent("beta")),
        terms=(Term("E"), Term("A", (("N", "alpha", -1),)), Term("B", (("D", "beta", -1),))),
        paper="J. Hoffmann et al., Training Compute-Optimal Large Language Models, arXiv:2203.15556",
        summary="loss from size and tokens; gives the compute-optimal split",
    )
)
register(
    Posynomial(
        name="reference",
        formula="L = a*N^-alpha + b*D^-beta",
        variables=(N, D),
        parameters=(coefficient("a"), exponent("alpha"), coefficient("b"), exponent("beta")),
        terms=(Term("a", (("N", "alpha", -1),)), Term("b", (("D", "beta", -1),))),
        row=250,
        paper="C. Xiao et al., Densing Law of LLMs, arXiv:2412.04315",
        summary="conditional loss of a family of reference models, without a floor",
    )
)
register(
    Posynomial(
        name="kaplan_LNS",
        formula="L = (N_c/N)^alpha_N + (S_c/S)^alpha_S",
        variables=(N, S),
        parameters=(
            Parameter("N_c", "parameters", True, (-4.0, 0.5)),
            exponent("alpha_N"),
            Parameter("S_c", "steps", True, (-4.0, 0.5)),
            exponent("alpha_S"),
        ),
        terms=(Term("N_c", (("N", "alpha_N", -1),)), Term("S_c", (("S", "alpha_S", -1),))),
        scales={"N_c": "alpha_N", "S_c": "alpha_S"},
        row=90,
        paper="H. Su et al., Unraveling the Mystery of Scaling Laws: Part I, arXiv:2403.06563",
        summary="a whole loss curve from size and steps at a batch well above the critical one",
    )
)
_VOCABULARY = (
    Variable("N_nv", "parameters outside the vocabulary", ("nonvocab_params",)),
    Variable("N_v", "vocabulary parameters, V*d", ("vocab_params",)),
    D,
)
register(
    Posynomial(
        name="vocab",
        formula="L_u = -E + A1/N_nv^alpha1 + A2/N_v^alpha2 + B/D^beta",
        variables=_VOCABULARY,
        parameters=(
            coefficient("E"),
            coefficient("A1"),
            exponent("alpha1"),
            coefficient("A2"),
            exponent("alpha2"),
            coefficient("B"),
            exponent("beta"),
        ),
        terms=(
            Term("E", sign=-1),
            Term("A1", (("N_nv", "alpha1", -1),)),
            Term("A2", (("N_v", "alpha2", -1),)),
            Term("B", (("D", "beta", -1),)),
        ),
        target="loss_unigram_normalised",
        space="linear",  # this loss is negative
        row=74,
        paper="C. Tao et al., Scaling Laws with Vocabulary, arXiv:2407.13623",
        summary="unigram-normalized loss from model, vocabulary and tokens",
    )
)
register(
    Posynomial(
        name="vocab_tied",
        formula="L_u = -E + A1/N_nv^beta + A2/N_v^alpha2 + B/D^beta",
        variables=_VOCABULARY,
        parameters=(
            coefficient("E"),
            coefficient("A1"),
            coefficient("A2"),
            exponent("alpha2"),
            coefficient("B"),
            exponent("beta"),
        ),
        terms=(
            Term("E", sign=-1),
            Term("A1", (("N_nv", "beta", -1),)),
            Term("A2", (("N_v", "alpha2", -1),)),
            Term("B", (("D", "beta", -1),)),
        ),
        target="loss_unigram_normalised",
        space="linear",
        row=74,
        paper="C. Tao et al., Scaling Laws with Vocabulary, arXiv:2407.13623",
        summary="the same with equal exponents of size and tokens, as its authors fit it",
    )
)
