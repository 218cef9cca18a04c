"""Discontinuity of a task with scale.

Row 34. Source: A. Chowdhery et al., "PaLM", arXiv:2204.02311, section 6.2: the score of the largest model against
what a straight line in log size through the two smaller ones would give.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.errors import DataError


def discontinuity(sizes: Any, scores: Any) -> float:
    """Score of the largest model minus the log-linear extrapolation from the next two smaller ones.

    Positive: better than the trend promised, in the unit of the scores.

    Raises:
        DataError: fewer than three distinct sizes.
    """
    try:
        size, score = np.asarray(sizes, float), np.asarray(scores, float)
    except (TypeError, ValueError) as error:
        raise DataError(f"discontinuity: {error}; give numbers") from None
    if size.shape != score.shape or size.ndim != 1 or size.size < 3:
        raise DataError(f"discontinuity: {size.size} sizes and {score.size} scores; give at least three of each")
    if not ((size > 0) & (size < np.inf)).all() or len(np.unique(size)) != size.size or not np.isfinite(score).all():
        raise DataError("discontinuity: sizes must be positive and distinct, scores finite")
    order = np.argsort(size)[-3:]
    (small, middle, large), (low, mid, high) = np.log(size[order]), score[order]
    expected = mid + (mid - low) / (middle - small) * (large - middle)
    return float(high - expected)
