"""Which width to train for under a memory budget.

Row 55; see `pennyweight.laws.qat`. The paper gives the form of the law and no coefficients, so the answer needs a law
fitted to one's own runs.
"""

from __future__ import annotations

from typing import NamedTuple

from pennyweight.errors import BudgetError
from pennyweight.laws.qat import QATLaw


class BitsChoice(NamedTuple):
    """A width for a memory budget.

    Attributes:
        bits: of a parameter.
        params: that fit.
        qat_fraction: best share of the tokens for quantization-aware training.
        loss: predicted.
    """

    bits: float
    params: float
    qat_fraction: float
    loss: float


def bits_for_memory(
    stored_bytes: float, tokens: float, *, law: QATLaw, widths: tuple[float, ...] = (1, 2, 3, 4, 6, 8)
) -> BitsChoice:
    """The width of least predicted loss whose parameters fit ``stored_bytes`` when trained on ``tokens``.

    Args:
        stored_bytes: of the quantized parameters.
        tokens: of both phases together.
        law: of `pennyweight.laws.fit_qat`.
        widths: to choose from.

    Raises:
        BudgetError: a budget that is not positive, or no widths.
    """
    if not widths:
        raise BudgetError("bits_for_memory: no widths to choose from")
    bits, params, split = law.bits_for_memory(stored_bytes, tokens, widths)
    return BitsChoice(bits, params, split.fraction, split.loss)
