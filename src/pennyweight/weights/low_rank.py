"""Low-rank weights: a matrix kept as two thin factors.

Source: C. Eckart and G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936: the
truncated SVD is the best rank-R approximation in the Frobenius norm. Differs from the source: nothing.

Shape letters: M out features, N in features, R rank; ... any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError, ShapeError
from pennyweight.weights.weight import Cost, Weight, check_finite, form


@form("low_rank")
class LowRank(Weight):
    """``W = up @ down`` of shape (M, N), smaller than dense while ``R < M*N / (M + N)``.

    Args:
        up: (M, R).
        down: (R, N), the dtype and device of ``up``.

    Raises:
        ShapeError: the factors share no rank.
        FormError: NaN or infinity.

    Cost: R*(M + N) parameters, 2*R*(M + N) FLOPs a row of input. Exact when R reaches the rank of the matrix it stands
    for, up to rounding in its dtype.
    """

    tensors = ("up", "down")

    def __init__(self, up: Tensor, down: Tensor) -> None:
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ShapeError(
                f"LowRank: up {tuple(up.shape)} and down {tuple(down.shape)} share no rank; give (M, R) and (R, N)"
            )
        super().__init__(shape=(up.shape[0], down.shape[1]))
        check_finite(up, "LowRank: up")
        check_finite(down, "LowRank: down")
        self.up = up if isinstance(up, nn.Parameter) else nn.Parameter(up)
        self.down = down if isinstance(down, nn.Parameter) else nn.Parameter(down)

    @classmethod
    def nearest(cls, matrix: Tensor, rank: int) -> LowRank:
        """The weight of rank ``rank`` nearest to ``matrix`` (M, N) in the Frobenius norm; all of it past its rank."""
        if rank < 0:
            raise OptionError(f"LowRank.nearest: rank {rank}; give 0 (nothing) to {min(matrix.shape)} (all of it)")
        check_finite(matrix, "LowRank.nearest: matrix")
        # in double: float32 loses singular values below 1e-7 of the largest, and `rank` may reach that far
        left, singular, right = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
        root = singular[:rank].sqrt()  # shared evenly, so that neither factor overflows a 16-bit dtype
        # row by row in memory, as a file gives them back: products of other layouts are rounded otherwise
        up, down = (left[:, :rank] * root).to(matrix), (root[:, None] * right[:rank]).to(matrix)
        return cls(up.contiguous(), down.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T.to(x.dtype) @ self.up.T.to(x.dtype)

    def dense(self) -> Tensor:
        return self.up.to(self.dtype) @ self.down.to(self.dtype)

    def left(self, x: Tensor) -> Tensor:
        return x @ self.up.to(x.dtype) @ self.down.to(x.dtype)

    @property
    def T(self) -> LowRank:
        return LowRank(self.down.T, self.up.T)

    def rows(self, index: Tensor) -> Tensor:
        return self.up[index].to(self.dtype) @ self.down.to(self.dtype)

    def cost(self) -> Cost:
        params = self.up.numel() + self.down.numel()
        return Cost(params=params, bytes=self.up.nbytes + self.down.nbytes, flops=2 * params)
