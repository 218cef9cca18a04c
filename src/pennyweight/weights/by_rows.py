"""Products with a weight whose rows are made from codes, a few rows at a time.

A matrix that does not fit the cache is read and written from memory several times over when it is made whole: a 4-bit
head of 49152 x 576 took 129 ms for one token so, 31 ms in pieces of a million entries (one core), and 113 MB less.

Shape letters: M out features, N in features; ... any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.weights.weight import Weight

#: Entries of the matrix made at a time: 4 MB of float32.
PIECE = 2**20


def by_rows(weight: Weight, x: Tensor) -> Tensor:
    """``x @ W.T``: (..., N) -> (..., M), where `Weight.rows` makes rows without the others."""
    m, n = weight.shape
    step = max(1, PIECE // n)
    if m < 2 * step:
        return x @ weight.dense().T.to(x.dtype)
    pieces = [torch.arange(start, min(m, start + step), device=weight.device) for start in range(0, m, step)]
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in weight.parameters())):
        return torch.cat([x @ weight.rows(piece).T.to(x.dtype) for piece in pieces], dim=-1)
    found = x.new_empty(*x.shape[:-1], m)
    for start, piece in zip(range(0, m, step), pieces, strict=True):
        found[..., start : start + len(piece)] = x @ weight.rows(piece).T.to(x.dtype)
    return found
