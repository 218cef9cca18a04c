"""The column solver for codes that stand for several columns at a time.

Source: A. Tseng et al., "QuIP#", arXiv:2402.04396, section 4.1 (block LDLQ): with H^-1 = U^T U, changing the columns b
by E is best answered by moving all later columns F by ``-E U_bb^-1 U_bF``; for single columns this is GPTQ. Differs
from the source: the factor is that of `pennyweight.solvers.factor`.

Shape letters: M out features (rows of several matrices may be stacked), N in features, S columns of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 128


@torch.no_grad()
def solve_vectors(columns: Tensor, lower: Tensor, size: int, settle: Callable[[int, Tensor], Tensor]) -> None:
    """Settle every vector in turn, each error made good by the columns not settled yet.

    Args:
        columns: (N, M) float32, contiguous: the transposed matrix. Overwritten by the errors made.
        lower: (N, N), `pennyweight.solvers.factor.Factor.lower`.
        size: S, which divides 128; the last vector may be shorter.
        settle: from the first column and the values (S, M), what they become.
    """
    assert _BLOCK % size == 0
    width = columns.shape[0]
    spread = lower.clone()  # L_Fb L_bb^-1: what the columns F owe to the errors of the vector b
    for start in range(0, width, size):
        stop = min(width, start + size)
        inner = lower[start:stop, start:stop]
        spread[start:, start:stop] = torch.linalg.solve_triangular(
            inner, lower[start:, start:stop], upper=False, left=False, unitriangular=True
        )
    for begin in range(0, width, _BLOCK):
        end = min(width, begin + _BLOCK)
        for start in range(begin, end, size):
            stop = min(end, start + size)
            values = columns[start:stop]
            if start > begin:
                values.addmm_(spread[start:stop, begin:start], columns[begin:start], alpha=-1)
            values.sub_(settle(start, values))
        columns[end:].addmm_(spread[end:, begin:end], columns[begin:end], alpha=-1)
