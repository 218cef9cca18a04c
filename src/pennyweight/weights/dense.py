"""Dense weights: the matrix itself, in any floating-point dtype. Exact.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from torch import Tensor, nn

from pennyweight.errors import ShapeError
from pennyweight.weights.weight import Cost, Weight, form


@form("dense")
class Dense(Weight):
    """A matrix kept as it is.

    Args:
        matrix: (M, N), floating point.

    Cost: M*N parameters, 2*M*N FLOPs a row.
    """

    tensors = ("matrix",)

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2:
            raise ShapeError(f"Dense: a tensor of shape {tuple(matrix.shape)} is not a matrix; give (out, in)")
        super().__init__(shape=(matrix.shape[0], matrix.shape[1]))
        # nn.Parameter(Parameter) keeps identity, so tied layers stay tied
        self.matrix = matrix if isinstance(matrix, nn.Parameter) else nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T.to(x.dtype)

    def dense(self) -> Tensor:
        return self.matrix

    @property
    def T(self) -> Dense:
        return Dense(self.matrix.T)

    def rows(self, index: Tensor) -> Tensor:
        return nn.functional.embedding(index, self.matrix)

    def cost(self) -> Cost:
        count = self.matrix.numel()
        return Cost(params=count, bytes=count * self.matrix.element_size(), flops=2 * count)
