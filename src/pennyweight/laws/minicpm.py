"""MiniCPM's laws: batch from loss, and size against data from one stable run with decayed branches.

Row 146 (the WSD schedule is `pennyweight.train.schedules.wsd`). Source: S. Hu et al., "MiniCPM: Unveiling the Potential
of Small Language Models with Scalable Training Strategies", arXiv:2404.06395. Differs from the source: its SciPy
``curve_fit`` is our robust fitter in log loss, and both N and D may be in any unit (the paper's constants are in 1e9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pennyweight.elementwise import elementwise
from pennyweight.errors import DataError, OptionError
from pennyweight.laws.fitter import fit
from pennyweight.laws.forms import D, N, Posynomial, Term, coefficient, exponent, register
from pennyweight.laws.law import Law
from pennyweight.laws.table import columns, numbers

MINICPM = register(
    Posynomial(
        name="minicpm",
        formula="L = C_N*N^-alpha + C_D*D^-beta + L0",
        variables=(N, D),
        parameters=(coefficient("C_N"), exponent("alpha"), coefficient("C_D"), exponent("beta"), coefficient("L0")),
        terms=(Term("C_N", (("N", "alpha", -1),)), Term("C_D", (("D", "beta", -1),)), Term("L0")),
        row=146,
        paper="S. Hu et al., MiniCPM, arXiv:2404.06395",
        summary="loss from size and tokens, fitted to the branches of one warm-up-stable-decay run a size",
    )
)


@elementwise
def batch_by_loss(L: float, *, scale: float = 1.21e9, power: float = 6.24) -> float:
    """Best batch in tokens at loss ``L`` (nats a token, on C4; arrays, too): scale / L^power."""
    if not 0 < L < math.inf:
        raise OptionError(f"batch_by_loss: L = {L!r}; give a positive loss in nats a token")
    return float(scale / L**power)


class Ratio(NamedTuple):
    """``N/D = k_squared * (C/6)^eta``, and what it gives at one compute."""

    k_squared: float
    eta: float
    N: float
    D: float
    tokens_per_param: float


def optimum(law: Law, flops: float) -> Ratio:
    """The best size and tokens of a fitted law for ``flops``, in the units the law was fitted in (1e9: flops in 1e18).

    N/D = K^2 (C/6)^eta with K = (alpha C_N / (beta C_D))^(1/(alpha+beta)), eta = (beta-alpha)/(alpha+beta).
    """
    if law.form.name not in ("minicpm", "chinchilla"):
        raise OptionError(f"minicpm.optimum: {law.form.name}; give a minicpm or chinchilla law")
    if not flops > 0:
        raise OptionError(f"minicpm.optimum: flops = {flops!r}; give a positive number")
    c_n, c_d = (law.C_N, law.C_D) if law.form.name == "minicpm" else (law.A, law.B)
    k = (law.alpha * c_n / (law.beta * c_d)) ** (1 / (law.alpha + law.beta))
    eta = (law.beta - law.alpha) / (law.alpha + law.beta)
    ratio = k**2 * (flops / 6) ** eta
    size = (ratio * flops / 6) ** 0.5
    return Ratio(k**2, eta, size, size / ratio, 1 / ratio)


@dataclass(frozen=True)
class WSDFit:
    """A law fitted to branches of stable runs, and what it cost.

    Attributes:
        law: of (N, D), or of D alone when there is one size.
        tokens_spent: of the stable runs and every decay branch.
        tokens_separate: what a separate full run for each point would have taken.
    """

    law: Law
    tokens_spent: float
    tokens_separate: float

    @property
    def saving(self) -> float:
        """How many times cheaper than separate runs."""
        return self.tokens_separate / self.tokens_spent


def fit_from_wsd(run: Any, branches: Sequence[Mapping[str, float]], **options: Any) -> WSDFit:
    """Fit a law from stable runs and the branches decayed from their checkpoints: linear cost instead of quadratic.

    Args:
        run: the stable run, or a list of them: mappings with ``tokens`` (trained at the stable rate) and, when there
            are several sizes, ``N``.
        branches: rows with ``D`` (tokens in all, the decay included), ``decay_tokens`` and ``loss`` at the end; ``N``
            when there are several sizes (otherwise that of the run).
        options: passed to `pennyweight.laws.fit`.

    Raises:
        DataError: a branch that decays from beyond its stable run, or belongs to none.
    """
    runs = columns([run] if isinstance(run, Mapping) else run, "fit_from_wsd")
    rows = columns(branches, "fit_from_wsd")
    if not runs or not rows:
        raise DataError("fit_from_wsd: give at least one stable run and its branches")
    if "tokens" not in runs:
        raise DataError(f"fit_from_wsd: the stable runs have no tokens; there are {', '.join(runs)}")
    if missing := [name for name in ("D", "decay_tokens", "loss") if name not in rows]:
        raise DataError(f"fit_from_wsd: the branches have no {', '.join(missing)}")
    ends = numbers(runs["tokens"], "tokens").tolist()
    stable = dict(zip(numbers(runs.get("N", [1.0] * len(ends)), "N").tolist(), ends, strict=True))
    only = next(iter(stable)) if len(stable) == 1 else None
    sizes, tokens, losses, decays = [], [], [], []
    whole, late, lost = (numbers(rows[name], name).tolist() for name in ("D", "decay_tokens", "loss"))
    of = numbers(rows["N"], "N").tolist() if "N" in rows else [math.nan if only is None else only] * len(whole)
    for number, (size, total, decay, loss) in enumerate(zip(of, whole, late, lost, strict=True), start=1):
        if size not in stable:
            raise DataError(f"fit_from_wsd: branch {number} has N = {size:g}; the stable runs have {sorted(stable)}")
        start = total - decay
        if not (decay >= 0 and 0 <= start <= stable[size] * (1 + 1e-9)):
            raise DataError(
                f"fit_from_wsd: branch {number} decays from {start:g} over {decay:g} tokens; its stable run has "
                f"{stable[size]:g}"
            )
        sizes.append(size)
        tokens.append(total)
        losses.append(loss)
        decays.append(decay)
    if len(set(sizes)) > 1:
        law = fit({"N": sizes, "D": tokens, "loss": losses}, "minicpm", **options)
    else:
        law = fit({"D": tokens, "loss": losses}, "power_const", axis="D", **options)
    return WSDFit(law, sum(stable.values()) + sum(decays), sum(tokens))
