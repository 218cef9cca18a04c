"""Codes of 1 to 8 bits in bytes: code i of a row takes bits ``i*bits`` to ``(i+1)*bits`` of it, lowest bit first.

Rows are padded to whole bytes, so that one row can be read without the others.

Shape letters: M rows, N codes of a row, B bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import FormError, ShapeError


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of ``columns`` codes."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., N) whole numbers of ``bits`` bits as (..., B) uint8.

    Raises:
        FormError: codes that are no integers, or that need more bits.
    """
    if codes.is_floating_point() or codes.is_complex():
        raise FormError(f"pack: codes are {codes.dtype}; give whole numbers")
    if codes.device.type != "meta" and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise FormError(f"pack: codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    columns = codes.shape[-1]
    words = torch.nn.functional.pad(codes, (0, -columns % 8))
    words = words.view(*words.shape[:-1], words.shape[-1] // 8, 8)
    # eight codes make `bits` whole bytes, at most 56 bits: they fit one signed word
    word = torch.zeros(words.shape[:-1], dtype=torch.int64, device=codes.device)
    for place in range(8):
        word |= words[..., place].to(torch.int64) << (bits * place)
    found = torch.stack([(word >> (8 * byte)) & 255 for byte in range(bits)], dim=-1).to(torch.uint8)
    return found.flatten(-2)[..., : packed_width(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: (..., B) uint8 as (..., columns) uint8."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(columns, bits):
        raise ShapeError(
            f"unpack: {packed.dtype} rows of {packed.shape[-1]} are not {columns} codes of {bits} bits; "
            f"give uint8 rows of {packed_width(columns, bits)}"
        )
    if bits == 8:
        return packed
    if 8 % bits == 0:  # no code crosses a byte: stay in uint8, four times faster than by words
        each = 8 // bits
        found = torch.empty(*packed.shape, each, dtype=torch.uint8, device=packed.device)
        for place in range(each):
            torch.bitwise_right_shift(packed, bits * place, out=found[..., place])
        return found.bitwise_and_(2**bits - 1).flatten(-2)[..., :columns]
    return unpack_words(packed, bits, columns)


def unpack_words(packed: Tensor, bits: int, columns: int) -> Tensor:
    """`unpack` for every width below 8, eight codes a word: the plain twin of the way within bytes."""
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits))
    bytes_ = padded.view(*padded.shape[:-1], padded.shape[-1] // bits, bits)
    word = torch.zeros(bytes_.shape[:-1], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        word |= bytes_[..., byte].to(torch.int64) << (8 * byte)
    found = torch.empty(*word.shape, 8, dtype=torch.uint8, device=packed.device)
    for place in range(8):
        found[..., place] = (word >> (bits * place)) & (2**bits - 1)
    return found.flatten(-2)[..., :columns]
