"""Quantized weights whose codes are entropy-coded: the grid of `Quantized`, the bits that its codes really need.

Source: the coder is that of `pennyweight.weights.rans`. Codes of a fixed width that are not equally frequent need fewer
bits than that: 3.9 of 4 on a grid from minimum to maximum of 32 weights, 2.9 of 4 under one scale for a whole row.

Shape letters: M out features, N in features, G groups of a row, L lanes, A codes that there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import FormError, ShapeError
from pennyweight.weights import rans
from pennyweight.weights.by_rows import by_rows
from pennyweight.weights.grid import Grid, ZeroKind, check_format, group_count
from pennyweight.weights.quantized import Quantized
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, form, stored_bytes


@form("grid_coded")
class GridCoded(Weight):
    """`Quantized` with range-coded codes. Make one with `GridCoded.encode`.

    Args:
        words: (words,) uint8, the coded stream (16-bit words, little endian).
        lanes: (L, 8) uint8, state and length of each lane (32-bit, little endian).
        table: (A,) uint8, how often each code occurs; see `pennyweight.weights.rans`.
        scale: (M, G), or (1, 1).
        zero: the shape of ``scale``, or None.
        rows: M.
        columns: N.
        bits, group_size, zero_kind, format: as of `Quantized`.

    Codes are decoded once, when the weight is made; in memory they take a byte each.

    Raises:
        FormError: the stream does not fit its table (a damaged file).

    Cost: as of `Quantized`, the bytes being those of the stream. Exact for a matrix that lies on the grid.
    """

    tensors = ("words", "lanes", "table")
    parts = ("scale", "zero")
    words: Tensor
    lanes: Tensor
    table: Tensor
    codes: Tensor
    scale: Weight
    zero: Weight | None

    def __init__(
        self,
        words: Tensor,
        lanes: Tensor,
        table: Tensor,
        scale: Weight,
        zero: Weight | None = None,
        *,
        rows: int,
        columns: int,
        bits: int,
        group_size: int | None = None,
        zero_kind: ZeroKind = "none",
        format: str = "integer",
        codes: Tensor | None = None,
    ) -> None:
        check_format(format, bits, zero_kind, "GridCoded")
        super().__init__(shape=(rows, columns))
        fitting = (rows, group_count(columns, group_size))
        if scale.shape != fitting and not (scale.shape == (1, 1) and group_size is None):
            raise ShapeError(
                f"GridCoded: scale {scale.shape} for {self.shape} in groups of {group_size}; give {fitting}"
            )
        if (zero is None) != (zero_kind == "none") or (zero is not None and zero.shape != scale.shape):
            raise ShapeError(f"GridCoded: zero_kind {zero_kind} and scale {scale.shape} do not fit the zero")
        if any(t.dtype != torch.uint8 for t in (words, lanes, table)) or table.ndim != 1 or table.numel() > 2**bits:
            raise FormError(f"GridCoded: table {tuple(table.shape)} for {bits} bits; the file is damaged")
        if words.ndim != 1 or words.numel() % 2 or lanes.ndim != 2 or lanes.shape[1] != 8:
            raise ShapeError("GridCoded: stream and lanes have the wrong shape; the file is damaged")
        self.bits, self.group_size, self.format = bits, group_size, format
        self.zero_kind: ZeroKind = zero_kind
        for name, tensor in (("words", words), ("lanes", lanes), ("table", table)):
            self.register_buffer(name, tensor)
        self.scale, self.zero = scale, zero
        self.register_buffer("codes", self._decode() if codes is None else codes, persistent=False)

    @classmethod
    def encode(cls, weight: Quantized) -> GridCoded:
        """``weight`` with its codes range-coded: the same matrix, bit for bit."""
        codes = weight.codes().cpu()
        flat = codes.numpy().ravel()
        where = np.zeros(flat.size, dtype=np.uint8)
        tables = rans.tables_of(flat, where, int(flat.max()) + 1, 1)
        coded = rans.encode(flat, where, tables)
        return cls(
            torch.from_numpy(coded.words.astype("<u2").view(np.uint8)),
            torch.from_numpy(np.stack([coded.states, coded.lengths], 1).astype("<u4").view(np.uint8)),
            torch.from_numpy(tables[0].copy()),
            weight.scale,
            weight.zero,
            rows=weight.shape[0],
            columns=weight.shape[1],
            bits=weight.bits,
            group_size=weight.group_size,
            zero_kind=weight.zero_kind,
            format=weight.format,
            codes=codes,
        )

    def _decode(self) -> Tensor:
        if self.words.device.type == "meta":
            return torch.empty(self.shape, dtype=torch.uint8, device="meta")
        heads = self.lanes.cpu().contiguous().numpy().view("<u4").astype(np.uint32)
        words = self.words.cpu().contiguous().numpy().view("<u2").astype(np.uint16)
        coded = rans.Coded(words, np.ascontiguousarray(heads[:, 0]), np.ascontiguousarray(heads[:, 1]))
        where = np.zeros(self.shape[0] * self.shape[1], dtype=np.uint8)
        return torch.from_numpy(rans.decode(coded, where, self.table.cpu().numpy()[None])).view(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.scale.dtype, torch.float32)

    def _grid(self, scale: Tensor, zero: Tensor | None) -> Grid:
        return Grid(self.bits, self.group_size, scale, zero, self.zero_kind, self.format)

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self, x)

    def dense(self) -> Tensor:
        return self._grid(self.scale.dense(), None if self.zero is None else self.zero.dense()).values(self.codes)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        if self.scale.shape[0] == self.shape[0]:
            grid = self._grid(self.scale.rows(flat), None if self.zero is None else self.zero.rows(flat))
        else:
            grid = self._grid(self.scale.dense(), None if self.zero is None else self.zero.dense())
        return grid.values(self.codes[flat]).view(*index.shape, self.shape[1])

    def settings(self) -> dict[str, Any]:
        return {
            "rows": self.shape[0],
            "columns": self.shape[1],
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_kind": self.zero_kind,
            "format": self.format,
        }

    def cost(self) -> Cost:
        count = self.shape[0] * self.shape[1]
        grid = self.scale.cost() + (Cost() if self.zero is None else self.zero.cost())
        return Cost(count + grid.params, stored_bytes(self), 2 * count)
