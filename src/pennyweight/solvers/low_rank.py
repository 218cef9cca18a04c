"""The low-rank part of a matrix that matters most, to itself or to its outputs.

Source: X. Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
arXiv:2403.07378: with H = S S^T the second moment of the inputs, truncating the SVD of W S loses exactly the discarded
singular values in the outputs. Differs from the source: the right factor is U^T W, which equals Sigma V^T S^-1 and
needs no inverse of S; U comes from a Gram matrix.

Shape letters: M out features, N in features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import DataError, OptionError


def check_one_size(rank: float | None, density: float | None, where: str) -> None:
    """Refuse factors whose size is said twice or not at all.

    Raises:
        OptionError: both or neither.
    """
    if (rank is None) == (density is None):
        both = "neither rank nor density" if rank is None else f"rank = {rank} and density = {density}"
        raise OptionError(f"{where}: {both}; give one of the two")


@torch.no_grad()
def low_rank(matrix: Tensor, rank: int, moment: Tensor | None, where: str) -> tuple[Tensor, Tensor]:
    """Factors (M, R) and (R, N), in double, whose product is nearest to ``matrix`` (M, N).

    Args:
        matrix: (M, N).
        rank: R, at most the smaller side.
        moment: (N, N), positive definite: nearness is that of the outputs, ``tr(D H D^T)``; None: of the matrix.
        where: named in errors.

    Raises:
        DataError: ``moment`` is not positive definite (looked at where M > N).
    """
    matrix = matrix.double()
    left = _leading(matrix, None if moment is None else moment.double(), rank, where)
    right = left.T @ matrix
    # unit columns on the left leave all the size to the right: share it evenly, so that neither overflows 16 bits
    root = right.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return left * root, right / root[:, None]


def damped(moment: Tensor, damping: float) -> Tensor:
    """``moment`` (N, N) in double with ``damping`` times the mean of its diagonal added to it."""
    moment = moment.double()
    return moment + damping * moment.diagonal().mean() * torch.eye(moment.shape[0]).to(moment)


def _leading(matrix: Tensor, moment: Tensor | None, rank: int, where: str) -> Tensor:
    """(M, R) orthonormal: the leading left singular vectors of ``matrix @ S``, S S^T = ``moment``.

    By the smaller Gram matrix, five times as fast as an SVD. In double: squaring loses the directions below 1e-8 of the
    largest singular value, and what is lost there is below the rounding of any weight.
    """
    rows, width = matrix.shape
    if rows <= width:
        seen = matrix if moment is None else matrix @ moment
        return _largest(seen @ matrix.T, rank)
    seen = matrix if moment is None else matrix @ _cholesky(moment, where)
    left: Tensor = torch.linalg.qr(seen @ _largest(seen.T @ seen, rank)).Q
    return left


def _largest(gram: Tensor, count: int) -> Tensor:
    """The eigenvectors of the ``count`` largest eigenvalues, as columns, the largest first."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -count:].flip(1)


def _cholesky(moment: Tensor, where: str) -> Tensor:
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        raise DataError(
            f"{where}: the second moment of {moment.shape[0]} inputs is not positive definite; raise damping, "
            "to 0.01 say, or give more calibration data"
        )
    return root
