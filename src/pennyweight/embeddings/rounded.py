"""Tables in few bits: on a fixed grid, on learned ones, or as codes of a table of vectors.

Row 114. Sources: H. Guan et al., "Post-Training 4-bit Quantization on Embedding Tables", arXiv:1911.02079, and the low
precision of Hetu (INT8, INT16 on a fixed scale); S. Li et al., "Adaptive Low-Precision Training for Embeddings in
Click-Through Rate Prediction", arXiv:2212.05735 (ALPT: rounded at random after every step, the scale of a row
learned); W. Kang et al., "Learning Multi-granular Quantized Embeddings for Large-Vocab Categorical Features in
Recommender Systems", arXiv:2002.08530 (MGQE: fewer codes for rare rows).
Differs from them: as many bits as the budget holds, 1 to 8 or 16 on the fixed grid, 8 at most on learned ones. On the
fixed grid training holds values in 32 bits, on the grid after each step; ALPT holds codes alone, dequantizes the rows
of a batch, and steps them by Adagrad and scales by RMSprop, with one sum of squares a row; the gradient of a scale is
taken at the new values from the step's own gradient, not from a second pass. MGQE's codes are found once, half-way, in
one table of vectors for each part, which is trained on.

Shape letters: M rows, N width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pennyweight.embeddings.table import NO_JUDGE, SPREAD, Compressor, Judge
from pennyweight.errors import BudgetError
from pennyweight.weights import Cost, Dense, Quantized, Stacked, Sum, Transposed, VectorCodebook, Weight
from pennyweight.weights.grid import Grid

#: Largest value of the fixed grid, in deviations of what a table starts from.
_REACH = 12.0


class Integers(Compressor):
    """Values on one fixed grid, rounded at random after every step; INT8 and INT16 where the budget holds them."""

    kind = "intra"

    def start(self) -> Weight:
        rows, width = self.table.rows, self.table.width
        self._bits = self.fitting(lambda bits: rows * -(-bits * width // 8) + 2, 1, 8, "bits")
        if 2 * rows * width + 4 <= self.budget:
            self._bits = 16
        step = _REACH * SPREAD / 2 ** (self._bits - 1)
        # 16 bits are two grids, 256 apart: exact in 16-bit scales for powers of two
        self._scale = torch.tensor([[step if self._bits < 16 else 2.0 ** math.floor(math.log2(step))]]).half()
        return Dense(self._rounded(self.table.drawn(self.generator)))

    @property
    def _most(self) -> int:
        return int(2 ** (self._bits - 1)) - (1 if self._bits < 16 else 129)  # both halves of 16 bits have a sign

    def _levels(self, matrix: Tensor) -> Tensor:
        """Whole numbers, drawn so that their mean is the value."""
        noise = torch.rand(matrix.shape, generator=self.generator)
        return (matrix / self._scale.float() + noise).floor().clamp(-(2 ** (self._bits - 1)), self._most)

    def _rounded(self, matrix: Tensor) -> Tensor:
        return self._levels(matrix) * self._scale.float()

    @torch.no_grad()
    def step(self, through: float, judge: Judge) -> bool:
        assert isinstance(self.weight, Dense)
        self.weight.matrix.copy_(self._rounded(self.weight.matrix))
        return False

    def finish(self) -> Weight:
        levels = (self.weight.dense().detach() / self._scale.float()).round().long()
        if self._bits < 16:
            return _on_grid(levels, self._bits, self._scale)
        upper = (levels + 128) // 256
        return Sum(_on_grid(upper, 8, 256 * self._scale), _on_grid(levels - 256 * upper, 8, self._scale))


def _on_grid(levels: Tensor, bits: int, scale: Tensor) -> Weight:
    """``scale * levels`` of whole numbers about 0."""
    return Quantized.from_codes(levels + 2 ** (bits - 1), Grid(bits, None, scale, None, "none"))


class _Codes(Weight):
    """Codes on a grid for each row, of which a batch takes some as values to train; never saved."""

    codes: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__(shape=(matrix.shape[0], matrix.shape[1]))
        self.levels = 2 ** (bits - 1)
        self.register_buffer("codes", (matrix / scale).round().clamp(-self.levels, self.levels - 1).to(torch.int8))
        self.register_buffer("scale", scale)
        #: Rows that the last batch looked up, and their values, whose gradient is wanted.
        self.taken: tuple[Tensor, Tensor] | None = None

    def rows(self, index: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.codes[index] * self.scale[index]
        which, place = torch.unique(index, return_inverse=True)
        values = (self.codes[which] * self.scale[which]).requires_grad_()
        self.taken = which, values
        return values[place]

    def dense(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T

    @property
    def T(self) -> Weight:
        return Transposed(self)

    def cost(self) -> Cost:
        return Dense(self.dense()).cost()


class Alpt(Compressor):
    """Codes on a grid for each row, whose scale is learned; no values but those of a batch are held in training."""

    kind = "intra"
    #: Of a row at its first step: what Adam at 3e-3 moves it in all, its moments going on after a gradient.
    RATE = 0.016
    #: Of a scale, as a share of it.
    SCALE_RATE = 0.02

    def start(self) -> Weight:
        rows, width = self.table.rows, self.table.width
        self._bits = self.fitting(lambda bits: rows * (2 + -(-bits * width // 8)), 1, 8, "bits")
        matrix = self.table.drawn(self.generator)
        scale = matrix.abs().amax(1, keepdim=True) / max(2 ** (self._bits - 1) - 1, 0.5)
        self._squares, self._scale_squares = torch.zeros(rows, 1), torch.zeros(rows, 1)
        self._most_taken = 0
        return _Codes(matrix, scale, self._bits)

    @torch.no_grad()
    def step(self, through: float, judge: Judge) -> bool:
        weight = self.weight
        assert isinstance(weight, _Codes)
        if weight.taken is None or weight.taken[1].grad is None:
            return False
        (which, values), weight.taken = weight.taken, None
        gradient, scale = values.grad, weight.scale[which]
        assert gradient is not None
        self._most_taken = max(self._most_taken, 2 * values.nbytes)
        self._squares[which] += gradient.square().mean(1, keepdim=True)
        moved = (values - self.RATE * gradient / self._squares[which].sqrt().clamp_min(1e-12)) / scale
        # LSQ (arXiv:1902.08153): inside, how far rounding moves a value; beyond the ends, the end itself
        ends = moved.clamp(-weight.levels, weight.levels - 1)
        pull = (gradient * torch.where(moved == ends, moved.round() - moved, ends)).sum(1, keepdim=True)
        # RMSprop: steps that die down, as Adagrad's do, leave scales near where they began
        known = self._scale_squares[which]
        self._scale_squares[which] = pull.square().lerp(known, torch.where(known > 0, 0.99, 0.0))
        share = pull / self._scale_squares[which].sqrt().clamp_min(1e-30)
        learned = (scale * (1 - self.SCALE_RATE * share)).clamp_min(1e-6)
        # at random, so that steps smaller than the grid are not lost
        noise = torch.rand(moved.shape, generator=self.generator)
        codes = (moved * scale / learned + noise).floor().clamp(-weight.levels, weight.levels - 1)
        weight.codes[which], weight.scale[which] = codes.to(torch.int8), learned
        return False

    def training_bytes(self) -> int:
        held = (*self.weight.buffers(), self._squares, self._scale_squares)
        return sum(one.nbytes for one in held) + self._most_taken

    def finish(self) -> Weight:
        assert isinstance(self.weight, _Codes)
        return _on_grid(self.weight.codes.long(), self._bits, self.weight.scale.half())


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
