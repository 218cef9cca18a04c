"""Power of the one-sided t test: what a given number of windows can show, and how many it takes to show more.

Exact through the noncentral t distribution. Source: J. Cohen, "Statistical Power Analysis for the Behavioral Sciences",
2nd ed., 1988. Differs from it: nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

from scipy import optimize, stats

from pennyweight.errors import OptionError

LEVEL = 0.95
POWER = 0.8
_NORMAL_FROM = 10_001  # from here on the noncentral t is normal to 1e-4 in power, and its series slow


def power(distance: float, spread: float, n: int, *, level: float = LEVEL) -> float:
    """The chance that the test shows a true harm that lies ``distance`` under the margin.

    Args:
        distance: margin - true harm.
        spread: standard deviation of the differences, above 0.
        n: samples, at least 2.
        level: one-sided confidence.
    """
    return _power(distance * math.sqrt(n) / spread, n, level)


def detectable(standard_error: float, n: int, *, level: float = LEVEL, wanted: float = POWER) -> float:
    """The smallest distance to the margin that ``n`` samples show with power ``wanted``."""
    return _shift(n, level, wanted) * standard_error


def samples_needed(distance: float, spread: float, *, level: float = LEVEL, wanted: float = POWER) -> int:
    """The fewest samples with which `power` reaches ``wanted``; at least 2.

    Raises:
        OptionError: a distance that is not above 0, which no number of samples can show.
    """
    if not distance > 0:
        raise OptionError(f"samples needed: a distance of {distance} to the margin cannot be shown; give one above 0")
    fewest = max(2, math.ceil((_shift(_NORMAL_FROM, level, wanted) * spread / distance) ** 2))  # if spread were known
    while _shift(fewest, level, wanted) * spread > distance * math.sqrt(fewest):
        fewest += 1  # the t test asks for a few more than the z test, never for many
    return fewest


def _power(shift: float, n: int, level: float) -> float:
    """`power` by the noncentrality ``shift`` = distance * sqrt(n) / spread."""
    if n >= _NORMAL_FROM:
        return float(stats.norm.sf(stats.norm.ppf(level) - shift))
    return float(stats.nct.sf(stats.t.ppf(level, n - 1), n - 1, shift))


@lru_cache(maxsize=1024)
def _shift(n: int, level: float, wanted: float) -> float:
    """The noncentrality at which ``n`` samples reach ``wanted``; falls with n to z(level) + z(wanted)."""
    normal = float(stats.norm.ppf(level) + stats.norm.ppf(wanted))
    if n >= _NORMAL_FROM:
        return normal
    high = normal
    while _power(high, n, level) < wanted:
        high *= 2
    return float(optimize.brentq(lambda shift: _power(shift, n, level) - wanted, 0.0, high, xtol=1e-9))
