"""Which width to train for under a memory budget.

Row 55; see `pennyweight.laws.qat`. The paper gives the form of the law and no coefficients: a law fitted to one's own
runs answers best. Without one, the refitted Chinchilla law decides with b-bit weights counted as N (1 - exp(-b/gamma))
parameters (`laws.qat.effective_params`), and the share is the paper's closed formula.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pennyweight.elementwise import numbers
from pennyweight.errors import BudgetError
from pennyweight.laws import published
from pennyweight.laws.qat import QATLaw, effective_params, qat_fraction


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
    bytes: float, tokens: float, *, law: QATLaw | None = None, widths: tuple[float, ...] = (1, 2, 3, 4, 6, 8)
) -> BitsChoice:
    """The width of least predicted loss whose parameters fit ``bytes`` when trained on ``tokens``.

    Args:
        bytes: of the quantized parameters.
        tokens: of both phases together.
        law: of `pennyweight.laws.fit_qat`; None for the published laws above.
        widths: to choose from.

    Raises:
        BudgetError: a budget that is not positive, or no widths.
    """
    numbers("bits_for_memory", bytes=bytes, tokens=tokens)
    if not widths or not all(0 < width < math.inf for width in widths):
        raise BudgetError(f"bits_for_memory: widths = {widths!r}; give bits above 0 to choose from")
    if law is None:
        if not (0 < bytes < math.inf and 0 < tokens < math.inf):
            raise BudgetError(f"bits_for_memory: {bytes!r} bytes, {tokens!r} tokens; give positive numbers")
        base, found = published.refit(), []
        for width in widths:
            size = bytes * 8 / width
            loss = float(base(N=effective_params(size, width), D=tokens))
            found.append(BitsChoice(float(width), size, qat_fraction(size, tokens, width), loss))
        return min(found, key=lambda choice: choice.loss)
    bits, params, split = law.bits_for_memory(bytes, tokens, widths)
    return BitsChoice(bits, params, split.fraction, split.loss)
