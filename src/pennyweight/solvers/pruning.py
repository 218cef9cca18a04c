"""Zeroing as a rule of the column solver, alone or with the rounding of what is kept.

Source: E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv:2301.00774: in every stretch of columns, the entries of smallest w^2 / (H^-1)_cc are zeroed, where w already
holds what earlier errors asked of it and H^-1 is that of the columns left (its diagonal is the squared diagonal of
U); kept entries may be rounded in the same pass.

Shape letters: M out features (rows of several matrices may be stacked), N in features, S columns of a stretch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.solvers.masks import rank, share, smallest
from pennyweight.solvers.rounding import Rounding, spans


class Pruning:
    """Zeroes the least salient entries of each stretch, and rounds the others where it is told how.

    Args:
        diagonal: (N,) `Factor.diagonal`.
        heights: rows of each of the stacked matrices; each is pruned on its own.
        sparsity: share of zeros in each stretch of ``block`` columns.
        pattern: (kept, of) for N:M sparsity, or None.
        block: columns of a stretch where there is no pattern.
        by_row: the share is met in each row of a stretch, not only in the stretch as a whole.
        rounding: what happens to the kept entries, or None. Groups fitted on the way must be the stretches; their grids
            are then fitted to the kept entries alone.
    """

    def __init__(
        self,
        diagonal: Tensor,
        heights: list[int],
        *,
        sparsity: float,
        pattern: tuple[int, int] | None = None,
        block: int = 128,
        by_row: bool = False,
        rounding: Rounding | None = None,
    ) -> None:
        self.stretch = min(block, diagonal.numel()) if pattern is None else pattern[1]
        assert rounding is None or rounding.stretch in (self.stretch, diagonal.numel())
        self.heights, self.sparsity, self.pattern, self.by_row = heights, sparsity, pattern, by_row
        self.rounding = rounding
        self._weight = diagonal.square().reciprocal()
        shape = (diagonal.numel(), sum(heights))
        #: (N, M) True where pruned.
        self.pruned = torch.zeros(shape, dtype=torch.bool, device=diagonal.device)
        #: (N, M) the kept entries, zero elsewhere; empty while the rounding holds them.
        self.values = torch.empty(shape if rounding is None else (0, 0), device=diagonal.device)

    def open(self, start: int, stop: int, columns: Tensor) -> None:
        pruned = self._select(columns.square() * self._weight[start:stop, None])
        self.pruned[start:stop] = pruned
        if self.rounding is not None and self.rounding.grids is None:
            # every row keeps as many, so that what is kept is a matrix (M, kept) again
            kept = columns.T[~pruned.T].view(columns.shape[1], -1)
            self.rounding.open(start, stop, kept.T)

    def _select(self, scores: Tensor) -> Tensor:
        """(S, M) the mask of the pruned."""
        if self.pattern is not None:
            kept, of = self.pattern
            return rank(scores) < of - kept
        if self.by_row:
            return smallest(scores.T.contiguous(), share(self.sparsity, scores.shape[0])).T
        parts = []
        for span in spans(self.heights):
            part = scores[:, span].contiguous()
            parts.append(smallest(part.view(-1), share(self.sparsity, part.numel())).view(part.shape))
        return torch.cat(parts, dim=1)

    def settle(self, column: int, values: Tensor) -> None:
        pruned = self.pruned[column]
        if self.rounding is None:
            lost = values * pruned
            torch.sub(values, lost, out=self.values[column])
            values.copy_(lost)
        else:
            before = values.clone()
            self.rounding.settle(column, values)
            torch.where(pruned, before, values, out=values)
