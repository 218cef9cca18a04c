"""The transpose of a form that is laid out by rows.

Shape letters: M out features, N in features of the weight held; ... any leading dimensions.
"""

from __future__ import annotations

from torch import Tensor

from pennyweight.weights.weight import Cost, Weight, form


@form("transposed")
class Transposed(Weight):
    """``W^T`` of shape (N, M) for a weight ``W`` of shape (M, N) that it holds.

    Cost: that of ``W``. Exact.
    """

    parts = ("weight",)
    weight: Weight

    def __init__(self, weight: Weight) -> None:
        super().__init__(shape=(weight.shape[1], weight.shape[0]))
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.left(x)

    def left(self, x: Tensor) -> Tensor:
        return self.weight.forward(x)

    def dense(self) -> Tensor:
        return self.weight.dense().T

    @property
    def T(self) -> Weight:
        return self.weight

    def cost(self) -> Cost:
        return self.weight.cost()
