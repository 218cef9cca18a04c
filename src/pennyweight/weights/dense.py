"""Dense weights: the matrix itself, in any floating-point dtype. Exact.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from torch import Tensor, nn

from pennyweight.errors import FormError, ShapeError
from pennyweight.weights import one_row
from pennyweight.weights.weight import Cost, Weight, check_finite, form


@form("dense")
class Dense(Weight):
    """A matrix kept as it is.

    Args:
        matrix: (M, N), floating point of at least 16 bits; a parameter keeps its identity, so tied layers stay tied.

    Raises:
        FormError: NaN or infinity, or whole numbers.

    Cost: M*N parameters, 2*M*N FLOPs a row.
    """

    tensors = ("matrix",)

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2:
            raise ShapeError(f"Dense: a tensor of shape {tuple(matrix.shape)} is not a matrix; give (out, in)")
        if not matrix.is_floating_point() or matrix.element_size() < 2:
            raise FormError(f"Dense: matrix is {matrix.dtype}; give 16, 32 or 64 bits of floating point")
        super().__init__(shape=(matrix.shape[0], matrix.shape[1]))
        check_finite(matrix, "Dense: matrix")
        # nn.Parameter(parameter) would make another one
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

    def prepared(self) -> one_row.Prepared:
        return one_row.plain(self.matrix)

    def cost(self) -> Cost:
        count = self.matrix.numel()
        return Cost(params=count, bytes=count * self.matrix.element_size(), flops=2 * count)
