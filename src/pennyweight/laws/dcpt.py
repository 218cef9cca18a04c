"""Mixture ratio of continual pre-training, by optimization of a fitted law.

Row 85. Source: H. Que et al., "D-CPT Law: Domain-specific Continual Pre-Training Scaling Law", arXiv:2406.01375:
L(N, D, r) = E + A/N^alpha + B r^eta/D^beta + C/(r+epsilon)^gamma, r the share of the corpus whose loss is predicted.
Differs from the source: the fit is held to a loss that falls in r everywhere
(`pennyweight.laws.curves.Mixture.limits`), for otherwise the best ratio is an artefact of the form.

N and D in any unit, the same in fit and use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from pennyweight.elementwise import numbers as numbers_only
from pennyweight.errors import BudgetError, DataError, OptionError
from pennyweight.laws import fitter
from pennyweight.laws.forms import find
from pennyweight.laws.law import Law
from pennyweight.laws.table import columns, numbers


class Ratio(NamedTuple):
    """A recommended share of domain data, and what it is predicted to give.

    Attributes:
        ratio: r_d.
        domain_loss: predicted.
        general_loss: predicted; None without a general law.
        limit: the bound on the general loss; None without one.
        violations: requirements the domain law breaks near here; not empty means: do not trust the ratio.
    """

    ratio: float
    domain_loss: float
    general_loss: float | None
    limit: float | None
    violations: tuple[str, ...]

    def __float__(self) -> float:
        return self.ratio


def violations(law: Law, N: float, D: float) -> tuple[str, ...]:
    """What a mixture law must satisfy and does not, at one size and number of tokens."""
    r = np.linspace(0.0, 1.0, 201)
    extra = {"K": np.ones_like(r)} if "K" in law.variables else {}
    size, tokens = np.full_like(r, N), np.full_like(r, D)
    losses = law(N=size, D=tokens, r=r, **extra)
    found = []
    if not np.isfinite(losses).all():
        found.append("the loss is not finite for all r in [0, 1]")
    if (np.diff(losses) > 0).any():
        found.append(f"the loss rises with r from r = {r[int(np.argmax(np.diff(losses) > 0))]:.3g}")
    if (law(N=2 * size, D=tokens, r=r, **extra) > losses).any():
        found.append("the loss rises with N")
    gain = losses - law(N=size, D=2 * tokens, r=r, **extra)
    if (gain < 0).any():
        found.append("the loss rises with D")
    if (np.diff(gain) < -1e-15).any():
        found.append("more data helps less at a higher r")
    return tuple(found)


@dataclass(frozen=True)
class DCPT:
    """A domain law, the general law it is weighed against, and a law across domains."""

    domain: Law | None
    general: Law | None = None
    cross: CrossDomain | None = None

    def loss(self, N: Any, D: Any, r: Any) -> Any:
        """Domain loss at domain share ``r``."""
        return self._need(self.domain, "domain")(N=N, D=D, r=r)

    def general_loss(self, N: Any, D: Any, r: Any) -> Any:
        """General loss at domain share ``r``: its own share is 1 - r."""
        return self._need(self.general, "general")(N=N, D=D, r=1 - np.asarray(r))

    def optimal_ratio(
        self,
        N: float,
        D: float | None = None,
        domain_tokens: float | None = None,
        general_drop: float = 0.03,
        *,
        general_base: float | None = None,
    ) -> Ratio:
        """The domain share to train with.

        With ``D`` tokens in all: the largest share whose general loss is at most (1 + general_drop) of ``general_base``
        (by default the general loss of training on general data alone); the domain loss falls in the share, so that
        bound is where the optimum lies. With ``domain_tokens`` there are instead: the share of least domain loss when
        every domain token is used once, D = domain_tokens / r.

        Raises:
            OptionError: neither or both of ``D`` and ``domain_tokens``.
            BudgetError: no share meets the bound.
        """
        if (D is None) == (domain_tokens is None):
            raise OptionError("optimal_ratio: give D (tokens in all) or domain_tokens (those there are), one of them")
        domain = self._need(self.domain, "domain")
        numbers_only("optimal_ratio", N=N, general_drop=general_drop)
        numbers_only("optimal_ratio", **({"domain_tokens": domain_tokens} if D is None else {"D": D}))
        if D is not None:
            return self._under_general_loss(domain, N, D, general_drop, general_base)
        assert domain_tokens is not None
        if not domain_tokens > 0:
            raise OptionError(f"optimal_ratio: domain_tokens = {domain_tokens!r}; give a positive number")

        def loss(r: float) -> float:
            return float(domain(N=N, D=domain_tokens / r, r=r))

        grid = np.concatenate([np.geomspace(1e-4, 0.05, 60), np.linspace(0.05, 1.0, 400)[1:]])
        ratio = _minimum(loss, grid)
        total = domain_tokens / ratio
        general = None if self.general is None else float(self.general_loss(N, total, ratio))
        return Ratio(ratio, loss(ratio), general, None, violations(domain, N, total))

    def _under_general_loss(self, domain: Law, N: float, D: float, drop: float, base: float | None) -> Ratio:
        general = self._need(self.general, "general")
        if base is None:
            base = float(general(N=N, D=D, r=1.0))
        limit = (1 + drop) * base

        def over(r: float) -> float:
            return float(general(N=N, D=D, r=1 - r)) - limit

        if over(0.0) > 0:
            raise BudgetError(
                f"optimal_ratio: general loss is {over(0.0) + limit:.4g} even without domain data, above {limit:.4g}; "
                "allow a larger general_drop"
            )
        grid = np.linspace(0.0, 1.0, 401)
        above = np.flatnonzero(np.array([over(r) for r in grid]) > 0)
        ratio = 1.0 if not above.size else float(brentq(over, grid[above[0] - 1], grid[above[0]], xtol=1e-12))
        broken = tuple(dict.fromkeys((*violations(domain, N, D), *violations(general, N, D))))
        return Ratio(ratio, float(domain(N=N, D=D, r=ratio)), float(self.general_loss(N, D, ratio)), limit, broken)

    def best_size(self, flops: float, r: float, *, flops_per_pair: float = 6.0) -> tuple[float, float]:
        """N and D of least domain loss at ``flops`` and a fixed share, in the units of the law."""
        domain = self._need(self.domain, "domain")
        pair = flops / flops_per_pair
        middle = 0.5 * np.log(pair)
        size = np.exp(
            _minimum(
                lambda s: float(domain(N=np.exp(s), D=pair / np.exp(s), r=r)),
                np.linspace(middle - 15, middle + 15, 601),
            )
        )
        return float(size), float(pair / size)

    def cross_domain(self, k1: float, k2: float) -> Law:
        """The law of a new domain from its initial loss ``k1`` and early rate of decrease ``k2``.

        Raises:
            OptionError: this was fitted to one domain (`fit` with columns k1 and k2 fits across domains).
        """
        if self.cross is None:
            raise OptionError("cross_domain: fitted to one domain; fit rows of several, with columns k1 and k2")
        return self.cross.law_of(k1, k2)

    @staticmethod
    def _need(law: Law | None, name: str) -> Law:
        if law is None:
            raise OptionError(f"dcpt: there is no {name} law; fit rows with a column {name}_loss")
        return law


@dataclass(frozen=True)
class CrossDomain:
    """One law for all domains, through their learnability K = w1/k1 + w2*k2 (w1 = 1: F takes up the common scale)."""

    law: Law
    w1: float
    w2: float

    def learnability(self, k1: Any, k2: Any) -> Any:
        """K of a domain."""
        return self.w1 / np.asarray(k1, float) + self.w2 * np.asarray(k2, float)

    def law_of(self, k1: float, k2: float) -> Law:
        """The mixture law of one domain: its F/K^mu goes into E.

        Raises:
            OptionError: a k1 that is not positive, or a domain that cannot be learned (K <= 0).
        """
        numbers_only("cross_domain", k1=k1, k2=k2)
        if not (0 < k1 < np.inf and np.isfinite(k2) and self.learnability(k1, k2) > 0):
            raise OptionError(
                f"cross_domain: k1 = {k1!r}, k2 = {k2!r}; give a positive initial loss and an early rate of decrease "
                "that leave K = w1/k1 + w2 k2 above 0"
            )
        constants = dict(self.law.constants)
        constants["E"] += constants.pop("F") / float(self.learnability(k1, k2)) ** constants.pop("mu")
        return Law(find("dcpt"), constants, fit_range={k: v for k, v in self.law.fit_range.items() if k != "K"})


def _minimum(function: Callable[[float], float], grid: Any) -> float:
    values = [function(float(point)) for point in grid]
    at = int(np.argmin(values))
    if at in (0, len(grid) - 1):
        return float(grid[at])
    bounds = (grid[at - 1], grid[at + 1])
    return float(minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)


def given(domain: Mapping[str, float] | Law, general: Mapping[str, float] | Law | None = None) -> DCPT:
    """From known constants: E, A, alpha, B, beta, eta, C, gamma, epsilon of the domain law and of the general one."""

    def made(constants: Mapping[str, float] | Law) -> Law:
        return constants if isinstance(constants, Law) else Law(find("dcpt"), dict(constants))

    return DCPT(made(domain), None if general is None else made(general))


def fit(rows: Any, **options: Any) -> DCPT:
    """Fit the laws to runs of several sizes, lengths and ratios.

    Args:
        rows: columns or rows with N, D and r (the domain's share), and ``loss`` or ``domain_loss``, ``general_loss`` or
            both; with k1 and k2 of each row's domain the law across domains is fitted too.
        options: passed to `pennyweight.laws.fit`.

    Raises:
        DataError: no loss column, or fewer than three ratios.
    """
    table = {name: numbers(values, name) for name, values in columns(rows, "dcpt.fit").items()}
    for name in ("N", "D", "r"):
        if name not in table:
            raise DataError(f"dcpt.fit: no column {name}; there are {', '.join(table) or 'none'}")
    domain_name = next((name for name in ("domain_loss", "loss") if name in table), None)
    if domain_name is None and "general_loss" not in table:
        raise DataError("dcpt.fit: no column loss, domain_loss or general_loss")
    if len(np.unique(table["r"])) < 3:
        raise DataError(
            f"dcpt.fit: {len(np.unique(table['r']))} ratios; the law bends twice in r, give at least 3, better 5"
        )
    common = {"N": table["N"], "D": table["D"]}
    domain = general = cross = None
    if domain_name is not None:
        points = {**common, "r": table["r"], "loss": table[domain_name]}
        if "k1" in table and "k2" in table:
            cross = _fit_cross(points, table["k1"], table["k2"], options)
        else:
            domain = fitter.fit(points, "dcpt", **options)
    if "general_loss" in table:
        general = fitter.fit({**common, "r": 1 - table["r"], "loss": table["general_loss"]}, "dcpt", **options)
    return DCPT(domain, general, cross)


def _fit_cross(points: Mapping[str, Any], k1: Any, k2: Any, options: Mapping[str, Any]) -> CrossDomain:
    domains = np.unique(np.stack([k1, k2]), axis=1).shape[1]
    if domains < 4:
        raise DataError(f"dcpt.fit: {domains} domains (k1, k2); E, F, mu and w2 are told apart by at least 4")
    quick = {"starts": 1024, "survivors": 8, **options, "bootstrap": 0, "holdout": False}
    known: list[Law] = []

    def fitted(log_w2: float, how: Mapping[str, Any]) -> Law:
        return fitter.fit({**points, "K": 1 / k1 + np.exp(log_w2) * k2}, "dcpt_cross", **how)

    def objective(law: Law) -> float:
        assert law.report is not None, "a fitted law has a report"
        return law.report.objective

    def warm(log_w2: float, how: Mapping[str, Any]) -> Law:
        # from what was found at other weights: ten constants have many poor valleys, and the good one moves slowly
        return fitted(log_w2, {**how, "starts": np.stack([law.parameters for law in known])})

    # K only matters up to scale, so w1 = 1 and one weight is left: a search in one dimension around equal shares
    grid = float(np.log(np.mean(1 / k1) / np.mean(k2))) + np.linspace(-4.0, 4.0, 9)
    known += [fitted(float(at), quick) for at in grid]
    values = [objective(warm(float(at), quick)) for at in grid]
    best = int(np.argmin(values))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)])
    log_w2 = float(
        minimize_scalar(
            lambda at: objective(warm(at, quick)), bounds=bounds, method="bounded", options={"xatol": 1e-6}
        ).x
    )
    law = warm(log_w2, options)
    return CrossDomain(replace(law, source=f"{law.source}, w2 = {np.exp(log_w2):.4g}"), 1.0, float(np.exp(log_w2)))
