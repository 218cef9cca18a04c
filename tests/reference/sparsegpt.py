"""SparseGPT as its paper and official code state it: slow, plain, and sharing no code with ours.

Source: arXiv:2301.00774, algorithm 1. The official code prunes every score up to and including the one at position
``int(sparsity * count)`` of the sorted scores, one more than that share: ``inclusive`` says whether to.
"""

import torch
from torch import Tensor

from .gptq import inverse_factor, minmax_grid, nearest


def sparsegpt(
    matrix: Tensor,
    hessian: Tensor,
    *,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    bits: int | None = None,
    damping: float = 0.01,
    block: int = 128,
    inclusive: bool = False,
) -> Tensor:
    """The pruned matrix (M, N); ``pattern`` is (kept, of)."""
    w = matrix.clone()
    width = w.shape[1]
    upper, dead = inverse_factor(hessian, damping)
    w[:, dead] = 0
    scale, zero = minmax_grid(w, bits) if bits is not None else (None, None)
    result = torch.zeros_like(w)
    for start in range(0, width, block):
        stop = min(start + block, width)
        diagonal = torch.diag(upper)[start:stop]
        pruned = torch.zeros(w.shape[0], stop - start, dtype=torch.bool)
        if pattern is None:
            scores = w[:, start:stop] ** 2 / diagonal**2
            ordered = torch.sort(scores.flatten()).values
            position = int(scores.numel() * sparsity)
            pruned = scores <= ordered[position] if inclusive else scores < ordered[position]
        errors = torch.zeros(w.shape[0], stop - start)
        for column in range(start, stop):
            place = column - start
            if pattern is not None and place % pattern[1] == 0:
                kept, of = pattern
                scores = w[:, column : column + of] ** 2 / diagonal[place : place + of] ** 2
                lowest = torch.topk(scores, of - kept, dim=1, largest=False).indices
                pruned.scatter_(1, place + lowest, True)
            q = w[:, column].clone()
            q[pruned[:, place]] = 0
            if bits is not None:
                q = nearest(q, scale, zero, bits)
            result[:, column] = q
            error = (w[:, column] - q) / upper[column, column]
            w[:, column:stop] -= torch.outer(error, upper[column, column:stop])
            errors[:, place] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return result
