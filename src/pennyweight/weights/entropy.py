"""Entropy-coded integer weights: the codes take the bits their distribution needs, not a fixed width.

``W[i, j] = step * row_scale[i] * column_scale[j] * code[i, j]`` with unbounded integer codes. On disk the codes are one
range-coded stream (`pennyweight.weights.rans`); each position's probability table is chosen by two stored bytes, the
spread of its row and of its column, so that a quiet column costs few bits. In memory the codes are one byte each, the
few beyond a byte kept apart. Scales are kept as one byte, a sixteenth of an octave a step; floating-point scales take
their place when they are trained.

Source: the coder is that of `rans`; that a uniform grid with entropy-coded indices comes within 0.25 bit of the
rate-distortion bound is H. Gish and J. Pierce, "Asymptotically efficient quantizing", IEEE Trans. Inf. Theory 14, 1968.

Shape letters: M out features, N in features, K contexts, A alphabet; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight.errors import FormError, ShapeError
from pennyweight.weights import one_row, rans
from pennyweight.weights.weight import Cost, Weight, form, stored_bytes

_PER_OCTAVE = 16  # steps of a one-byte scale
_SPREAD_PER_OCTAVE = 4  # steps of a one-byte spread
_MIDDLE = 128
_STRIP = 4096  # rows looked at at a time
_WIDEST = 254  # symbols beside the escape, so that a symbol is one byte


def scale_bytes(scale: Tensor) -> Tensor:
    """Positive factors as the nearest one-byte scales; beyond 2^-8 ... 2^7.9 they saturate."""
    return (_PER_OCTAVE * scale.double().log2()).round().add(_MIDDLE).clamp(0, 255).to(torch.uint8)


def scale_values(scale: Tensor) -> Tensor:
    """Float32 factors of a scale: of one-byte scales, or a floating-point one as it is."""
    if scale.dtype != torch.uint8:
        return scale.float()
    return torch.exp2((scale.double() - _MIDDLE) / _PER_OCTAVE).float()


def contexts_for(shape: tuple[int, int]) -> int:
    """How many probability tables codes of ``shape`` get: one for every 16,384, at least 1 and at most 16."""
    return min(16, max(1, shape[0] * shape[1] // 16384))


def _spreads(codes: Tensor) -> tuple[Tensor, Tensor]:
    """One byte a row and a column whose sum is the log-spread of a position: a rank-one fit of the squares."""

    def strips() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, codes.shape[0], _STRIP):  # a table of a vocabulary is too large to square at once
            rows = slice(start, start + _STRIP)
            yield rows, codes[rows].float().square_()

    row, column = torch.empty(codes.shape[0]), torch.zeros(codes.shape[1])
    for rows, squares in strips():
        row[rows] = squares.mean(1)
    row += 0.01
    for rows, squares in strips():
        column += squares.div_(row[rows, None]).sum(0)
    column = column / codes.shape[0] + 0.01
    for rows, squares in strips():
        row[rows] = squares.div_(column).mean(1)
    row += 0.01
    logs = (_SPREAD_PER_OCTAVE * 0.5 * part.double().log2() for part in (row, column))
    first, second = (log.round().add(_MIDDLE // 2).clamp(0, 127).to(torch.uint8) for log in logs)
    return first, second


def _contexts(row: Tensor, column: Tensor, edges: list[int]) -> rans.Bytes:
    """(M*N,) context of each position in scan order (row after row): how many edges its joint spread reaches."""
    of_sum = np.searchsorted(np.asarray(edges, dtype=np.int64), np.arange(256), side="right").astype(np.uint8)
    return rans.contexts_of(row.numpy(), column.numpy(), of_sum)


@form("entropy_coded")
class EntropyCoded(Weight):
    """Integer codes under row and column scales, range-coded. Make one with `EntropyCoded.encode`.

    Args:
        words: (words,) uint8, the coded stream (16-bit words, little endian).
        lanes: (L, 8) uint8, state and length of each lane (32-bit, little endian).
        tables: (K, A) uint8 probability tables; the last symbol is the escape.
        escapes: (escapes,) int32, the codes outside the alphabet, in scan order.
        row_scale: (M,) uint8 or floating point.
        column_scale: (N,) uint8 or floating point.
        row_spread: (M,) uint8.
        column_spread: (N,) uint8.
        step: what all scales are relative to.
        lowest: the code of symbol 0.
        edges: K - 1 ascending joint spreads at which the next context begins.
        transposed: stands for the transposed matrix (N, M).
        codes: (M, N) integers, where they are known without decoding.

    Raises:
        FormError: the stream does not fit its tables (a damaged file).

    Cost: M*N + M + N parameters; the bytes of its tensors; 2*M*N FLOPs a row and M + N for the scales. Exact for a
    matrix that lies on such a grid; otherwise each entry is off by at most half its step where codes were rounded.
    """

    tensors = ("words", "lanes", "tables", "escapes", "row_scale", "column_scale", "row_spread", "column_spread")
    words: Tensor
    lanes: Tensor
    tables: Tensor
    escapes: Tensor
    row_scale: Tensor
    column_scale: Tensor
    row_spread: Tensor
    column_spread: Tensor
    near: Tensor
    far: Tensor
    beyond: Tensor

    def __init__(
        self,
        words: Tensor,
        lanes: Tensor,
        tables: Tensor,
        escapes: Tensor,
        row_scale: Tensor,
        column_scale: Tensor,
        row_spread: Tensor,
        column_spread: Tensor,
        *,
        step: float,
        lowest: int,
        edges: list[int],
        transposed: bool = False,
        codes: Tensor | None = None,
    ) -> None:
        rows, columns = row_scale.numel(), column_scale.numel()
        super().__init__(shape=(columns, rows) if transposed else (rows, columns))
        if row_spread.numel() != rows or column_spread.numel() != columns:
            raise ShapeError(f"EntropyCoded: spreads do not fit scales of {rows} rows and {columns} columns")
        if any(t.ndim != 1 for t in (words, escapes, row_scale, column_scale, row_spread, column_spread)):
            raise ShapeError("EntropyCoded: stream, escapes, scales and spreads are vectors; the file is damaged")
        if tables.ndim != 2 or len(tables) != len(edges) + 1 or not 2 <= tables.shape[1] <= _WIDEST + 1:
            raise FormError(f"EntropyCoded: tables {tuple(tables.shape)} do not fit {len(edges)} edges")
        self.step, self.lowest, self.edges, self.transposed = float(step), int(lowest), list(edges), transposed
        values = (words, lanes, tables, escapes, row_scale, column_scale, row_spread, column_spread)
        for name, value in zip(self.tensors, values, strict=True):
            if value.is_floating_point():
                self.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        near, at, beyond = self._decode() if codes is None else _near_and_far(codes)
        self.register_buffer("near", near, persistent=False)  # (M, N)
        self.register_buffer("far", at, persistent=False)  # (F, 2) row and column of codes that ``near`` saturates
        self.register_buffer("beyond", beyond, persistent=False)  # (F,) what it lacks there

    @classmethod
    def encode(
        cls, codes: Tensor, row_scale: Tensor, column_scale: Tensor, *, step: float, contexts: int | None = None
    ) -> EntropyCoded:
        """Code integers (M, N) under the given scales.

        Args:
            codes: (M, N) integers (any dtype that holds them exactly).
            row_scale: (M,) uint8 from `scale_bytes`, or floating point.
            column_scale: (N,) likewise.
            step: what the scales are relative to.
            contexts: probability tables; None chooses by size (one for every 16,384 codes, 1 to 16).
        """
        codes = codes.detach().cpu()
        whole = codes.to(torch.int32)
        if codes.dtype != torch.int32 and not torch.equal(whole.to(codes.dtype), codes):
            raise FormError("EntropyCoded: the codes are not integers of at most 32 bits")
        small = whole.to(torch.int16) if int(whole.abs().max()) < 1 << 15 else whole
        row, column = _spreads(small)
        number = contexts or contexts_for((codes.shape[0], codes.shape[1]))
        # how often each sum of a row's and a column's byte occurs is the convolution of their histograms
        counts = np.convolve(np.bincount(row.numpy()), np.bincount(column.numpy())).cumsum()
        shares = np.arange(1, number) * codes.numel() // number
        edges = sorted({int(e) + 1 for e in np.searchsorted(counts, shares)} - {256})
        where = _contexts(row, column, edges)
        flat = small.numpy().ravel()
        lowest, highest = _alphabet(flat)
        outside = (flat < lowest) | (flat > highest)
        symbols = np.where(outside, highest - lowest + 1, flat - lowest).astype(np.uint8)
        tables = rans.tables_of(symbols, where, int(highest - lowest + 2), len(edges) + 1)
        coded = rans.encode(symbols, where, tables)
        lanes = np.stack([coded.states, coded.lengths], 1).astype("<u4").view(np.uint8)
        return cls(
            torch.from_numpy(coded.words.astype("<u2").view(np.uint8)),
            torch.from_numpy(lanes),
            torch.from_numpy(tables),
            torch.from_numpy(flat[outside].astype(np.int32)),
            row_scale,
            column_scale,
            row,
            column,
            step=step,
            lowest=lowest,
            edges=edges,
            codes=small,
        )

    def _decode(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the stream says, as `_near_and_far` has it."""
        rows, columns = self.row_spread.numel(), self.column_spread.numel()
        if self.words.device.type == "meta":
            return _near_and_far(torch.empty(rows, columns, dtype=torch.int8, device="meta"))
        where = _contexts(self.row_spread.cpu(), self.column_spread.cpu(), self.edges)
        lanes = self.lanes.cpu().contiguous().numpy()
        if lanes.ndim != 2 or lanes.shape[1:] != (8,) or self.words.numel() % 2:
            raise FormError("EntropyCoded: lanes or words have the wrong shape; the file is damaged")
        heads = lanes.view("<u4").astype(np.uint32)
        words = self.words.cpu().contiguous().numpy().view("<u2").astype(np.uint16)
        tables = self.tables.cpu().numpy()
        coded = rans.Coded(words, np.ascontiguousarray(heads[:, 0]), np.ascontiguousarray(heads[:, 1]))
        symbols = rans.decode(coded, where, tables)
        escape = tables.shape[1] - 1
        least, most = max(0, -128 - self.lowest), min(escape - 1, 127 - self.lowest)  # symbols of codes that fit a byte
        if least > most:
            least, most = 0, -1
        apart = np.flatnonzero((symbols < least) | (symbols > most))
        kinds = symbols[apart]
        if int((kinds == escape).sum()) != self.escapes.numel():
            raise FormError("EntropyCoded: escapes do not fit the stream; the file is damaged")
        codes = kinds.astype(np.int32) + self.lowest
        codes[kinds == escape] = self.escapes.cpu().numpy()
        np.clip(symbols, least, max(most, 0), out=symbols)
        near = symbols.view(np.int8)
        near += np.int8((self.lowest + 128) % 256 - 128)  # wraps around, and ends where it should
        near[apart] = np.clip(codes, -128, 127)
        over = codes != near[apart]
        at = np.stack(np.divmod(apart[over], columns), 1)
        beyond = codes[over] - near[apart[over]]
        return torch.from_numpy(near.reshape(rows, columns)), torch.from_numpy(at), torch.from_numpy(beyond)

    @property
    def codes(self) -> Tensor:
        """(M, N) integer codes, int8 where all of them fit."""
        if not len(self.far):
            return self.near
        whole = self.near.to(torch.int32)
        whole[self.far[:, 0], self.far[:, 1]] += self.beyond
        return whole

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"step": self.step, "lowest": self.lowest, "edges": self.edges}
        return found | ({"transposed": True} if self.transposed else {})

    def _scales(self) -> tuple[Tensor, Tensor]:
        return scale_values(self.row_scale) * self.step, scale_values(self.column_scale)

    def _matrix(self, codes: Tensor, row: Tensor) -> Tensor:
        return codes.float() * row[:, None] * scale_values(self.column_scale)

    def dense(self) -> Tensor:
        """(M, N) float32."""
        codes = self.near.float()
        if len(self.far):
            codes[self.far[:, 0], self.far[:, 1]] += self.beyond
        matrix = self._matrix(codes, self._scales()[0])
        return matrix.T if self.transposed else matrix

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if not self.transposed and one_row.usable(x, self, "bytes"):
            return one_row.multiply(self, (self.near, self.row_scale, self.column_scale), self._prepared, x)
        if not self.transposed and one_row.expandable(x, self):
            return one_row.expanded(self, (self.near, self.row_scale, self.column_scale), self._prepared, x)
        outer, inner = (scale.to(x.dtype) for scale in self._scales())
        rows, columns = self.far.unbind(1)
        beyond = self.beyond.to(x.dtype)
        if self.transposed:
            x = x * outer
            y = x @ self.near.to(x.dtype)
            if len(beyond):
                y = y.index_add(-1, columns, x[..., rows] * beyond)
            return y * inner
        x = x * inner
        y = x @ self.near.to(x.dtype).T
        if len(beyond):
            y = y.index_add(-1, rows, x[..., columns] * beyond)
        return y * outer

    def prepared(self) -> one_row.Prepared | None:
        return None if self.transposed else self._prepared()

    def _prepared(self) -> one_row.Prepared:
        row, column = (scale.detach() for scale in self._scales())
        return one_row.whole(self.near, row, column, self.far, self.beyond)

    def rows(self, index: Tensor) -> Tensor:
        if self.transposed:
            return self.dense()[index]
        flat = index.flatten()
        codes = self.near[flat].float()
        if len(self.far):
            looked_up, far = (flat[:, None] == self.far[None, :, 0]).nonzero(as_tuple=True)
            codes[looked_up, self.far[far, 1]] += self.beyond[far]
        return self._matrix(codes, self._scales()[0][flat]).view(*index.shape, self.shape[1])

    @property
    def T(self) -> EntropyCoded:
        stored = (getattr(self, name) for name in self.tensors)
        return EntropyCoded(
            *stored,
            step=self.step,
            lowest=self.lowest,
            edges=self.edges,
            transposed=not self.transposed,
            codes=self.codes,
        )

    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(params=m * n + m + n, bytes=stored_bytes(self), flops=2 * m * n + m + n)


def _near_and_far(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (M, N) as one byte each, saturated, and where (F, 2) and by how much (F,) that falls short."""
    if codes.dtype == torch.int8 or codes.device.type == "meta":
        return codes.to(torch.int8), codes.new_empty(0, 2, dtype=torch.int64), codes.new_empty(0, dtype=torch.int32)
    near = codes.clamp(-128, 127)
    at = (near != codes).nonzero()
    beyond = (codes[at[:, 0], at[:, 1]] - near[at[:, 0], at[:, 1]]).to(torch.int32)
    return near.to(torch.int8), at, beyond


def _alphabet(codes: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The lowest and highest code that get a symbol: all but one in ten thousand, at most 254."""
    low, high = int(codes.min()), int(codes.max())
    if high - low + 1 <= 32:
        return low, high
    wide = np.clip(codes, -(1 << 12), 1 << 12) + (1 << 12)
    below = np.bincount(wide.astype(np.int64)).cumsum()
    spare = codes.size // 20000
    low = int(np.searchsorted(below, spare + 1)) - (1 << 12)
    high = int(np.searchsorted(below, codes.size - spare)) - (1 << 12)
    middle = (low + high) // 2
    return max(low, middle - _WIDEST // 2 + 1), min(high, middle + _WIDEST // 2)
