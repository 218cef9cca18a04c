"""Capacity density: how many parameters of a reference family a model is worth, over how many it has.

Row 250. Source: C. Xiao et al., "Densing Law of LLMs", arXiv:2412.04315 (v2): reference models fitted as
L = a N^-alpha + b D^-beta; score from loss S = c/(1 + exp(-gamma (L - l))) + d; the effective size N_hat inverts both
at D0 tokens (1e12); density = N_hat / N; its running maximum over time grows as exp(A t + B).

Units of N and D as in the reference family; D0 in the same one.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pennyweight.elementwise import numbers as numbers_only
from pennyweight.errors import DataError, OptionError
from pennyweight.laws.fitter import fit
from pennyweight.laws.law import Law
from pennyweight.laws.published import refit
from pennyweight.laws.table import columns, numbers


class Bounded(float):
    """A number, or what is known of it: ``bound`` is None, "at least" or "at most"; ``reason`` says why."""

    bound: str | None
    reason: str | None

    def __new__(cls, value: float, bound: str | None = None, reason: str | None = None) -> Bounded:
        made = super().__new__(cls, value)
        made.bound, made.reason = bound, reason
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return (Bounded, (float(self), self.bound, self.reason))


class Trend(NamedTuple):
    """ln(density) = A t + B over the running maximum, t in days since ``start``."""

    A: float
    B: float
    r_squared: float
    doubling_days: float
    start: datetime.date | None


@dataclass(frozen=True)
class Reference:
    """A family of reference models and the score its loss gives.

    Attributes:
        a: coefficient of size; with ``alpha`` its exponent.
        alpha: exponent of size.
        b: coefficient of tokens; with ``beta`` its exponent.
        beta: exponent of tokens.
        c: score between chance and ceiling; None (with gamma, l, d) when only losses are used.
        gamma: steepness, below 0 when less loss is better.
        l: loss in the middle.
        d: score of chance.
        D0: tokens the effective size is stated at.
        largest: largest model of the family, for bounds; None when not known.
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float | None = None
    gamma: float | None = None
    l: float | None = None  # noqa: E741 - the letter of the source
    d: float | None = None
    D0: float = 1e12
    largest: float | None = None

    def loss(self, N: float, D: float) -> float:
        """Conditional loss of a reference model."""
        return float(self.a * N**-self.alpha + self.b * D**-self.beta)

    def _score_constants(self) -> tuple[float, float, float, float]:
        if self.c is None or self.gamma is None or self.l is None or self.d is None:
            raise OptionError("density: this reference has no score curve; give losses, or fit it with scored models")
        return self.c, self.gamma, self.l, self.d

    def score(self, N: float, D: float) -> float:
        """Score of a reference model."""
        c, gamma, middle, d = self._score_constants()
        return c / (1 + math.exp(-gamma * (self.loss(N, D) - middle))) + d

    def loss_of_score(self, score: float) -> Bounded:
        """The loss that a score stands for; unbounded at chance and at the ceiling."""
        c, gamma, middle, d = self._score_constants()
        if score <= d:
            return Bounded(math.inf, "at least", f"the score {score:g} is not above chance ({d:g})")
        if score >= c + d:
            return Bounded(-math.inf, "at most", f"the score {score:g} is at or above the ceiling ({c + d:g})")
        return Bounded(middle - math.log(c / (score - d) - 1) / gamma)

    def effective_params(self, score: float | None = None, *, loss: float | None = None) -> Bounded:
        """Size of the reference model, trained on D0 tokens, of the same score or loss.

        A score at chance gives "at most 0"; one that no reference size reaches gives "at least" the largest of the
        family (infinity when it is not known).
        """
        if (score is None) == (loss is None):
            raise OptionError("effective_params: give a score or a loss, one of them")
        numbers_only("effective_params", **({"score": score} if loss is None else {"loss": loss}))
        reached = Bounded(loss) if loss is not None else self.loss_of_score(float(score))  # type: ignore[arg-type]
        if reached == math.inf:
            return Bounded(0.0, "at most", reached.reason)
        room = reached - self.b * self.D0**-self.beta
        if room <= 0:
            reason = reached.reason or "better than a reference model of any size at D0 tokens"
            return Bounded(self.largest if self.largest is not None else math.inf, "at least", reason)
        return Bounded((room / self.a) ** (-1 / self.alpha))

    def density(
        self,
        model: Mapping[str, float] | None = None,
        *,
        params: float | None = None,
        score: float | None = None,
        loss: float | None = None,
    ) -> Bounded:
        """Effective over actual parameters.

        Args:
            model: a mapping with ``params`` (or ``N``) and ``score`` or ``loss``; or give them by name.
            params: actual parameters, in the unit of the family; of a mixture of experts say total or active.
            score: of the task.
            loss: conditional loss instead.
        """
        if model is not None:
            if not isinstance(model, Mapping):
                raise OptionError(f"density: {type(model).__name__} given; give a mapping: params, and score or loss")
            params = model.get("params", model.get("N"))
            score, loss = model.get("score"), model.get("loss")
            if score is not None:
                loss = None
        numbers_only("density", params=params)
        if params is None or not 0 < params < math.inf:
            raise OptionError(f"density: params = {params!r}; give a positive number")
        effective = self.effective_params(score, loss=loss)
        return Bounded(effective / params, effective.bound, effective.reason)

    def per_byte(self, stored_bytes: float, *, score: float | None = None, loss: float | None = None) -> Bounded:
        """Effective parameters a stored byte: what counts a compressed model's bits as well."""
        if not stored_bytes > 0:
            raise OptionError(f"per_byte: stored_bytes = {stored_bytes!r}; give a positive number")
        effective = self.effective_params(score, loss=loss)
        return Bounded(effective / stored_bytes, effective.bound, effective.reason)

    def trend(self, models: Iterable[Mapping[str, Any]]) -> Trend:
        """`trend` of models whose density is computed here: each has ``t``, ``params``, and ``score`` or ``loss``."""
        rows = []
        for model in models:
            found = self.density(model)
            if found.bound is None:  # a bound is no point of a line
                rows.append({"t": model["t"], "density": float(found)})
        return trend(rows)


def worth(params: float, added_loss: float, *, law: Law | None = None) -> Bounded:
    """Effective parameters of a changed model, from what the change added to its loss.

    The original is taken to lie on the law's curve over size (its own tokens and text move the curve up or down, which
    cancels), so that its density is 1 and what comes back compares with it alone: A (N_hat^-alpha - N^-alpha) =
    ``added_loss``.

    Args:
        params: N of the original.
        added_loss: nats a token, the changed model's minus the original's on the same text.
        law: of the form ``chinchilla`` or ``reference``, N in single parameters; the refit Chinchilla law by default.
    """
    if not params > 0 or math.isnan(added_loss):
        raise OptionError(
            f"worth: params = {params!r}, added_loss = {added_loss!r}; give a positive number and a number"
        )
    curve = refit() if law is None else law
    scale = float(curve.constants["A" if "A" in curve.constants else "a"])
    alpha = float(curve.constants["alpha"])
    room = params**-alpha + added_loss / scale
    if room <= 0:
        return Bounded(math.inf, "at least", "the gain exceeds what any size would bring")
    return Bounded(room ** (-1 / alpha) if math.isfinite(room) else 0.0)


def given(law: Law, score_law: Law | None = None, *, D0: float = 1e12, largest: float | None = None) -> Reference:
    """From laws: ``reference`` (loss of N and D) and ``sigmoid_of_loss`` (score of loss)."""
    scoring = {} if score_law is None else {name: float(score_law.constants[name]) for name in ("c", "gamma", "l", "d")}
    return Reference(law.a, law.alpha, law.b, law.beta, D0=D0, largest=largest, **scoring)


def reference(family_runs: Any, scored: Any = None, *, D0: float = 1e12, **options: Any) -> Reference:
    """Fit the reference family, and its score curve when scores are given.

    Args:
        family_runs: columns or rows with N, D and loss (and score, when the family itself was scored).
        scored: columns or rows with loss and score of well-trained public models; by default the family's own.
        D0: tokens the effective size is stated at, in the unit of D.
        options: passed to `pennyweight.laws.fit`.
    """
    table = columns(family_runs, "density.reference")
    if missing := [name for name in ("N", "D", "loss") if name not in table]:
        raise DataError(f"density.reference: no column {', '.join(missing)}; give N, D and loss, and score where known")
    law = fit({name: values for name, values in table.items() if name != "score"}, "reference", **options)
    if scored is None and "score" in table:
        scored = {"L": table["loss"], "score": table["score"]}
    score_law = None if scored is None else fit(scored, "sigmoid_of_loss", target="score", **options)
    return given(law, score_law, D0=D0, largest=float(numbers(table["N"], "N").max()))


def _days(values: list[Any]) -> tuple[list[float], datetime.date | None]:
    if values and all(isinstance(value, datetime.date) for value in values):
        start = min(values)
        return [float((value - start).days) for value in values], start
    return [float(value) for value in values], None


def trend(models: Iterable[Any]) -> Trend:
    """Growth of the largest density so far.

    Args:
        models: (t, density) pairs, or mappings with ``t`` (days, or dates) and ``density``.

    Raises:
        DataError: fewer than two record holders on different days.
    """
    try:
        rows = [(m["t"], float(m["density"])) if isinstance(m, Mapping) else (m[0], float(m[1])) for m in models]
        days, start = _days([t for t, _ in rows])
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"trend: {error}; give (t, density) pairs, t in days or dates") from None
    best, records = -math.inf, []
    for t, rho in sorted(zip(days, (rho for _, rho in rows), strict=True)):
        if not (rho > 0 and math.isfinite(rho)):
            raise DataError(f"trend: a density of {rho:g}; give positive finite ones (leave out bounds)")
        if rho > best:
            best = rho
            records.append((t, math.log(rho)))
    if len({t for t, _ in records}) < 2:
        raise DataError(f"trend: {len(records)} record holders; a line needs two on different days")
    at, y = np.array(records).T
    slope, intercept = np.polyfit(at, y, 1)
    spread = ((y - y.mean()) ** 2).sum()
    r_squared = 1.0 if spread == 0 else float(1 - ((y - slope * at - intercept) ** 2).sum() / spread)
    return Trend(float(slope), float(intercept), r_squared, math.log(2) / float(slope), start)


def effective_doubling(density_days: float, chip_days: float) -> float:
    """Days in which the effective size on one chip doubles, when density and chips both grow: 1/(1/a + 1/b)."""
    return 1 / (1 / density_days + 1 / chip_days)
