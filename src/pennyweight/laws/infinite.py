"""Fixed data, unlimited compute: recipes compared by the asymptote of their law.

Row 21. Source: K. Kim et al., "Pre-training under infinite compute", arXiv:2509.14786: L(N) = A/N^alpha + E at fixed
data for the regularized recipe, the same in the number K of ensemble members, and the joint limit first over K, then
over N. Training the recipes and the ensembles is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pennyweight.errors import DataError, OptionError
from pennyweight.laws.fitter import fit
from pennyweight.laws.law import Law, Range


@dataclass(frozen=True)
class Asymptote:
    """``L(x) = A/x^alpha + E`` and its limit.

    Attributes:
        E: the asymptote.
        A: coefficient, in units of the loss times x^alpha.
        alpha: exponent.
        interval: 95 % bootstrap interval of E, None when there are too few points to resample.
        law: the fit, with its report.
    """

    E: float
    A: float
    alpha: float
    interval: Range | None
    law: Law

    def __call__(self, x: Any) -> Any:
        """The fitted loss at ``x``."""
        return self.law(x)

    def __float__(self) -> float:
        return self.E


def asymptote(
    points: Any, form: str = "power_const", *, axis: str | None = None, bootstrap: int = 1000, **options: Any
) -> Asymptote:
    """The loss a recipe tends to as its one axis (size, members, tokens) grows without bound.

    Args:
        points: (x, loss) pairs or columns, as `pennyweight.laws.fit` takes them.
        form: "power_const"; a form without a floor has the asymptote 0 and is refused.
        axis: the column of the variable.
        bootstrap: resamples for the interval; needs more points than the 3 parameters.
        options: passed to `pennyweight.laws.fit`.
    """
    if form != "power_const":
        raise OptionError(f"asymptote: form = {form!r} has no fitted floor; give power_const")
    found = fit(points, form, axis=axis, **options)
    if bootstrap and found.report is not None and found.report.points > len(found.form.parameters) + 1:
        found = fit(points, form, axis=axis, bootstrap=bootstrap, **options)
    interval = found.report.intervals.get("L_inf") if found.report is not None else None
    coefficient = float(np.exp(found.form.internal(found.parameters[None])[0, 1]))
    return Asymptote(float(found.L_inf), coefficient, float(found.alpha), interval, found)


def joint_limit(points: Mapping[float, Any], **options: Any) -> tuple[Asymptote, dict[float, Asymptote]]:
    """First the limit over ensemble members at each size, then over sizes; the order is part of the answer.

    Args:
        points: for each size N, its (K, loss) points.
        options: passed to `asymptote`.
    """
    if len(points) < 3:
        raise DataError(f"joint_limit: {len(points)} sizes; the outer limit needs at least 3")
    inner = {float(size): asymptote(rows, axis="K", **options) for size, rows in points.items()}
    sizes = sorted(inner)
    return asymptote((sizes, [inner[size].E for size in sizes]), axis="N", **options), inner


def data_efficiency(loss: float, D: float, standard: Law) -> float:
    """How many times less data a recipe needs: the D at which ``standard`` reaches ``loss``, over its own ``D``.

    ``inf`` where the standard recipe never gets there.
    """
    if len(standard.form.variables) != 1:
        raise OptionError(f"data_efficiency: {standard.form.name} has several variables; give a law of D")
    needed = standard.inverse("x", loss)
    return float("inf") if np.isnan(needed) else float(needed / D)


def retained(single: float, student: float, ensemble: float) -> float:
    """Share of an ensemble's gain that its distilled student keeps: (single - student) / (single - ensemble)."""
    if not single > ensemble:
        raise DataError(
            f"retained: the ensemble ({ensemble:g}) is not below the single model ({single:g}); nothing to retain"
        )
    return (single - student) / (single - ensemble)
