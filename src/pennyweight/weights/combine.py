"""Combinators: a weight made of weights.

Shape letters: M out features, N in features; ... any leading dimensions.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from pennyweight.errors import ShapeError
from pennyweight.weights.weight import Cost, Nested, Weight, form


def _same_shape(name: str, terms: tuple[Weight, ...]) -> tuple[int, int]:
    shapes = {term.shape for term in terms}
    if len(shapes) != 1:
        raise ShapeError(f"{name}: terms of shapes {', '.join(map(str, sorted(shapes))) or '(none)'}; give one shape")
    return shapes.pop()


@form("sum")
class Sum(Nested):
    """``W = W_1 + ... + W_k``, all of one shape (M, N).

    Cost: that of its terms, and M*(k - 1) FLOPs a row for the additions. Exact where its terms are.
    """

    def __init__(self, *terms: Weight) -> None:
        super().__init__(terms, shape=_same_shape("Sum", terms))

    def forward(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (term.forward(x) for _, term in self.named_terms()))

    def left(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (term.left(x) for _, term in self.named_terms()))

    def dense(self) -> Tensor:
        return reduce(torch.add, (term.dense().to(self.dtype) for _, term in self.named_terms()))

    @property
    def T(self) -> Sum:
        return Sum(*(term.T for _, term in self.named_terms()))

    def rows(self, index: Tensor) -> Tensor:
        return reduce(torch.add, (term.rows(index).to(self.dtype) for _, term in self.named_terms()))

    def cost(self) -> Cost:
        adding = Cost(flops=self.shape[0] * (len(self.terms) - 1))
        return reduce(Cost.__add__, (term.cost() for _, term in self.named_terms()), adding)


@form("product")
class Product(Nested):
    """``W = W_1 @ ... @ W_k``: (M, A) @ (A, B) @ ... @ (Z, N), applied from the right.

    Raises:
        ShapeError: neighbors that do not chain.

    Cost: that of its terms. Exact where its terms are.
    """

    def __init__(self, *terms: Weight) -> None:
        shapes = [term.shape for term in terms]
        if not terms or any(left[1] != right[0] for left, right in pairwise(shapes)):
            raise ShapeError(f"Product: shapes {' @ '.join(map(str, shapes)) or '(none)'} do not chain")
        super().__init__(terms, shape=(shapes[0][0], shapes[-1][1]))

    def forward(self, x: Tensor) -> Tensor:
        return reduce(lambda found, named: named[1].forward(found), reversed(self.named_terms()), x)

    def left(self, x: Tensor) -> Tensor:
        return reduce(lambda found, named: named[1].left(found), self.named_terms(), x)

    def dense(self) -> Tensor:
        *rest, (_, last) = self.named_terms()
        found = last.dense().to(self.dtype)
        for _, term in reversed(rest):
            found = term.forward(found.T).T  # as the form computes best: a permutation multiplies nothing
        return found

    @property
    def T(self) -> Product:
        return Product(*(term.T for _, term in reversed(self.named_terms())))

    def rows(self, index: Tensor) -> Tensor:
        (_, first), *rest = self.named_terms()
        return reduce(lambda found, named: named[1].left(found), rest, first.rows(index).to(self.dtype))

    def cost(self) -> Cost:
        return reduce(Cost.__add__, (term.cost() for _, term in self.named_terms()), Cost())


@form("hadamard")
class Hadamard(Nested):
    """``W = W_1 * ... * W_k`` elementwise, all of one shape (M, N); for masks and learned gains.

    Cost: parameters and bytes of its terms; 2*M*N FLOPs a row, the matrix being made once a call. Exact where its terms
    are.
    """

    def __init__(self, *terms: Weight) -> None:
        super().__init__(terms, shape=_same_shape("Hadamard", terms))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    def dense(self) -> Tensor:
        return reduce(torch.mul, (term.dense().to(self.dtype) for _, term in self.named_terms()))

    @property
    def T(self) -> Hadamard:
        return Hadamard(*(term.T for _, term in self.named_terms()))

    def rows(self, index: Tensor) -> Tensor:
        return reduce(torch.mul, (term.rows(index).to(self.dtype) for _, term in self.named_terms()))

    def cost(self) -> Cost:
        inner = reduce(Cost.__add__, (term.cost() for _, term in self.named_terms()), Cost())
        return Cost(inner.params, inner.bytes, 2 * self.shape[0] * self.shape[1])
