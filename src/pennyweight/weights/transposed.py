"""The transpose of a form that is laid out by rows.

Shape letters: M out features, N in features of the weight held; ... any leading dimensions.
"""

from __future__ import annotations

from torch import Tensor

from pennyweight.errors import FormError
from pennyweight.weights.weight import Cost, Nested, Weight, form


@form("transposed")
class Transposed(Weight):
    """``W^T`` of shape (N, M) for a weight ``W`` of shape (M, N) that it holds.

    Made by the ``T`` of forms that are no transpose of their own kind.

    Raises:
        FormError: ``W`` is a combinator, which transposes term by term.

    Cost: parameters and bytes of ``W``; FLOPs a row as of ``W`` where it multiplies from the left in its own way, else
    2*M*N. Exact.
    """

    parts = ("weight",)
    weight: Weight

    def __init__(self, weight: Weight) -> None:
        if isinstance(weight, Nested):
            raise FormError(f"Transposed: {weight.form} transposes term by term; take its .T")
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
        held = self.weight.cost()
        plain = type(self.weight).left is Weight.left
        return Cost(held.params, held.bytes, 2 * self.shape[0] * self.shape[1] if plain else held.flops)
