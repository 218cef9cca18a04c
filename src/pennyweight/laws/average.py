"""One law for dense and sparse pre-training: loss follows the number of parameters averaged over the run.

Row 6. Source: T. Jin et al., "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense
Scaling Laws", arXiv:2501.12486: L = E + A/N_avg^alpha + B/D^beta, N_avg the mean over tokens of the parameters that are
not zero; a run that prunes from 25 to 75 % of its compute is near the best. Differs from the source: N_avg of a
schedule has a closed form here, and rival laws are judged on runs that they were not fitted to.

Training takes about 6 N_avg D FLOPs where zeros are skipped; dense kernels skip none and take 6 N_0 D.

Letters: N_0 prunable parameters at the start, s final share of zeros, D tokens; a and b the shares of the run at which
pruning begins and ends. Embeddings do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pennyweight.errors import DataError, OptionError
from pennyweight.laws.fitter import fit
from pennyweight.laws.forms import D, Posynomial, Term, Variable, coefficient, exponent, register
from pennyweight.laws.law import Law
from pennyweight.laws.table import columns, numbers
from pennyweight.train.sparsity_schedules import SparsitySchedule
from pennyweight.train.sparsity_schedules import average_params as _average_params

register(
    Posynomial(
        name="average_params",
        formula="L = E + A/N_avg^alpha + B/D^beta",
        variables=(Variable("N_avg", "parameters that are not zero, averaged over the tokens of the run"), D),
        parameters=(coefficient("E"), coefficient("A"), exponent("alpha"), coefficient("B"), exponent("beta")),
        terms=(Term("E"), Term("A", (("N_avg", "alpha", -1),)), Term("B", (("D", "beta", -1),))),
        row=6,
        paper="T. Jin et al., The Journey Matters, arXiv:2501.12486",
        summary="loss of dense and of gradually pruned pre-training alike; dense runs have N_avg = N",
    )
)

#: By which size the rival laws of `fit_sparse` go.
SIZES = ("average", "final", "initial")
_LEAVING_OUT = {"starts": 1024, "survivors": 8, "holdout": False}


def mean_sparsity(final: float, *, start: float = 0.25, end: float = 0.75, power: int = 3) -> float:
    """The share of zeros averaged over a run: ``final * (power/(power + 1) * (end - start) + 1 - end)``.

    0.625 of ``final`` by default. The integral of the smooth ramp; one that moves in steps has a little less, see
    `pennyweight.train.sparsity_schedules.mean_sparsity`.

    Args:
        final: share of zeros at the end.
        start: share of the run at which pruning begins.
        end: share at which it ends.
        power: 3 of the cubic ramp, 1 of a straight line.

    Raises:
        OptionError: shares outside 0 to 1, or an end before the start.
    """
    if not (0 <= final <= 1 and 0 <= start <= end <= 1 and power >= 1):
        raise OptionError(
            f"mean sparsity: {final} of zeros from {start} to {end} of the run, power {power}; give shares within 0 to "
            "1, start <= end, and a power of 1 or more"
        )
    return final * (power / (power + 1) * (end - start) + 1 - end)


def average_params(
    params: float, sparsity: float | SparsitySchedule = 0.0, *, total: int | None = None, **ramp: Any
) -> float:
    """N_avg of ``params`` prunable parameters.

    Args:
        params: N_0.
        sparsity: s at the end of a ramp (see `mean_sparsity` for its options), or a schedule of ``total`` steps.
        total: steps of the run, for a schedule.
        ramp: options of `mean_sparsity`.

    Raises:
        OptionError: a schedule without ``total``, or a share with it.
    """
    if isinstance(sparsity, (int, float)):
        if total is not None:
            raise OptionError("average_params: steps are of a schedule; give one, or leave total out")
        return params * (1 - mean_sparsity(sparsity, **ramp))
    if total is None or ramp:
        raise OptionError("average_params: a schedule needs total=, the steps of the run, and nothing else")
    return _average_params(sparsity, params, total)


@dataclass(frozen=True)
class SparseLaw:
    """The law in N_avg and its two rivals, each fitted to the same runs.

    Attributes:
        laws: by `SIZES`: in the average, the final and the initial number of parameters.
        errors: of each, the mean |log(predicted / measured)| of a run left out of its fit.
    """

    laws: Mapping[str, Law]
    errors: Mapping[str, float]

    @property
    def law(self) -> Law:
        """The one in N_avg."""
        return self.laws["average"]

    @property
    def best(self) -> str:
        """The size whose law predicts runs best that it has not seen."""
        return min(self.errors, key=lambda name: self.errors[name])


def fit_sparse(runs: Any, **options: Any) -> SparseLaw:
    """Fit the law to dense and sparse runs, beside the same law in final and in initial size.

    Args:
        runs: columns by name, or rows: ``N0``, ``D``, ``loss``; and ``N_avg`` with ``N_final``, or ``sparsity`` of
            ramps from 25 to 75 % (0 for dense runs). With one D for all runs the law has no term in it.
        options: passed to `pennyweight.laws.fit`.

    Raises:
        DataError: a column missing, no sparse run or no dense one, or too few runs to leave one out.
    """
    table = columns(runs, "fit_sparse")
    given = {name: numbers(values, name) for name, values in table.items()}
    sized = ("sparsity",) if "sparsity" in given else ("N_avg", "N_final")
    if missing := [name for name in ("N0", "D", "loss", *sized) if name not in given]:
        raise DataError(
            f"fit_sparse: no column {', '.join(missing)}; give N0, D, loss, and sparsity or N_avg and N_final"
        )
    first, tokens, loss = given["N0"], given["D"], given["loss"]
    if "sparsity" in given:
        zeros = given["sparsity"]
        average = first * (1 - np.array([mean_sparsity(float(one)) for one in zeros]))
        sizes = {"average": average, "final": first * (1 - zeros), "initial": first}
    else:
        sizes = {"average": given["N_avg"], "final": given["N_final"], "initial": first}
    pruned = sizes["final"] < sizes["initial"]
    if not pruned.any() or pruned.all():
        raise DataError("fit_sparse: give runs of both kinds, dense and sparse; else their sizes cannot be told apart")
    varied = len(np.unique(tokens)) > 1
    if len(loss) < (7 if varied else 5):
        raise DataError(f"fit_sparse: {len(loss)} runs leave too few for a law when one is left out; give more")

    def fitted(size: str, rows: Any, **settings: Any) -> Law:
        points = {"N_avg": sizes[size][rows], "loss": loss[rows]}
        if varied:
            return fit({**points, "D": tokens[rows]}, "average_params", **settings)
        return fit(points, "power_const", axis="N_avg", **settings)

    laws, errors = {}, {}
    for size in SIZES:
        laws[size] = fitted(size, slice(None), **options)
        missed = []
        for out in range(len(loss)):
            law = fitted(size, np.arange(len(loss)) != out, **{**options, **_LEAVING_OUT, "bootstrap": 0})
            at = {"N_avg": sizes[size][out], "D": tokens[out]} if varied else {"x": sizes[size][out]}
            missed.append(abs(float(np.log(law(**at) / loss[out]))))
        errors[size] = float(np.mean(missed))
    return SparseLaw(laws, errors)
