"""Weights put together side by side: one on top of another, or one beside another.

Shape letters: M out features, N in features, k terms; ... any leading dimensions.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import OptionError, ShapeError
from pennyweight.weights.ids import known_ids
from pennyweight.weights.weight import Cost, Nested, Weight, form


@form("stacked")
class Stacked(Nested):
    """``[W_1; ...; W_k]`` (axis 0: rows after rows) or ``[W_1, ..., W_k]`` (axis 1: columns after columns).

    Raises:
        OptionError: another axis.
        ShapeError: no term, or terms that differ in the other direction.

    Cost: that of its terms, and for axis 1 M*(k - 1) FLOPs a row for the additions. Exact where its terms are.
    """

    def __init__(self, *terms: Weight, axis: int = 0) -> None:
        if axis not in (0, 1):
            raise OptionError(f"Stacked: axis {axis}; give 0 (rows) or 1 (columns)")
        if not terms or len({term.shape[1 - axis] for term in terms}) != 1:
            shapes = ", ".join(str(term.shape) for term in terms) or "(none)"
            raise ShapeError(f"Stacked: terms of shapes {shapes}; give one {'width' if axis == 0 else 'height'}")
        total, other = sum(term.shape[axis] for term in terms), terms[0].shape[1 - axis]
        super().__init__(terms, shape=(total, other) if axis == 0 else (other, total))
        self.axis = axis

    def _joined(self, x: Tensor, method: str, axis: int) -> Tensor:
        """What terms give: side by side where ``axis`` is that of the stack, else summed over their parts of ``x``."""
        terms = self.named_terms()
        if axis == self.axis:
            return torch.cat([getattr(term, method)(x) for _, term in terms], dim=-1)
        parts = torch.split(x, [term.shape[self.axis] for _, term in terms], dim=-1)
        found = (getattr(term, method)(part) for (_, term), part in zip(terms, parts, strict=True))
        summed: Tensor = reduce(torch.add, found)
        return summed

    def forward(self, x: Tensor) -> Tensor:
        return self._joined(x, "forward", 0)

    def left(self, x: Tensor) -> Tensor:
        return self._joined(x, "left", 1)

    def dense(self) -> Tensor:
        return torch.cat([term.dense().to(self.dtype) for _, term in self.named_terms()], dim=self.axis)

    @property
    def T(self) -> Stacked:
        return Stacked(*(term.T for _, term in self.named_terms()), axis=1 - self.axis)

    def rows(self, index: Tensor) -> Tensor:
        if self.axis == 1:
            return torch.cat([term.rows(index).to(self.dtype) for _, term in self.named_terms()], dim=-1)
        flat = known_ids(index, self.shape[0], "Stacked").reshape(-1)
        found = torch.zeros(len(flat), self.shape[1], dtype=self.dtype, device=self.device)
        start = 0
        for _, term in self.named_terms():
            (here,) = torch.where((flat >= start) & (flat < start + term.shape[0]))
            if len(here):
                found = found.index_put((here,), term.rows(flat[here] - start).to(self.dtype))
            start += term.shape[0]
        return found.view(*index.shape, self.shape[1])

    def settings(self) -> dict[str, Any]:
        return {"axis": self.axis}

    def cost(self) -> Cost:
        adding = Cost(flops=self.shape[0] * (len(self.terms) - 1) if self.axis == 1 else 0)
        return reduce(Cost.__add__, (term.cost() for _, term in self.named_terms()), adding)
