"""A compact weight that is run as the matrix it stands for where few rows come in.

Source: X. Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward
Layers", arXiv:2406.16450, section 3.3 (pre-merge): one product is faster than two thin ones while a batch is too small
to fill the machine. Differs from the source: any form; the matrix is made when it is first wanted.

Shape letters: M out features, N in features; ... any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.weights.weight import Cost, Weight, form


@form("premerged")
class Premerged(Weight):
    """``W`` as it is held, or as a matrix for at most ``max_rows`` rows of input where no gradients are asked for.

    Args:
        weight: (M, N).
        max_rows: rows of input up to which the matrix is used.

    Raises:
        OptionError: ``max_rows`` below 1.

    Cost: that of ``weight``: files hold no matrix, memory does from the first use on. Exact up to rounding.
    """

    parts = ("weight",)
    weight: Weight

    def __init__(self, weight: Weight, *, max_rows: int) -> None:
        if max_rows < 1:
            raise OptionError(f"Premerged: max_rows {max_rows}; give at least 1")
        super().__init__(shape=weight.shape)
        self.weight, self.max_rows = weight, max_rows
        self._made: tuple[object, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.shape[:-1].numel() > self.max_rows:
            found: Tensor = self.weight(x)
            return found
        return x @ self._matrix(x.dtype).T

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """``W`` in ``dtype``, made anew when anything it is made of has changed."""
        held = [*self.weight.parameters(), *self.weight.buffers()]
        key = (dtype, [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in held])
        if self._made is None or self._made[0] != key:
            self._made = key, self.weight.dense().detach().to(dtype)
        return self._made[1]

    def left(self, x: Tensor) -> Tensor:
        return self.weight.left(x)

    def dense(self) -> Tensor:
        return self.weight.dense()

    @property
    def T(self) -> Weight:
        return self.weight.T

    def rows(self, index: Tensor) -> Tensor:
        return self.weight.rows(index)

    def settings(self) -> dict[str, Any]:
        return {"max_rows": self.max_rows}

    def cost(self) -> Cost:
        return self.weight.cost()
