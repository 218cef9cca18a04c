"""Tables in few bits: on a fixed grid, on learned ones, or as codes of a table of vectors.

Row 114. Sources: H. Guan et al., "Post-Training 4-bit Quantization on Embedding Tables", arXiv:1911.02079, and the low
precision of Hetu (INT8, INT16 on a fixed scale); S. Li et al., "Adaptive Low-Precision Training for Embeddings in
Click-Through Rate Prediction", arXiv:2212.05735 (ALPT: rounded at random after every step, the scale of a row
learned); W. Kang et al., "Learning Multi-granular Quantized Embeddings for Large-Vocab Categorical Features in
Recommender Systems", arXiv:2002.08530 (MGQE: fewer codes for rare rows).
Differs from them: as many bits as the budget holds, 8 at most; training holds values in 32 bits, on the grid after each
step, so that bytes of training are not saved; MGQE's codes are found once, half-way, in one table of vectors for each
part, which is trained on.

Shape letters: M rows, N width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.embeddings.table import NO_JUDGE, SPREAD, Compressor, Judge
from pennyweight.errors import BudgetError
from pennyweight.weights import Cost, Dense, Quantized, Stacked, Transposed, VectorCodebook, Weight
from pennyweight.weights.grid import Grid

#: Largest value of the fixed grid, in deviations of what a table starts from.
_REACH = 12.0


class Integers(Compressor):
    """Values on one fixed grid, rounded at random after every step."""

    kind = "intra"

    def start(self) -> Weight:
        per_row = self.table.width
        rows = self.table.rows
        self._bits = self.fitting(lambda bits: rows * -(-bits * per_row // 8) + 2, 1, 8, "bits")
        levels = 2 ** (self._bits - 1)
        self._scale = torch.tensor([[_REACH * SPREAD / levels]]).half()
        return Dense(self._rounded(self.table.drawn(self.generator)))

    def _levels(self, matrix: Tensor) -> Tensor:
        """Whole numbers from -levels to levels - 1, drawn so that their mean is the value."""
        levels = 2 ** (self._bits - 1)
        noise = torch.rand(matrix.shape, generator=self.generator)
        return (matrix / self._scale.float() + noise).floor().clamp(-levels, levels - 1)

    def _rounded(self, matrix: Tensor) -> Tensor:
        return self._levels(matrix) * self._scale.float()

    @torch.no_grad()
    def step(self, through: float, judge: Judge) -> bool:
        assert isinstance(self.weight, Dense)
        self.weight.matrix.copy_(self._rounded(self.weight.matrix))
        return False

    def finish(self) -> Weight:
        levels = 2 ** (self._bits - 1)
        codes = (self.weight.dense().detach() / self._scale.float()).round() + levels
        return Quantized.from_codes(codes.long(), Grid(self._bits, None, self._scale, None, "none"))


class _OnLearnedScales(Weight):
    """A matrix through the grid of each row; never saved.

    The gradient of a scale is that of LSQ (arXiv:1902.08153).
    """

    def __init__(self, matrix: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__(shape=(matrix.shape[0], matrix.shape[1]))
        self.matrix, self.scale, self.bits = nn.Parameter(matrix), nn.Parameter(scale), bits

    def _through(self, matrix: Tensor, scale: Tensor) -> Tensor:
        levels = 2 ** (self.bits - 1)
        scale = scale.clamp_min(1e-6)
        inside = (matrix / scale).clamp(-levels, levels - 1)
        return (inside + (inside.round() - inside).detach()) * scale

    def rows(self, index: Tensor) -> Tensor:
        return self._through(self.matrix[index], self.scale[index])

    def dense(self) -> Tensor:
        return self._through(self.matrix, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T

    @property
    def T(self) -> Weight:
        return Transposed(self)

    def cost(self) -> Cost:
        return Dense(self.matrix).cost()


class Alpt(Compressor):
    """Values on a grid for each row, whose scale is learned."""

    kind = "intra"

    def start(self) -> Weight:
        rows, width = self.table.rows, self.table.width
        self._bits = self.fitting(lambda bits: rows * (2 + -(-bits * width // 8)), 1, 8, "bits")
        matrix = self.table.drawn(self.generator)
        levels = 2 ** (self._bits - 1)
        scale = matrix.abs().amax(1, keepdim=True) / max(levels - 1, 0.5)
        return _OnLearnedScales(matrix, scale, self._bits)

    @torch.no_grad()
    def step(self, through: float, judge: Judge) -> bool:
        # at random, so that steps smaller than the grid are not lost
        weight = self.weight
        assert isinstance(weight, _OnLearnedScales)
        levels = 2 ** (self._bits - 1)
        scale = weight.scale.clamp_min(1e-6)
        noise = torch.rand(weight.matrix.shape, generator=self.generator)
        weight.matrix.copy_((weight.matrix / scale + noise).floor().clamp(-levels, levels - 1) * scale)
        return False

    def finish(self) -> Weight:
        weight = self.weight
        assert isinstance(weight, _OnLearnedScales)
        levels = 2 ** (self._bits - 1)
        scale = weight.scale.detach().clamp_min(1e-6)
        codes = (weight.matrix.detach() / scale).round().clamp(-levels, levels - 1) + levels
        return Quantized.from_codes(codes.long(), Grid(self._bits, None, scale.half(), None, "none"))


class Mgqe(Compressor):
    """Codes into a table of 256 vectors for frequent rows and of 64 for rare ones."""

    kind = "intra"
    #: Share of the rows that are frequent.
    FREQUENT = 0.1
    #: Of the steps, before codes are found.
    AFTER = 0.5

    def start(self) -> Weight:
        for dimension in range(1, self.table.width + 1):
            if self.table.width % dimension == 0 and self._size(dimension) <= self.budget:
                self._dimension = dimension
                return Dense(self.table.drawn(self.generator))
        raise BudgetError(
            f"embeddings: {self.budget} bytes for {self.table.rows}x{self.table.width}: one code a row and the vectors "
            f"take {self._size(self.table.width)}"
        )

    def nearest(self, matrix: Tensor) -> Weight:
        self.weight = Dense(matrix.clone())
        self.step(1.0, NO_JUDGE)
        return self.weight

    def _parts(self) -> list[tuple[int, int]]:
        """(rows, bits) of frequent and rare rows."""
        own = max(1, round(self.FREQUENT * self.table.rows))
        return [(own, 8), (self.table.rows - own, 6)] if own < self.table.rows else [(own, 8)]

    def _size(self, dimension: int) -> int:
        codes = self.table.width // dimension
        return sum(
            rows * -(-bits * codes // 8) + self.table.value_bytes * 2**bits * dimension for rows, bits in self._parts()
        )

    def step(self, through: float, judge: Judge) -> bool:
        if through < self.AFTER or isinstance(self.weight, Stacked):
            return False
        pieces = torch.split(self.weight.dense().detach(), [rows for rows, _ in self._parts()])
        self.weight = Stacked(
            *(
                VectorCodebook.nearest(
                    piece, bits=bits, dimension=self._dimension, generator=self.generator, dtype=torch.float32
                )
                for piece, (_, bits) in zip(pieces, self._parts(), strict=True)
            )
        )
        return True
