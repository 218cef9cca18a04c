"""Vector-quantized weights: runs of neighboring inputs coded together, by the nearest of a table of vectors.

Sources: R. Gray, "Vector quantization", IEEE ASSP Magazine 1, 1984; P. Stock et al., "And the Bit Goes Down: Revisiting
the Quantization of Neural Networks", arXiv:1907.05686 (for weights). Differs from them: one table for the matrix.

Shape letters: M out features, N in features, K vectors of the table, D numbers of a vector, C vectors of a row,
B bytes of a row of codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import FormError, OptionError, ShapeError
from pennyweight.weights.packing import pack, unpack
from pennyweight.weights.quantized import check_packed
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, check_finite, form

_CHUNK = 2**22  # distances held at once: 16 MB


@form("vector_codebook")
class VectorCodebook(Weight):
    """``W[i, D*c : D*(c+1)] = table[code[i, c]]``: ``bits / D`` bits a weight and the table.

    Args:
        packed: (M, B) uint8, see `pennyweight.weights.packing`.
        table: (K, D), K at most 2**bits.
        bits: of a code, 1 to 8.
        columns: N; the last vector of a row may reach beyond it.

    The table is trained, codes are not. Computes in float32 (float64 where the table is).

    Cost: M*ceil(N/D) codes packed, and the table; 2*M*N FLOPs a row. Exact when the table holds every vector there is.
    """

    tensors = ("packed", "table")
    packed: Tensor

    def __init__(self, packed: Tensor, table: Tensor, *, bits: int, columns: int) -> None:
        if not 1 <= bits <= 8:  # before 2**bits, which a damaged file could make take minutes
            raise FormError(f"VectorCodebook: {bits} bits; give 1 to 8")
        if table.ndim != 2 or not table.is_floating_point() or not 1 <= table.shape[0] <= 2**bits:
            raise FormError(
                f"VectorCodebook: a {table.dtype} table {tuple(table.shape)} for {bits} bits; give up to {2**bits} "
                "floating vectors, (vectors, numbers of each)"
            )
        self._vectors = -(-columns // table.shape[1])
        check_packed(packed, bits, self._vectors, "VectorCodebook")
        super().__init__(shape=(packed.shape[0], columns))
        check_finite(table, "VectorCodebook: table")
        self.bits = bits
        self.register_buffer("packed", packed)
        self.table = table if isinstance(table, nn.Parameter) else nn.Parameter(table)
        if table.shape[0] < 2**bits and packed.device.type != "meta" and int(self.codes().max()) >= table.shape[0]:
            raise FormError(f"VectorCodebook: codes reach {int(self.codes().max())} in a table of {table.shape[0]}")

    @classmethod
    def nearest(
        cls,
        matrix: Tensor,
        *,
        bits: int,
        dimension: int,
        rounds: int = 25,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> VectorCodebook:
        """``matrix`` (M, N) in a table of 2**bits vectors that Lloyd's algorithm fits.

        Args:
            matrix: (M, N).
            bits: of a code, 1 to 8.
            dimension: D.
            rounds: of the algorithm at most; it ends when nothing moves.
            generator: of the first table, drawn among the vectors of the matrix.
            dtype: of the table.

        Raises:
            OptionError: bits or dimension out of range.
            ShapeError: not a matrix.
        """
        if matrix.ndim != 2:
            raise ShapeError(f"VectorCodebook: a tensor of shape {tuple(matrix.shape)} is not a matrix")
        if not 1 <= bits <= 8 or not 1 <= dimension <= matrix.shape[1]:
            raise OptionError(
                f"VectorCodebook: {bits} bits for vectors of {dimension}; give 1 to 8, and 1 to {matrix.shape[1]}"
            )
        x = check_finite(matrix, "VectorCodebook.nearest: matrix").detach().float()
        missing = -x.shape[1] % dimension
        padded = torch.nn.functional.pad(x, (0, missing))
        vectors = padded.reshape(-1, dimension)
        distinct = torch.unique(vectors, dim=0)
        count = min(2**bits, len(distinct))
        generator = generator or torch.Generator().manual_seed(0)
        table = distinct[torch.randperm(len(distinct), generator=generator)[:count]]
        codes = _assign(vectors, table)
        for _ in range(rounds):
            total = torch.zeros_like(table).index_add_(0, codes, vectors)
            size = torch.bincount(codes, minlength=count)
            moved = torch.where(size[:, None] > 0, total / size[:, None].clamp_min(1), table)
            if torch.equal(moved, table):
                break
            table = moved
            codes = _assign(vectors, table)
        stored = table.to(dtype)
        codes = _assign(vectors, stored.float())
        return cls(pack(codes.reshape(x.shape[0], -1), bits), stored, bits=bits, columns=x.shape[1])

    def codes(self) -> Tensor:
        """(M, C) uint8."""
        return unpack(self.packed, self.bits, self._vectors)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.table.dtype, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    def dense(self) -> Tensor:
        return self._values(self.codes())

    def _values(self, codes: Tensor) -> Tensor:
        found = nn.functional.embedding(codes.int(), self.table.to(self.dtype))
        return found.flatten(-2)[..., : self.shape[1]]

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        found = self._values(unpack(self.packed[flat], self.bits, self._vectors))
        return found.view(*index.shape, self.shape[1])

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "columns": self.shape[1]}

    def cost(self) -> Cost:
        codes = self.shape[0] * self._vectors
        stored = self.packed.numel() + self.table.nbytes
        return Cost(codes + self.table.numel(), stored, 2 * self.shape[0] * self.shape[1])


def _assign(vectors: Tensor, table: Tensor) -> Tensor:
    """The nearest vector of ``table`` (K, D) to each of ``vectors`` (R, D), the first of equals."""
    square = table.square().sum(1)
    parts = torch.split(vectors, max(1, _CHUNK // len(table)))
    return torch.cat([(square - 2 * part @ table.T).argmin(1) for part in parts])
