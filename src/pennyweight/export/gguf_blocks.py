"""Codes of a `Quantized` weight as blocks of a GGUF file, where one of its types holds them bit for bit.

A block is 32 entries of a row with a 16-bit scale d, and in the types that end in 1 a 16-bit minimum m:

======  ========================  ==========================================
type    an entry                  what it holds
======  ========================  ==========================================
IQ4_NL  ``d * level``             levels of a table, from -127 to 113
Q4_0    ``d * level``             whole levels from -8 to 7
Q4_1    ``d * level + m``         whole levels from 0 to 15
Q5_0    ``d * level``             whole levels from -16 to 15
Q5_1    ``d * level + m``         whole levels from 0 to 31
Q8_0    ``d * level``             whole levels from -128 to 127
======  ========================  ==========================================

So symmetric codes of 4, 5 and 8 bits go into Q4_0, Q5_0 and Q8_0, those with a float minimum of 4 and 5 bits into Q4_1
and Q5_1; fewer bits into the same with room to spare; and codes with an integer zero, whose levels are ``code - zero``,
into the narrowest that has room for them (4 bits: Q5_0, or Q4_0 where no level leaves its range). The products are
exact in float32 (11 bits of scale times at most 8 of level), so nothing is rounded a second time.

In the types that end in K a block is 256 entries, whose groups of 16 or 32 have whole numbers s (and n) for scales:
``d * s * level`` in Q3_K and Q6_K, ``d * s * code - m * n`` in Q2_K, Q4_K and Q5_K. They hold what `quantize.blocks`
solves on their grids: weights whose scales are `Quantized` in turn.

Source: the block layouts of ggml (``ggml-common.h``), as its Python package reads them. Differs: nothing.

Shape letters: M out features, N in features, K blocks of a row, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from pennyweight.solvers.block_types import SUPER, TYPES, BlockType
from pennyweight.weights import Weight
from pennyweight.weights.quantized import Quantized

BLOCK = 32
_LEVELS = {  # narrowest first; whether there is a minimum, lowest and highest level
    Kind.Q4_0: (False, -8, 7),
    Kind.Q4_1: (True, 0, 15),
    Kind.Q5_0: (False, -16, 15),
    Kind.Q5_1: (True, 0, 31),
    Kind.Q8_0: (False, -128, 127),
}
#: Options of `quantize.gptq` and `quantize.rtn` whose grid is that of the block type: solved on it, written as it is.
GRIDS: dict[str, dict[str, int | str]] = {
    "Q4_0": {"bits": 4, "group_size": BLOCK, "zero": "none"},
    "Q4_1": {"bits": 4, "group_size": BLOCK, "zero": "float"},
    "Q5_0": {"bits": 5, "group_size": BLOCK, "zero": "none"},
    "Q5_1": {"bits": 5, "group_size": BLOCK, "zero": "float"},
    "Q8_0": {"bits": 8, "group_size": BLOCK, "zero": "none"},
}
_WORDS = {"none": "symmetric", "float": "with a float minimum"}
#: For messages: what each block type holds.
HOLDS = (
    "; ".join(
        f"{name} holds {o['bits']}-bit codes {_WORDS[str(o['zero'])]} (quantize.gptq: "
        f"{', '.join(f'{key}: {value}' for key, value in o.items())})"
        for name, o in GRIDS.items()
    )
    + f"; quantize.blocks solves on the grid of each type ({', '.join(TYPES)})"
)


@dataclass(frozen=True)
class Blocks:
    """A matrix as blocks of one type.

    Attributes:
        kind: the type.
        levels: (M, N) int16; the codes themselves of IQ4_NL and of the types that end in K.
        scale: (M, K) float16.
        minimum: (M, K) float16, or None; in the types that end in K it is taken away.
        scales, minimums: (M, G) whole numbers, the codes of those of groups; None where there are none.
    """

    kind: Kind
    levels: Tensor
    scale: Tensor
    minimum: Tensor | None
    scales: Tensor | None = None
    minimums: Tensor | None = None

    def encode(self) -> NDArray[np.uint8]:
        """The bytes of every row, (M, K * bytes of a block)."""
        if self.scales is not None:
            return _super_blocks(self)
        has_minimum, lowest, _ = _LEVELS.get(self.kind, (False, 0, 15))
        rows, blocks = self.scale.shape
        levels = self.levels.reshape(rows, blocks, BLOCK).numpy()
        parts = [_bytes(self.scale)]
        if has_minimum:
            assert self.minimum is not None
            parts.append(_bytes(self.minimum))
        if self.kind is Kind.Q8_0:
            parts.append(levels.astype(np.int8).view(np.uint8))
        else:
            codes = (levels - lowest).astype(np.uint8)
            if self.kind in (Kind.Q5_0, Kind.Q5_1):  # the fifth bits of a block come first, entry 0 lowest
                parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
            low, high = codes[..., : BLOCK // 2] & 15, codes[..., BLOCK // 2 :] & 15
            parts.append((low | high << 4).astype(np.uint8))  # entry i shares a byte with entry i + 16
        return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _super_blocks(blocks: Blocks) -> NDArray[np.uint8]:
    """The bytes of 256 entries each; where the bits of each lie is the file's own order."""
    rows, count = blocks.scale.shape
    codes = blocks.levels.numpy().astype(np.uint8).reshape(rows, count, SUPER)
    assert blocks.scales is not None
    scales = blocks.scales.numpy().astype(np.uint8).reshape(rows, count, -1)
    d = _bytes(blocks.scale)
    if blocks.minimum is None or blocks.minimums is None:
        if blocks.kind is Kind.Q3_K:
            low, high = scales[..., :8] & 15 | (scales[..., 8:] & 15) << 4, _crossed(scales >> 4, 4, 2)
            parts = [_crossed(codes >> 2, 32, 1), _twos(codes & 3), low, high, d]
        else:
            assert blocks.kind is Kind.Q6_K
            parts = [_crossed(codes.reshape(rows, count, 2, 128) & 15, 64, 4), _twos(codes >> 4), scales ^ 128, d]
    else:
        minimums = blocks.minimums.numpy().astype(np.uint8).reshape(scales.shape)
        m = _bytes(blocks.minimum)
        if blocks.kind is Kind.Q2_K:
            parts = [scales | minimums << 4, _twos(codes), d, m]
        else:
            first, second = scales[..., :4] | scales[..., 4:] >> 4 << 6, minimums[..., :4] | minimums[..., 4:] >> 4 << 6
            parts = [d, m, first, second, scales[..., 4:] & 15 | (minimums[..., 4:] & 15) << 4]
            if blocks.kind is Kind.Q5_K:
                parts.append(_crossed(codes >> 4, 32, 1))
            parts.append(_crossed(codes.reshape(rows, count, 4, 64) & 15, 32, 4))
    return np.concatenate([part.reshape(rows, count, -1) for part in parts], axis=-1).reshape(rows, -1)


def _crossed(codes: NDArray[Any], wide: int, bits: int) -> NDArray[np.uint8]:
    """(..., n * wide) codes of ``bits`` bits -> (..., wide): entries ``wide`` apart share a byte, the first lowest."""
    parts = codes.reshape(*codes.shape[:-1], -1, wide)
    shifts = bits * np.arange(parts.shape[-2], dtype=np.uint8)[:, None]
    found: NDArray[np.uint8] = np.bitwise_or.reduce(parts << shifts, axis=-2)
    return found


def _twos(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """(..., 256) codes of 2 bits -> (..., 2, 32), each half by itself."""
    return _crossed(codes.reshape(*codes.shape[:-1], 2, SUPER // 2), 32, 2)


def _bytes(held: Tensor) -> NDArray[np.uint8]:
    """(M, K) float16 -> (M, K, 2), little endian."""
    return held.contiguous().numpy().astype("<f2").view(np.uint8).reshape(*held.shape, 2)


def blocks_of(weight: Weight) -> Blocks | str:
    """``weight`` as blocks of the narrowest type that holds it bit for bit, or why none does."""
    if not isinstance(weight, Quantized):
        return f"a {type(weight).__name__} is no single grid of codes"
    for kind in TYPES.values():
        if (kind.scale_bits or kind.format == "nl4") and (solved := _as_solved(weight, kind)) is not None:
            return solved
    if weight.format not in ("integer", "unsigned"):
        return f"its codes are of format {weight.format}"
    columns, size = weight.shape[1], weight.group_size
    if columns % BLOCK or (size is not None and size % BLOCK):
        return f"groups of {size or columns} of its {columns} inputs are not blocks of {BLOCK}"
    with torch.no_grad():
        grid = weight.grid
        scale = _half(_by_block(grid.scale, weight))
        if scale is None:
            return "16 bits do not hold its scales"
        codes = weight.codes().short()
        if weight.zero_kind == "float":
            assert grid.zero is not None
            minimum = _half(_by_block(grid.zero, weight))
            return "16 bits do not hold its minima" if minimum is None else _narrowest(codes, scale, minimum, weight)
        zero = _by_block(grid.affine()[1].new_zeros(grid.scale.shape) if grid.zero is None else grid.zero, weight)
        if weight.zero_kind == "none":
            zero = torch.full_like(zero, 0 if weight.format == "unsigned" else 2 ** (weight.bits - 1))
        levels = codes - zero.short().repeat_interleave(BLOCK, dim=1)
        found = _narrowest(levels, scale, None, weight)
        minimum = _half(-scale.float() * zero.float())
        if minimum is None:
            return found
        other = _narrowest(codes, scale, minimum, weight)
    if isinstance(found, str) or (not isinstance(other, str) and _rank(other) < _rank(found)):
        return other if not isinstance(other, str) else found
    return found


def _as_solved(weight: Quantized, kind: BlockType) -> Blocks | None:
    """A weight with the very layout of ``kind``, which has no other grids inside; None for any other."""
    wanted = (kind.bits, kind.size, kind.format, "float" if kind.minimum else "none")
    if (weight.bits, weight.group_size, weight.format, weight.zero_kind) != wanted or weight.shape[1] % kind.span:
        return None
    codes = weight.codes().short()
    if not kind.scale_bits:
        scale = _half(weight.scale.dense().detach())
        return None if scale is None else Blocks(Kind[kind.name], codes, scale, None)
    held = []
    for inner, format in ((weight.scale, kind.scale_format), (weight.zero, "unsigned")):
        if inner is None:
            continue
        layout = (kind.scale_bits, SUPER // kind.size, format)
        if not isinstance(inner, Quantized) or (inner.bits, inner.group_size, inner.format) != layout:
            return None
        outer = _half(inner.scale.dense().detach())
        if inner.zero is not None or outer is None:
            return None
        held.append((outer, inner.codes().short()))
    (scale, scales), (minimum, minimums) = held[0], held[1] if kind.minimum else (None, None)
    return Blocks(Kind[kind.name], codes, scale, None if minimum is None else -minimum, scales, minimums)


def _rank(blocks: Blocks) -> int:
    return list(_LEVELS).index(blocks.kind)


def _narrowest(levels: Tensor, scale: Tensor, minimum: Tensor | None, weight: Quantized) -> Blocks | str:
    lowest, highest = int(levels.min()), int(levels.max())
    for kind, (has_minimum, least, most) in _LEVELS.items():
        if has_minimum == (minimum is not None) and least <= lowest and highest <= most:
            return Blocks(kind, levels, scale, minimum)
    return f"no block type holds {weight.bits}-bit levels from {lowest} to {highest}" + (
        "" if minimum is None else " with a minimum"
    )


def _by_block(held: Tensor, weight: Quantized) -> Tensor:
    """A scale or zero for each group, (M, G) or (1, 1), as one for each block, (M, K)."""
    rows, blocks = weight.shape[0], weight.shape[1] // BLOCK
    if weight.group_size is None:
        return held.detach().expand(rows, blocks)
    return held.detach().repeat_interleave(weight.group_size // BLOCK, dim=1)[:, :blocks]


def _half(held: Tensor) -> Tensor | None:
    """``held`` in float16, or None when that is not the same."""
    half = held.to(torch.float16)
    return half if torch.equal(half.to(held.dtype), held) else None
