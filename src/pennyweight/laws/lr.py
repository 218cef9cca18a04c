"""The learning rate of the Power scheduler, as a law of tokens and batch.

Row 52 (the schedule itself is `pennyweight.train.schedules.power`). Source: Y. Shen et al., "Power Scheduler: A Batch
Size and Token Number Agnostic Learning Rate Scheduler", arXiv:2408.13359: with mu-parametrization and a warm-up-stable-
decay schedule the best rate is batch * a * T^b, batch in sequences (of 4,096), T in training tokens.
"""

from __future__ import annotations

import math

from pennyweight.elementwise import elementwise
from pennyweight.errors import OptionError


@elementwise
def power(T: float, batch: float, *, a: float = 4.6, b: float = -0.51, eta_max: float | None = None) -> float:
    """Best peak learning rate for ``T`` training tokens at ``batch`` sequences: batch * a * T^b, at most ``eta_max``.

    Arrays, too. a = 4.6 is the fitted law; the scheduler's own default is a = 4.
    """
    if not (0 < T < math.inf and 0 < batch < math.inf and a > 0):
        raise OptionError(f"lr.power: T = {T!r}, batch = {batch!r}, a = {a!r}; give positive numbers")
    rate = float(batch * a * float(T) ** b)
    return rate if eta_max is None else min(rate, eta_max)


@elementwise
def switch(batch: float, *, a: float = 4.0, b: float = -0.51, eta_max: float = 0.02) -> float:
    """The number of tokens at which the power law falls below ``eta_max``: (eta_max / (batch a))^(1/b)."""
    if not (batch > 0 and a > 0 and eta_max > 0 and b < 0):
        raise OptionError(
            f"lr.switch: batch = {batch!r}, a = {a!r}, eta_max = {eta_max!r} must be positive, b = {b!r} < 0"
        )
    return float((eta_max / (batch * a)) ** (1 / b))
