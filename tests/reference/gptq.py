"""GPTQ as its paper and official code state it, one column after the other: slow, plain, and sharing no code with ours.

Source: arXiv:2210.17323, algorithm 1. The grid is the min-max grid with an integer zero, its scale rounded to float16
as files store it.
"""

import torch
from torch import Tensor


def minmax_grid(columns: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero (M,) of ``columns`` (M, S); the range always holds 0."""
    low = torch.minimum(columns.min(1).values, torch.tensor(0.0))
    high = torch.maximum(columns.max(1).values, torch.tensor(0.0))
    scale = ((high - low) / (2**bits - 1)).half().float()
    scale[scale == 0] = 1.0
    return scale, torch.round(-low / scale)


def nearest(column: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    code = torch.clamp(torch.round(column / scale) + zero, 0, 2**bits - 1)
    return scale * (code - zero)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U, upper triangular with H^-1 = U^T U, and the dead inputs."""
    hessian = hessian.clone()
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    index = torch.arange(hessian.shape[0])
    hessian[index, index] += damping * torch.mean(torch.diag(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True), dead


def gptq(
    matrix: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block: int = 128,
) -> Tensor:
    """The rounded matrix (M, N)."""
    w = matrix.clone()
    width = w.shape[1]
    w[:, torch.diag(hessian) == 0] = 0
    size = width if group_size is None else group_size
    fixed = [minmax_grid(w[:, start : start + size], bits) for start in range(0, width, size)]
    order = torch.arange(width)
    if act_order:
        diagonal = torch.diag(hessian).clone()
        diagonal[diagonal == 0] = 1
        order = torch.argsort(diagonal, descending=True, stable=True)
        w, hessian = w[:, order], hessian[order][:, order]
    upper, _ = inverse_factor(hessian, damping)
    rounded = torch.zeros_like(w)
    scale, zero = fixed[0]
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.zeros(w.shape[0], stop - start)
        for column in range(start, stop):
            if static_groups:
                scale, zero = fixed[int(order[column]) // size]
            elif group_size is not None and column % group_size == 0:
                scale, zero = minmax_grid(w[:, column : column + group_size], bits)
            rounded[:, column] = nearest(w[:, column], scale, zero, bits)
            error = (w[:, column] - rounded[:, column]) / upper[column, column]
            w[:, column:stop] -= torch.outer(error, upper[column, column:stop])
            errors[:, column - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded[:, torch.argsort(order)]
