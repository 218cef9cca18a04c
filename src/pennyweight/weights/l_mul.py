"""L-Mul: floating-point products by one integer addition, emulated.

Row 152. Source: H. Luo and W. Sun, "Addition is All You Need for Energy-efficient Language Models", arXiv:2410.00907:
``(1 + a)2^i * (1 + b)2^j`` becomes ``(1 + a + b + 2^-l)2^(i + j)``, where l is the number of mantissa bits up to 3, 3
for 4 of them, and 4 beyond. Hardware adds the bit patterns as whole numbers, so that a fraction beyond one flows into
the exponent: ``2(a + b + 2^-l)2^(i + j)`` then (``carry``); the formula as printed has none. Operands are rounded to
the mantissa bits first, ties to even; sums are kept in float32. Subnormal numbers count as zero, and what is beyond the
largest number is the largest. Differs from the source: exponents keep the 8 bits of float32.

On a CPU this is an emulation, many times slower than multiplying: what it shows is quality, and what it saves is energy
in hardware that has such adders (`pennyweight.measure.energy.dot_product`). Backward, products are exact.

Shape letters: M, K, N rows, inner width and columns of a product; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pennyweight.errors import FormError, OptionError, ShapeError

_FRACTION = 23  # bits of the fraction of a float32
_ONE = 127 << _FRACTION  # the bit pattern of 1.0
_LARGEST = (255 << _FRACTION) - 1
#: Beyond this many mantissa bits a table of pairs costs more than going through the pairs of operands themselves.
_TABLE_BITS = 5
_BLOCK = 2**22  # products held at a time


def offset_bits(bits: int) -> int:
    """l(m): the correction of products of ``bits`` mantissa bits is ``2**-offset_bits(bits)``."""
    return bits if bits <= 3 else 3 if bits == 4 else 4


@dataclass(frozen=True)
class LMul:
    """How products are taken; a setting, and the arithmetic.

    Args:
        bits: of a mantissa, 1 to 23.
        carry: whether a fraction beyond one flows into the exponent, as in an integer adder.

    Raises:
        OptionError: bits that float32 does not have.
    """

    bits: int = 4
    carry: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= _FRACTION:
            raise OptionError(f"L-Mul: bits = {self.bits}; give 1 to {_FRACTION}")

    def times(self, x: Tensor, y: Tensor, *, offset: float | None = None) -> Tensor:
        """``x * y``, entry by entry, float32: the bit patterns themselves, added.

        Args:
            x: float32, as are all.
            y: broadcast against ``x``.
            offset: the correction, for studies of it; None for that of the source.
        """
        first, second = _rounded(x, self.bits), _rounded(y, self.bits)
        found = (_carried if self.carry else _plain)(first, second, self._offset(offset))
        return torch.where(x.isfinite() & y.isfinite(), found, x * y)  # NaN and infinity stay what they are

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b``: (..., M, K), (..., K, N) -> (..., M, N), in the dtype of ``a``, summed in float32.

        Raises:
            ShapeError: shapes that no product has.
        """
        if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-2 if b.ndim > 1 else -1]:
            raise ShapeError(f"L-Mul: no product of {tuple(a.shape)} and {tuple(b.shape)}")
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            left, right = a.detach().float(), b.detach().float()
            left = left if a.ndim > 1 else left[None]
            right = right if b.ndim > 1 else right[:, None]
            found = (self._by_table if self.bits <= _TABLE_BITS else self._by_pairs)(left, right)
            found = found if b.ndim > 1 else found[..., 0]
            found = (found if a.ndim > 1 else (found[..., 0, :] if b.ndim > 1 else found[..., 0])).to(a.dtype)
        if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
            return found
        exact = torch.matmul(a, b.to(a.dtype))
        return exact + (found - exact.detach())

    def _offset(self, offset: float | None = None) -> float:
        return 2.0 ** -offset_bits(self.bits) if offset is None else offset

    def _by_table(self, a: Tensor, b: Tensor) -> Tensor:
        """For each mantissa of ``a`` one exact product: powers of two times what that mantissa makes of those of b."""
        (power, code), (other, second) = _parts(a, self.bits), _parts(b, self.bits)
        share = 2.0**-self.bits
        if not self.carry:  # 1 + u + v + offset is a sum of what either side brings
            offset = self._offset()
            return (power * (1 + offset + code * share)) @ other + power @ (other * second * share)
        table = _table(self.bits, self._offset()).to(a.device)
        found: Tensor | None = None
        # the gather goes to the smaller side, the mask to the larger
        swap = a.numel() > b.numel()
        for value in range(2**self.bits):
            if swap:
                part = (power * (code == value)) @ (other * table[value][second])
            else:
                part = (power * table[value][code]) @ (other * (second == value))
            found = part if found is None else found.add_(part)
        assert found is not None
        return found

    def _by_pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """Pair by pair, in blocks of rows: the plain twin of `_by_table`, and the way for long mantissas."""
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
        left, right = (x.expand(*lead, *x.shape[-2:]).reshape(prod(lead), *x.shape[-2:]) for x in (a, b))
        step = max(1, _BLOCK // max(1, right.shape[1] * right.shape[2]))
        rows = [
            torch.cat([self.times(part[:, :, None], matrix).sum(1) for part in rows.split(step)])
            for rows, matrix in zip(left, right, strict=True)
        ]
        found = torch.stack(rows) if rows else left.new_zeros(0, left.shape[1], right.shape[2])
        return found.reshape(*lead, a.shape[-2], b.shape[-1])

    def settings(self) -> dict[str, Any]:
        """JSON-able; `LMul.of` is its inverse."""
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any], where: str = "L-Mul") -> LMul:
        """The arithmetic that `settings` describe.

        Raises:
            FormError: settings that it does not take.
        """
        try:
            return cls(**found)
        except TypeError as error:
            raise FormError(f"{where}: no arithmetic of this version: {error}") from error


class Arithmetic(Protocol):
    """A way of taking matrix products."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b``: (..., M, K), (..., K, N) -> (..., M, N)."""


class Products(TorchFunctionMode):
    """While entered, matrix products are those of ``arithmetic``; all else is as it was.

    Raises:
        OptionError: a product that is not taken as one of two matrices (einsum, fused attention).
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.arithmetic = arithmetic

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func in _PRODUCTS and not given:
            return self.arithmetic.matmul(*args)
        if func is Tensor.__rmatmul__:
            return self.arithmetic.matmul(args[1], args[0])
        if func is functional.linear:
            return self._linear(*args, **given)
        if func in _OTHERS:
            name = getattr(func, "__name__", str(func))
            raise OptionError(f"L-Mul: {name} is no product of two matrices that could be taken apart; leave it out")
        return func(*args, **given)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = self.arithmetic.matmul(input, weight.T)
        return found if bias is None else found + bias


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
_OTHERS = (
    torch.einsum, torch.addmm, torch.baddbmm, functional.scaled_dot_product_attention, functional.bilinear,
    functional.conv1d, functional.conv2d,
)  # fmt: skip


def _rounded(x: Tensor, bits: int) -> Tensor:
    """The bit patterns (int32) of ``x`` with its fraction rounded to ``bits`` bits, ties to even; subnormal: zero."""
    pattern = x.contiguous().view(torch.int32)
    size = pattern & 0x7FFFFFFF
    shift = _FRACTION - bits
    if shift:
        size = (size + ((size >> shift) & 1) + (1 << (shift - 1)) - 1).clamp_max(_LARGEST) & -(1 << shift)
    size = torch.where(size < 1 << _FRACTION, torch.zeros_like(size), size)
    return size | (pattern & -0x80000000)


def _parts(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Signed powers of two (zero for zero), and the mantissas as whole numbers of ``bits`` bits."""
    pattern = _rounded(x, bits)
    power = (pattern & (-1 << _FRACTION)).view(torch.float32)
    return power, ((pattern >> (_FRACTION - bits)) & (2**bits - 1)).long()


def _signed(size: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """float32 of the magnitude ``size`` (bit patterns, int64), with the sign of a product, zero where one is."""
    nothing = ((x & 0x7FFFFFFF) == 0) | ((y & 0x7FFFFFFF) == 0) | (size < 1 << _FRACTION)
    size = torch.where(nothing, torch.zeros_like(size), size.clamp_max(_LARGEST)).int()
    return (size | ((x ^ y) & -0x80000000)).view(torch.float32)


def _carried(x: Tensor, y: Tensor, offset: float) -> Tensor:
    size = (x & 0x7FFFFFFF).long() + (y & 0x7FFFFFFF).long() - _ONE + round(offset * 2**_FRACTION)
    return _signed(size, x, y)


def _plain(x: Tensor, y: Tensor, offset: float) -> Tensor:
    fraction = (1 << _FRACTION) - 1
    exponent = ((x & 0x7FFFFFFF) >> _FRACTION).double() + ((y & 0x7FFFFFFF) >> _FRACTION).double() - 2 * 127
    sum_ = 1 + ((x & fraction).double() + (y & fraction).double()) / 2**_FRACTION + offset
    size = (sum_ * torch.exp2(exponent)).clamp_max(torch.finfo(torch.float32).max).float()
    return _signed(size.view(torch.int32).long(), x, y)


@cache
def _table(bits: int, offset: float) -> Tensor:
    """(2^bits, 2^bits) what the mantissas u and v make together, with the carry."""
    one = torch.arange(2**bits).double() / 2**bits
    total = one[:, None] + one + offset
    return torch.where(total < 1, 1 + total, 2 * total).float()
