"""Semi-nonnegative factors of a matrix: one of any sign, one of none below zero.

Source: C. Ding, T. Li and M. Jordan, "Convex and Semi-Nonnegative Matrix Factorizations", IEEE TPAMI 32(1), 2010: the
free factor by least squares, the other one by a multiplicative rule under which the error never rises.
Differs from the source: it starts from the sizes of singular vectors, not from clusters.

Shape letters: M out features, N in features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.solvers.low_rank import low_rank

_TINY = 1e-30


@torch.no_grad()
def semi_nmf(matrix: Tensor, rank: int, *, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Factors (M, R) and (R, N), in double, the second nowhere negative, whose product is near ``matrix`` (M, N).

    Args:
        matrix: (M, N).
        rank: R, at most the smaller side.
        iterations: of both updates; the free factor is then fitted once more.
    """
    matrix = matrix.double()
    codes = low_rank(matrix, rank, None, "semi_nmf")[1].T.abs()  # (N, R), G in the paper
    for _ in range(iterations):
        free = _fitted(matrix, codes)
        pull, gram = matrix.T @ free, free.T @ free
        up = pull.clamp_min(0) + codes @ (-gram).clamp_min(0)
        down = (-pull).clamp_min(0) + codes @ gram.clamp_min(0)
        codes = codes * (up / down.clamp_min(_TINY)).sqrt()  # eq. 10
    free = _fitted(matrix, codes)
    # as large as each other, so that neither overflows 16 bits: a positive factor a direction changes no sign
    share = (free.norm(dim=0).clamp_min(_TINY) / codes.norm(dim=0).clamp_min(_TINY)).sqrt()
    return free / share, (codes * share).T


def _fitted(matrix: Tensor, codes: Tensor) -> Tensor:
    """(M, R) the least-squares factor of any sign for ``codes`` (N, R)."""
    found: Tensor = matrix @ codes @ torch.linalg.pinv(codes.T @ codes, rtol=1e-13, hermitian=True)
    return found
