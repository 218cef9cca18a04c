"""Splitting a training budget between full precision and quantization-aware training.

Row 55. Source: A. Dremov et al., "Compute-Optimal Quantization-Aware Training", arXiv:2509.22935: with S tokens a
parameter byte (at the width of the quantized phase) the best share is exp(ln S - 6.7297/ln S)/S, and the loss is
L = E + beta D^-gamma + zeta N^-eta + theta 2^(-kappa b) + phi 2^(-chi b)/(N^psi S_qat^omega)
+ lambda 2^(-mu b)/(N^nu S_fp^xi S_qat^rho). The authors' coefficients are not published: the law is fitted to one's own
runs, exponents free in sign.

Letters: b bits of a quantized parameter, D tokens of both phases, S_fp and S_qat tokens a parameter byte of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pennyweight.elementwise import elementwise
from pennyweight.errors import BudgetError, DataError, OptionError
from pennyweight.laws.fitter import fit
from pennyweight.laws.forms import (
    D,
    N,
    Parameter,
    Posynomial,
    Term,
    Variable,
    coefficient,
    exponent,
    register,
)
from pennyweight.laws.law import Law
from pennyweight.laws.table import columns, numbers

_CONSTANT = 6.7297
#: Bits over which a weight's worth saturates: T. Kumar et al., "Scaling Laws for Precision", arXiv:2411.04330 (from
#: memory of its table of constants; fit your own).
GAMMA_BITS = 2.6745
_BITS = Variable("bits", "bits a quantized parameter", grows=False)
_S_QAT = Variable("S_qat", "quantization-aware tokens a parameter byte")
_S_FP = Variable("S_fp", "full-precision tokens a parameter byte")
_PLAIN = (
    coefficient("E"), coefficient("beta"), exponent("gamma"), coefficient("zeta"), exponent("eta"),
    Parameter("theta", "as the target", True, (-8.0, 1.0)), exponent("kappa", 0.2, 2.0),
    Parameter("phi", "as the target", True, (-8.0, 1.0)), exponent("chi", 0.2, 2.0), exponent("psi", -0.2, 0.5),
    exponent("omega", 0.05, 1.0),
)  # fmt: skip
_PLAIN_TERMS = (
    Term("E"),
    Term("beta", (("D", "gamma", -1),)),
    Term("zeta", (("N", "eta", -1),)),
    Term("theta", (("bits", "kappa", -1),)),
    Term("phi", (("bits", "chi", -1), ("N", "psi", -1), ("S_qat", "omega", -1))),
)
_FORMULA = "L = E + beta/D^gamma + zeta/N^eta + theta*2^(-kappa*bits) + phi*2^(-chi*bits)/(N^psi*S_qat^omega)"
register(
    Posynomial(
        name="qat_plain",
        formula=_FORMULA,
        variables=(N, D, _S_QAT, _BITS),
        parameters=_PLAIN,
        terms=_PLAIN_TERMS,
        exponential=("bits",),
        row=55,
        paper="A. Dremov et al., Compute-Optimal Quantization-Aware Training, arXiv:2509.22935",
        summary="loss after quantization-aware training, without the term that couples the phases",
    )
)
register(
    Posynomial(
        name="qat",
        formula=_FORMULA + " + lambda*2^(-mu*bits)/(N^nu*S_fp^xi*S_qat^rho)",
        variables=(N, D, _S_QAT, _S_FP, _BITS),
        parameters=(
            *_PLAIN, Parameter("lambda", "as the target", True, (-8.0, 1.0)), exponent("mu", 0.2, 2.0),
            exponent("nu", -0.2, 0.5), exponent("xi", -0.5, 0.5), exponent("rho", 0.05, 1.0),
        ),
        terms=(
            *_PLAIN_TERMS,
            Term("lambda", (("bits", "mu", -1), ("N", "nu", -1), ("S_fp", "xi", -1), ("S_qat", "rho", -1))),
        ),
        exponential=("bits",),
        row=55,
        paper="A. Dremov et al., Compute-Optimal Quantization-Aware Training, arXiv:2509.22935",
        summary="loss after full-precision and then quantization-aware training",
    )
)  # fmt: skip


@elementwise
def tokens_per_byte(N: float, D: float, bits: float) -> float:
    """S = D / (N bits / 8)."""
    for name, value in (("N", N), ("D", D), ("bits", bits)):
        if not (value > 0 and math.isfinite(value)):
            raise OptionError(f"tokens_per_byte: {name} = {value!r}; give a positive number")
    return D / (N * bits / 8)


@elementwise
def qat_fraction(N: float, D: float, bits: float) -> float:
    """Best share of ``D`` tokens for quantization-aware training of ``N`` parameters at ``bits``.

    exp(-6.7297/ln S), natural logarithm; 0 where S <= 1, for the formula holds above one token a parameter byte. Its
    authors give a mean absolute error of 0.091 in the share. Arrays, too.
    """
    s = tokens_per_byte(N, D, bits)
    return math.exp(-_CONSTANT / math.log(s)) if s > 1 else 0.0


@elementwise
def effective_params(N: float, bits: float, gamma: float = GAMMA_BITS) -> float:
    """What ``N`` weights trained at ``bits`` are worth: N (1 - exp(-bits/gamma)); 16 bits and more count whole."""
    if not (N > 0 and bits > 0 and gamma > 0):
        raise OptionError(f"effective_params: N = {N!r}, bits = {bits!r}, gamma = {gamma!r}; give positive numbers")
    return N if bits >= 16 else N * -math.expm1(-bits / gamma)


class Split(NamedTuple):
    """Tokens of the phases at one width, and the loss predicted."""

    fraction: float
    fp_tokens: float
    qat_tokens: float
    loss: float


@dataclass(frozen=True)
class QATLaw:
    """A fitted law with its questions; ``plain`` is the same fit without the coupling of the phases."""

    law: Law
    plain: Law

    def loss(self, N: Any, fp_tokens: Any, qat_tokens: Any, bits: Any) -> Any:
        """Predicted loss."""
        size, fp, qat, width = (np.asarray(v, float) for v in (N, fp_tokens, qat_tokens, bits))
        stored = size * width / 8
        return self.law(N=size, D=fp + qat, S_qat=qat / stored, S_fp=fp / stored, bits=width)

    def best_split(self, N: float, D: float, bits: float) -> Split:
        """The share of least predicted loss, between 0.1 and 99.9 % of ``D``."""
        shares = np.linspace(0.001, 0.999, 999)
        for _ in range(3):  # refine around the best of an evenly spaced grid; the law may have two valleys
            losses = self.loss(np.full(shares.size, N), (1 - shares) * D, shares * D, np.full(shares.size, bits))
            at = int(np.argmin(losses))
            step = shares[1] - shares[0]
            best, loss = float(shares[at]), float(losses[at])
            shares = np.linspace(max(0.001, best - step), min(0.999, best + step), 201)
        return Split(best, (1 - best) * D, best * D, loss)

    def bits_for_memory(
        self, stored_bytes: float, tokens: float, widths: tuple[float, ...] = (1, 2, 3, 4, 6, 8)
    ) -> tuple[float, float, Split]:
        """Width, parameters and split of least loss whose parameters fit ``stored_bytes``, trained on ``tokens``."""
        if not (stored_bytes > 0 and tokens > 0):
            raise BudgetError(f"bits_for_memory: {stored_bytes!r} bytes, {tokens!r} tokens; give positive numbers")
        found = [(bits, stored_bytes * 8 / bits) for bits in widths]
        splits = [self.best_split(size, tokens, bits) for bits, size in found]
        at = int(np.argmin([split.loss for split in splits]))
        return float(found[at][0]), found[at][1], splits[at]


def fit_qat(runs: Any, **options: Any) -> QATLaw:
    """Fit the law to runs of both phases.

    Args:
        runs: columns or rows with N, D_fp, D_qat (tokens of each phase), bits and loss; or the path of a CSV file.
        options: passed to `pennyweight.laws.fit`.

    Raises:
        DataError: a column missing, a phase without tokens, or fewer than two widths.
    """
    given = columns(runs, "fit_qat")
    if missing := [name for name in ("N", "D_fp", "D_qat", "bits", "loss") if name not in given]:
        raise DataError(f"fit_qat: no column {', '.join(missing)}; give N, D_fp, D_qat, bits and loss")
    size, fp, qat, bits, loss = (numbers(given[name], name) for name in ("N", "D_fp", "D_qat", "bits", "loss"))
    if not ((size > 0) & (bits > 0)).all():
        raise DataError("fit_qat: N and bits must be above 0 in every run")
    if not ((fp > 0) & (qat > 0)).all():
        raise DataError(
            "fit_qat: a run without full-precision or without quantization-aware tokens; the law needs both phases"
        )
    stored = size * bits / 8
    plain = {"N": size, "D": fp + qat, "S_qat": qat / stored, "bits": bits, "loss": loss}
    # many parameters: more starts and survivors than the common default
    chosen = {"starts": 16384, "survivors": 64, **options}
    return QATLaw(fit({**plain, "S_fp": fp / stored}, "qat", **chosen), fit(plain, "qat_plain", **chosen))
