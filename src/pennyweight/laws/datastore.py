"""How far one retrieval from the full datastore tells about smaller datastores.

Row 67. Source: R. Shao et al., "Scaling Retrieval-Based Language Models with a Trillion-Token Datastore",
arXiv:2407.12854: retrieve the top K once, then keep each document with probability p and take the top k of the rest. In
distribution that equals an index of a p-subsample as long as k of the K survive.
"""

from __future__ import annotations

import math

from scipy.stats import binom

from pennyweight.errors import DataError, OptionError

#: A study whose failure probability a query is above this is refused.
TOLERATED = 0.01


def failure(K: int, p: float, k: int = 3) -> float:
    """Probability that fewer than ``k`` of ``K`` retrieved documents survive keeping each with probability ``p``."""
    if not (K >= 1 and k >= 1 and 0 < p <= 1):
        raise OptionError(f"datastore: K = {K!r}, k = {k!r} must be at least 1, p = {p!r} in (0, 1]")
    return float(binom.cdf(k - 1, K, p))


def check(K: int, p: float, k: int = 3, *, tolerated: float = TOLERATED) -> float:
    """`failure`, refused above ``tolerated``.

    Raises:
        DataError: too few would survive; says the K that is enough.
    """
    chance = failure(K, p, k)
    if chance > tolerated:
        raise DataError(
            f"datastore: of {K} documents kept with probability {p:g} fewer than {k} survive in {chance:.3g} of "
            f"queries; retrieve {depth(p, k, tolerated=tolerated)} or more"
        )
    return chance


def depth(p: float, k: int = 3, *, tolerated: float = TOLERATED) -> int:
    """The smallest K whose failure probability is at most ``tolerated``."""
    low, high = k, k
    while failure(high, p, k) > tolerated:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if failure(middle, p, k) <= tolerated else (middle + 1, high)
    return high


def equal_cost_tokens(n_retriever: float, params: float, tokens: float) -> float:
    """Datastore tokens that cost as many FLOPs to embed as pre-training does: 3 N D / N_retriever."""
    if not (n_retriever > 0 and params > 0 and tokens > 0 and math.isfinite(tokens)):
        raise OptionError("datastore: give positive retriever size, parameters and tokens")
    return 3 * params * tokens / n_retriever
