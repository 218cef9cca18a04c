"""Sparse weights: the kept values and where they lie; unstructured, N of M, or in blocks.

The kept values are a weight themselves, so that a sparse matrix of 4-bit values is a `Sparse` that holds a `Quantized`.
Forward fills the zeros in and multiplies densely (blocks of 32 and more are multiplied alone), and the FLOPs counted
are those done.

Shape letters: M out features, N in features, P kept values, n of m kept in a group of m, C groups of a row, K kept
blocks of (r, c); ... any leading dimensions.
"""

from __future__ import annotations

from math import comb
from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import FormError, OptionError, ShapeError
from pennyweight.weights.by_rows import by_rows
from pennyweight.weights.dense import Dense
from pennyweight.weights.packing import pack, packed_width, unpack
from pennyweight.weights.pattern import Gaps, check_gaps, choice_rank, choices
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, check_finite, form


def _check_mask(matrix: Tensor, mask: Tensor, where: str) -> None:
    if matrix.ndim != 2 or mask.shape != matrix.shape or mask.dtype != torch.bool:
        raise ShapeError(
            f"{where}: a {mask.dtype} mask {tuple(mask.shape)} for a matrix {tuple(matrix.shape)}; give bool, (out, in)"
        )
    check_finite(matrix, f"{where}: matrix")


@form("sparse")
class Sparse(Weight):
    """Unstructured sparsity: P values anywhere in (M, N).

    Args:
        pattern: (bytes,) uint8, the kept places in scan order, see `pennyweight.weights.pattern`.
        values: (1, P), or None where nothing is kept.
        rows, columns: M and N.
        bits, length: of the codes of the pattern; bits = 1 is a bitmap.

    Values are trained, the pattern is not.

    Cost: P parameters; the bytes of values and pattern; 2*M*N FLOPs a row. Exact for a matrix that is zero elsewhere.
    """

    tensors = ("pattern",)
    parts = ("values",)
    pattern: Tensor
    values: Weight | None

    def __init__(
        self, pattern: Tensor, values: Weight | None = None, *, rows: int, columns: int, bits: int, length: int
    ) -> None:
        super().__init__(shape=(rows, columns))
        if values is not None and values.shape[0] != 1:
            raise ShapeError(f"Sparse: values of shape {values.shape}; give (1, kept)")
        kept = 0 if values is None else values.shape[1]
        check_gaps(Gaps(pattern, bits, length), kept, rows * columns, "Sparse")
        self.bits, self.length = bits, length
        self.register_buffer("pattern", pattern)
        self.values = values

    @classmethod
    def keep(cls, matrix: Tensor, mask: Tensor | None = None) -> Sparse:
        """The entries of ``matrix`` (M, N) where ``mask`` is True; None keeps all that are not zero."""
        mask = matrix != 0 if mask is None else mask
        _check_mask(matrix, mask, "Sparse.keep")
        gaps, kept = Gaps.of(mask), matrix.detach()[mask]
        return cls(
            gaps.packed,
            Dense(kept[None]) if kept.numel() else None,
            rows=matrix.shape[0],
            columns=matrix.shape[1],
            bits=gaps.bits,
            length=gaps.length,
        )

    @property
    def kept(self) -> int:
        """P, the number of values held."""
        return 0 if self.values is None else self.values.shape[1]

    def with_values(self, values: Weight) -> Sparse:
        """The same places, holding ``values`` (1, P): quantized ones, say."""
        return Sparse(self.pattern, values, **self.settings())

    def mask(self) -> Tensor:
        """(M, N) bool, True = kept."""
        found = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.pattern.device)
        found[self._places()] = True
        return found.view(self.shape)

    def _places(self) -> Tensor:
        return Gaps(self.pattern, self.bits, self.length).places()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    def dense(self) -> Tensor:
        if self.values is None:
            return torch.zeros(self.shape, device=self.pattern.device)
        values = self.values.dense()[0]
        return values.new_zeros(self.shape[0] * self.shape[1]).index_copy(0, self._places(), values).view(self.shape)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def settings(self) -> dict[str, Any]:
        return {"rows": self.shape[0], "columns": self.shape[1], "bits": self.bits, "length": self.length}

    def cost(self) -> Cost:
        held = Cost() if self.values is None else self.values.cost()
        return Cost(held.params, held.bytes + self.pattern.numel(), 2 * self.shape[0] * self.shape[1])


@form("n_of_m")
class NofM(Weight):
    """Semi-structured sparsity: in each row, n of every m entries in turn (2:4 and its kin).

    Args:
        pattern: (M, bytes) uint8. While C(m, n) <= 256, one code a group, the rank of its choice in as many bits as it
            takes (2:4: 3 bits, where two 2-bit positions take 4); else a bitmap, one bit an entry.
        values: (M, C*n), those of a group in order of place.
        columns: N; the last group of a row may reach past it, its values there stand for nothing.
        n, m: 1 <= n <= m.

    Values are trained, the pattern is not.

    Cost: M*C*n parameters; the bytes of values and pattern; 2*M*N FLOPs a row. Exact for a matrix of that pattern,
    and for every matrix where n = m.
    """

    tensors = ("pattern",)
    parts = ("values",)
    pattern: Tensor
    values: Weight

    def __init__(self, pattern: Tensor, values: Weight, *, columns: int, n: int, m: int) -> None:
        super().__init__(shape=(values.shape[0], columns))
        _check_n_of_m(n, m, "NofM")
        self.n, self.m = n, m
        groups = -(-columns // m)
        codes, bits = _codes_of_a_row(n, m, groups)
        if values.shape[1] != groups * n:
            raise ShapeError(
                f"NofM: values {values.shape} for {n} of {m} in {columns} columns; give (out, {groups * n})"
            )
        if pattern.dtype != torch.uint8 or pattern.shape != (self.shape[0], packed_width(codes, bits)):
            raise ShapeError(
                f"NofM: a {pattern.dtype} pattern {tuple(pattern.shape)} for {self.shape} at {n} of {m}; give uint8 "
                f"({self.shape[0]}, {packed_width(codes, bits)})"
            )
        self.register_buffer("pattern", pattern)
        self.values = values
        if pattern.device.type != "meta":
            read = unpack(pattern, bits, codes)
            wrong = (read.view(-1, m).sum(1) != n).any() if self._is_bitmap else (read >= comb(m, n)).any()
            if bool(wrong):
                raise FormError(f"NofM: some groups of the pattern do not keep {n} of {m}; the pattern is damaged")

    @classmethod
    def keep(cls, matrix: Tensor, mask: Tensor, *, n: int, m: int) -> NofM:
        """The entries of ``matrix`` (M, N) where ``mask`` is True: at most ``n`` in every ``m``."""
        _check_n_of_m(n, m, "NofM.keep")
        _check_mask(matrix, mask, "NofM.keep")
        missing = -matrix.shape[1] % m
        held = torch.nn.functional.pad(matrix.detach() * mask, (0, missing)).view(matrix.shape[0], -1, m)
        kept = torch.nn.functional.pad(mask, (0, missing)).view(held.shape)
        most = int(kept.sum(-1).max())
        if most > n:
            raise FormError(
                f"NofM.keep: the mask keeps {most} in some group of {m}; give a mask that keeps {n} or fewer"
            )
        # a group that keeps fewer is filled up with zeros, the first that are left out
        places = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :n].sort(-1).values
        return cls(
            _pattern(places, n, m),
            Dense(held.gather(-1, places).flatten(1)),
            columns=matrix.shape[1],
            n=n,
            m=m,
        )

    @property
    def _is_bitmap(self) -> bool:
        return comb(self.m, self.n) > 256

    def with_values(self, values: Weight) -> NofM:
        """The same places, holding ``values`` (M, C*n): quantized ones, say."""
        return NofM(self.pattern, values, **self.settings())

    def places(self) -> Tensor:
        """(M, C, n) int64, the kept places of each group, increasing: the index that 2:4 hardware wants."""
        return self._read(self.pattern)

    def _read(self, pattern: Tensor) -> Tensor:
        groups = self.values.shape[1] // self.n
        codes, bits = _codes_of_a_row(self.n, self.m, groups)
        read = unpack(pattern, bits, codes)
        if self._is_bitmap:
            return read.nonzero()[:, 1].view(len(read), groups, self.n) % self.m
        return choices(self.n, self.m).to(read.device)[read.long()]

    def mask(self) -> Tensor:
        """(M, N) bool, True = kept."""
        places = self.places()
        found = torch.zeros(*places.shape[:2], self.m, dtype=torch.bool, device=places.device)
        return found.scatter(2, places, True).flatten(1)[:, : self.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self, x)

    def dense(self) -> Tensor:
        return self._fill(self.values.dense(), self.places())

    def _fill(self, values: Tensor, places: Tensor) -> Tensor:
        held = values.reshape(places.shape)
        return held.new_zeros(*places.shape[:2], self.m).scatter(2, places, held).flatten(1)[:, : self.shape[1]]

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        return self._fill(self.values.rows(flat), self._read(self.pattern[flat])).view(*index.shape, self.shape[1])

    def settings(self) -> dict[str, Any]:
        return {"columns": self.shape[1], "n": self.n, "m": self.m}

    def cost(self) -> Cost:
        held = self.values.cost()
        return Cost(held.params, held.bytes + self.pattern.numel(), 2 * self.shape[0] * self.shape[1])


def _check_n_of_m(n: int, m: int, where: str) -> None:
    if not 1 <= n <= m <= 256:
        raise OptionError(f"{where}: {n} of {m}; give 1 <= n <= m <= 256")


def _codes_of_a_row(n: int, m: int, groups: int) -> tuple[int, int]:
    """How many codes the pattern of a row has, and of how many bits."""
    ways = comb(m, n)
    return (groups * m, 1) if ways > 256 else (groups, max(1, (ways - 1).bit_length()))


def _pattern(places: Tensor, n: int, m: int) -> Tensor:
    rows, groups, _ = places.shape
    if comb(m, n) <= 256:
        return pack(choice_rank(places), _codes_of_a_row(n, m, groups)[1])
    bitmap = torch.zeros(rows, groups, m, dtype=torch.uint8, device=places.device)
    return pack(bitmap.scatter(2, places, 1).flatten(1), 1)


@form("block_sparse")
class BlockSparse(Weight):
    """Sparsity by blocks: K whole blocks of (r, c); rows or columns alone where r or c is the whole side.

    Args:
        pattern: (bytes,) uint8, the kept blocks in scan order, see `pennyweight.weights.pattern`.
        values: (K, r*c), a block a row, or None where nothing is kept.
        rows, columns: M and N, whole numbers of blocks.
        block: (r, c).
        bits, length: of the codes of the pattern.

    Values are trained, the pattern is not.

    Cost: K*r*c parameters; the bytes of values and pattern. FLOPs a row: 2*M*N, or (2*c + 1)*K*r where both sides of
    the block are at least 32 and the kept blocks are multiplied alone. Exact for a matrix that is zero elsewhere.
    """

    tensors = ("pattern",)
    parts = ("values",)
    pattern: Tensor
    values: Weight | None

    def __init__(
        self,
        pattern: Tensor,
        values: Weight | None = None,
        *,
        rows: int,
        columns: int,
        block: tuple[int, int],
        bits: int,
        length: int,
    ) -> None:
        super().__init__(shape=(rows, columns))
        self.block = _check_block(block, (rows, columns), "BlockSparse")
        if values is not None and values.shape[1] != self.block[0] * self.block[1]:
            raise ShapeError(f"BlockSparse: values {values.shape} for blocks {self.block}; give (kept, rows * columns)")
        kept = 0 if values is None else values.shape[0]
        grid = (rows // self.block[0]) * (columns // self.block[1])
        check_gaps(Gaps(pattern, bits, length), kept, grid, "BlockSparse")
        self.bits, self.length = bits, length
        self.register_buffer("pattern", pattern)
        self.values = values

    @classmethod
    def keep(cls, matrix: Tensor, mask: Tensor, *, block: tuple[int, int]) -> BlockSparse:
        """The blocks (r, c) of ``matrix`` (M, N) where ``mask`` (M / r, N / c) is True."""
        if matrix.ndim != 2:
            raise ShapeError(
                f"BlockSparse.keep: a tensor of shape {tuple(matrix.shape)} is not a matrix; give (out, in)"
            )
        r, c = _check_block(block, (matrix.shape[0], matrix.shape[1]), "BlockSparse.keep")
        grid = (matrix.shape[0] // r, matrix.shape[1] // c)
        if mask.shape != grid or mask.dtype != torch.bool:
            raise ShapeError(f"BlockSparse.keep: a {mask.dtype} mask {tuple(mask.shape)}; give bool, {grid}")
        check_finite(matrix, "BlockSparse.keep: matrix")
        gaps = Gaps.of(mask)
        kept = matrix.detach().view(grid[0], r, grid[1], c).transpose(1, 2)[mask]  # (K, r, c)
        return cls(
            gaps.packed,
            Dense(kept.flatten(1)) if len(kept) else None,
            rows=matrix.shape[0],
            columns=matrix.shape[1],
            block=(r, c),
            bits=gaps.bits,
            length=gaps.length,
        )

    def with_values(self, values: Weight) -> BlockSparse:
        """The same blocks, holding ``values`` (K, r*c): quantized ones, say."""
        return BlockSparse(self.pattern, values, **self.settings())

    @property
    def kept(self) -> int:
        """K, the number of blocks held."""
        return 0 if self.values is None else self.values.shape[0]

    @property
    def _grid(self) -> tuple[int, int]:
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]

    def mask(self) -> Tensor:
        """(M / r, N / c) bool, True = kept."""
        found = torch.zeros(self._grid[0] * self._grid[1], dtype=torch.bool, device=self.pattern.device)
        found[self._places()] = True
        return found.view(self._grid)

    def _places(self) -> Tensor:
        return Gaps(self.pattern, self.bits, self.length).places()

    @property
    def _alone(self) -> bool:
        return min(self.block) >= 32

    def forward(self, x: Tensor) -> Tensor:
        return self._by_blocks(x) if self._alone else x @ self.dense().T.to(x.dtype)

    def _by_blocks(self, x: Tensor) -> Tensor:
        """The kept blocks alone, column of blocks by column of blocks."""
        r, c = self.block
        found = x.new_zeros(*x.shape[:-1], self._grid[0], r)
        if self.values is not None:
            blocks = self.values.dense().to(x.dtype).view(-1, r, c)
            place = self._places()
            for column in range(self._grid[1]):
                here = (place % self._grid[1] == column).nonzero()[:, 0]
                if len(here):
                    part = x[..., column * c : (column + 1) * c] @ blocks[here].flatten(0, 1).T
                    row = place[here] // self._grid[1]
                    found.index_add_(-2, row, part.view(*x.shape[:-1], len(here), r))
        return found.flatten(-2)

    def dense(self) -> Tensor:
        r, c = self.block
        if self.values is None:
            return torch.zeros(self.shape, device=self.pattern.device)
        values = self.values.dense()
        filled = values.new_zeros(self._grid[0] * self._grid[1], r * c).index_copy(0, self._places(), values)
        return filled.view(*self._grid, r, c).transpose(1, 2).reshape(self.shape)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def settings(self) -> dict[str, Any]:
        return {
            "rows": self.shape[0],
            "columns": self.shape[1],
            "block": list(self.block),
            "bits": self.bits,
            "length": self.length,
        }

    def cost(self) -> Cost:
        held = Cost() if self.values is None else self.values.cost()
        r, c = self.block
        flops = (2 * c + 1) * r * self.kept if self._alone else 2 * self.shape[0] * self.shape[1]
        return Cost(held.params, held.bytes + self.pattern.numel(), flops)


def _check_block(block: tuple[int, int], shape: tuple[int, int], where: str) -> tuple[int, int]:
    r, c = (int(side) for side in block)
    if min(r, c) < 1 or shape[0] % r or shape[1] % c:
        raise ShapeError(f"{where}: blocks {(r, c)} do not divide {shape}; give sides that do")
    return r, c
