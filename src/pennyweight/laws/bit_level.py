"""Quality against total bits: which width and how many parameters a given number of bits buys most with.

Row 112. Source: X. Ding et al., "Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models",
arXiv:2501.06218: curves of quality over total bits (parameters times bits), family by family and width by width, and
the lower envelope of them. Differs from the source: one form for all widths of a family is fitted, so that widths
between and sizes beyond those measured can be asked for, each with its receipt.

Letters: N parameters that are quantized, b bits of each; the total is N b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pennyweight.errors import BudgetError, DataError
from pennyweight.laws.fitter import fit
from pennyweight.laws.forms import N, Parameter, Posynomial, Term, Variable, coefficient, exponent, register
from pennyweight.laws.law import Law
from pennyweight.laws.table import columns, numbers

_BITS = Variable("bits", "bits a quantized parameter", grows=False)
register(
    Posynomial(
        name="bit_level",
        formula="L = E + A/N^alpha + theta*2^(-kappa*bits)/N^psi",
        variables=(N, _BITS),
        parameters=(
            coefficient("E"), coefficient("A"), exponent("alpha"),
            Parameter("theta", "as the target", True, (-6.0, 4.0)), exponent("kappa", 0.2, 3.0),
            exponent("psi", -0.5, 0.5),
        ),
        terms=(
            Term("E"),
            Term("A", (("N", "alpha", -1),)),
            Term("theta", (("bits", "kappa", -1), ("N", "psi", -1))),
        ),
        exponential=("bits",),
        row=112,
        paper="X. Ding et al., Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models, "
        "arXiv:2501.06218",
        summary="loss from size and width of quantized parameters; gives the width of least loss at given total bits",
    )
)  # fmt: skip


class Purchase(NamedTuple):
    """What a number of bits is best spent on."""

    bits: float
    params: float
    loss: float


@dataclass(frozen=True)
class BitLevelLaw:
    """A fitted law with its questions."""

    law: Law

    def loss(self, N: Any, bits: Any) -> Any:
        """Predicted loss."""
        size, width = np.broadcast_arrays(np.asarray(N, float), np.asarray(bits, float))
        return self.law(N=size, bits=width)

    def best(self, total_bits: float, widths: Sequence[float] = (2, 3, 4, 5, 6, 8, 16)) -> Purchase:
        """Width and parameters of least predicted loss whose product is ``total_bits``.

        Raises:
            BudgetError: no bits, or no widths.
        """
        if not total_bits > 0 or not widths or not all(width > 0 for width in widths):
            raise BudgetError(f"bit_level: {total_bits!r} total bits, widths {list(widths)}; give positive numbers")
        bought = [
            Purchase(float(width), total_bits / width, float(self.loss(total_bits / width, width))) for width in widths
        ]
        return min(bought, key=lambda one: one.loss)

    def envelope(
        self, totals: Sequence[float], widths: Sequence[float] = (2, 3, 4, 5, 6, 8, 16)
    ) -> tuple[Purchase, ...]:
        """`best` for each of ``totals``."""
        return tuple(self.best(total, widths) for total in totals)


def fit_bit_level(runs: Any, **options: Any) -> BitLevelLaw:
    """Fit the law to measured runs of one family.

    Args:
        runs: columns or rows with N, bits and loss.
        options: passed to `pennyweight.laws.fit`.

    Raises:
        DataError: a column missing, or fewer than two widths or sizes.
    """
    table = columns(runs, "fit_bit_level")
    if missing := [name for name in ("N", "bits", "loss") if name not in table]:
        raise DataError(f"fit_bit_level: no column {', '.join(missing)}; give N, bits and loss")
    points = {name: numbers(table[name], name) for name in ("N", "bits", "loss")}
    return BitLevelLaw(fit(points, "bit_level", **options))
