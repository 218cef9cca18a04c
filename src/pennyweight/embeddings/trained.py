"""Trained tables made small at once, by those of the fourteen methods that have a nearest table.

Row 114; see `pennyweight.embeddings.table`. Rows are sorted by frequency where the method makes use of it, and an index
brings them back; its bytes count.

Shape letters: M rows, N width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.embeddings.table import Table, compressor
from pennyweight.errors import BudgetError, OptionError
from pennyweight.weights import SharedRows, Weight, check_finite

#: Methods that need no training.
TRAINED = ("robe", "tt", "dedup", "mgqe", "mde", "deeplight")
#: Those for which it matters which rows are frequent.
_BY_FREQUENCY = ("mgqe", "mde")


@torch.no_grad()
def compress(matrix: Tensor, method: str, budget_bytes: int, *, counts: Tensor | None = None, seed: int = 0) -> Weight:
    """``matrix`` (M, N) by ``method``, its floating values in 16 bits, within ``budget_bytes``.

    Args:
        matrix: (M, N).
        method: one of `TRAINED`.
        budget_bytes: of what is kept.
        counts: (M,) how often each row is looked up; None: all alike.
        seed: of every draw.

    Raises:
        OptionError: a method that has to be trained.
        BudgetError: it has no table that small.
    """
    if method not in TRAINED:
        raise OptionError(
            f"embeddings: {method!r} does not start from a trained table; give one of {', '.join(TRAINED)}"
        )
    check_finite(matrix, "embeddings: table")
    matrix = matrix.detach().float()
    counts = torch.ones(len(matrix)) if counts is None else counts.float()
    order, index = torch.arange(len(matrix)), None
    budget = budget_bytes
    if method in _BY_FREQUENCY and bool((counts.diff() > 0).any()):
        order = counts.argsort(descending=True, stable=True)
        index = order.argsort()
        budget -= len(matrix) * (2 if len(matrix) <= 2**15 else 4)
        if budget <= 0:
            raise BudgetError(
                f"embeddings: {budget_bytes} bytes do not hold the order of {len(matrix)} rows by frequency"
            )
    table = Table(
        counts[order] if index is not None else counts.sort(descending=True).values, matrix.shape[1], value_bytes=2
    )
    found = compressor(method, table, budget, seed=seed).nearest(matrix[order]).half()
    if index is not None:
        found = SharedRows(found, index, rows=len(matrix), rule="stored")
    size = found.cost().bytes
    if size > budget_bytes:
        raise BudgetError(f"embeddings: {method} takes {size} bytes of {budget_bytes}; raise the budget")
    return found
