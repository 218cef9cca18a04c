"""Wanda as its paper and official code state it: slow, plain, and sharing no code with ours.

Source: M. Sun, Z. Liu, A. Bair and J. Z. Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
arXiv:2306.11695, algorithm 1.
"""

import torch
from torch import Tensor


def wanda(matrix: Tensor, hessian: Tensor, *, sparsity: float = 0.5, pattern: tuple[int, int] | None = None) -> Tensor:
    """The pruned matrix (M, N); ``pattern`` is (kept, of)."""
    result = matrix.clone()
    norm = torch.diag(hessian).sqrt()
    for row in range(matrix.shape[0]):
        scores = matrix[row].abs() * norm
        if pattern is None:
            lowest = torch.sort(scores, stable=True).indices[: int(matrix.shape[1] * sparsity)]
            result[row, lowest] = 0
            continue
        kept, of = pattern
        for start in range(0, matrix.shape[1], of):
            lowest = torch.sort(scores[start : start + of], stable=True).indices[: of - kept]
            result[row, start + lowest] = 0
    return result
