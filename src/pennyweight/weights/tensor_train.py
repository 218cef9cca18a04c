"""Tensor-train matrices: three small cores, a row being a product of one slice of each.

Source: C. Yin et al., "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models", arXiv:2101.11714; I.
Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33, 2011 (the nearest one by successive truncated SVDs,
within the root of 2 of the best). Differs from them: always three cores.

Shape letters: M out features, N in features; A, B, C factors of M (A*B*C at least M), D, E, F factors of N (D*E*F = N),
P, Q ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import OptionError, ShapeError
from pennyweight.weights.ids import known_ids
from pennyweight.weights.structured import held
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, check_finite, form


@form("tensor_train")
class TensorTrain(Weight):
    """``W[(a, b, c), (d, e, f)] = first[a, d] @ second[b, :, e] @ third[c, :, f]``, numbers in mixed radix.

    Args:
        first: (A, D, P).
        second: (B, P, E, Q).
        third: (C, Q, F).
        rows: M, at most A*B*C.

    Cost: parameters of the cores; 2*M*N FLOPs a row, the matrix being made once a call. Exact for its own kind, and
    every matrix where P and Q are full (A*D, C*F).
    """

    tensors = ("first", "second", "third")

    def __init__(self, first: Tensor, second: Tensor, third: Tensor, *, rows: int) -> None:
        fit = (first.ndim, second.ndim, third.ndim) == (3, 4, 3) and (
            first.shape[2] == second.shape[1] and second.shape[3] == third.shape[1]
        )
        if not fit or not 1 <= rows <= first.shape[0] * second.shape[0] * third.shape[0]:
            shapes = ", ".join(str(tuple(core.shape)) for core in (first, second, third))
            raise ShapeError(
                f"TensorTrain: cores {shapes} for {rows} rows; give (A, D, P), (B, P, E, Q), (C, Q, F) and A*B*C"
            )
        super().__init__(shape=(rows, first.shape[1] * second.shape[2] * third.shape[2]))
        self.first = held(first, "TensorTrain: first")
        self.second = held(second, "TensorTrain: second")
        self.third = held(third, "TensorTrain: third")

    @classmethod
    def nearest(
        cls, matrix: Tensor, *, rows: tuple[int, int, int], columns: tuple[int, int, int], rank: int
    ) -> TensorTrain:
        """A tensor train of ranks up to ``rank`` near to ``matrix`` (M, N), within the root of 2 of the nearest.

        Args:
            matrix: (M, N).
            rows: (A, B, C).
            columns: (D, E, F).
            rank: P and Q at most.

        Raises:
            OptionError: factors that do not make up the shape, or no rank.
        """
        check_finite(matrix, "TensorTrain.nearest: matrix")
        (a, b, c), (d, e, f) = rows, columns
        if rank < 1 or a * b * c < matrix.shape[0] or d * e * f != matrix.shape[1]:
            raise OptionError(
                f"TensorTrain.nearest: {rows} x {columns} of rank {rank} for a matrix {tuple(matrix.shape)}; give "
                "factors of at least its rows and exactly its columns, and a rank from 1"
            )
        full = torch.zeros(a * b * c, matrix.shape[1], dtype=torch.float64)
        full[: len(matrix)] = matrix.detach().double()
        tensor = full.view(a, b, c, d, e, f).permute(0, 3, 1, 4, 2, 5).reshape(a * d, -1)
        left, rest = _cut(tensor, rank)
        middle, last = _cut(rest.reshape(rest.shape[0] * b * e, c * f), rank)
        p, q = left.shape[1], middle.shape[1]
        second = middle.view(p, b, e, q).permute(1, 0, 2, 3)
        third = last.view(q, c, f).transpose(0, 1)
        cores = (left.view(a, d, p), second, third)
        return cls(*(core.contiguous().to(matrix) for core in cores), rows=len(matrix))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    def dense(self) -> Tensor:
        whole = torch.einsum("adp,bpeq,cqf->abcdef", self.first, self.second, self.third)
        return whole.reshape(-1, self.shape[1])[: self.shape[0]]

    def rows(self, index: Tensor) -> Tensor:
        flat = known_ids(index, self.shape[0], "TensorTrain").reshape(-1)
        b, c = self.second.shape[0], self.third.shape[0]
        one = self.first[torch.div(flat, b * c, rounding_mode="floor")]  # (rows, D, P)
        two = self.second[torch.div(flat, c, rounding_mode="floor") % b]  # (rows, P, E, Q)
        three = self.third[flat % c]  # (rows, Q, F)
        left = (one @ two.flatten(2)).view(len(flat), one.shape[1] * two.shape[2], two.shape[3])  # (rows, D*E, Q)
        return (left @ three).reshape(*index.shape, self.shape[1])

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def settings(self) -> dict[str, Any]:
        return {"rows": self.shape[0]}

    def cost(self) -> Cost:
        count = self.first.numel() + self.second.numel() + self.third.numel()
        size = self.first.nbytes + self.second.nbytes + self.third.nbytes
        return Cost(count, size, 2 * self.shape[0] * self.shape[1])


def _cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The truncated SVD as two factors of one size."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    root = singular[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
