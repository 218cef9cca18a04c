"""Weights on the E8 lattice, two bits each: runs of eight neighbors as one of 65,536 points, a quarter step off it.

Source: A. Tseng et al., "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks",
arXiv:2402.04396, section 4 (E8P). A point is a vector of half-integers with an even sum, of which a table holds the
magnitudes: all 227 of squared norm up to 10 and 29 of norm 12; any signs of seven coordinates, which settle that of the
eighth; and +-1/4 added to all. Differs from the source: the order of the bits in a code; the nearest point is found by
rounding to the lattice, and by search only where that leaves the table.

Shape letters: M out features, N in features, V vectors of a row, R vectors; ... any leading dimensions.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import FormError, ShapeError
from pennyweight.weights.by_rows import by_rows
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, check_finite, form

SIZE = 8
#: The 29 vectors of squared norm 12 that the source takes, of the 56 there are: bit i tells 3/2 from 1/2 in place i.
_NORM_12 = (
    "11110001 11110010 11110100 11111000 00110111 01010111 10010111 01100111 10100111 11000111 00111011 01011011 "
    "10011011 01101011 10101011 11001011 00111101 01011101 10011101 01101101 10101101 11001110 00111110 01011110 "
    "10011110 01101110 10101110 11101100 11100011"
)
_KEY = torch.tensor([3**i for i in range(SIZE)])
_CHUNK = 1 << 11  # vectors searched at a time: 17 MB


@lru_cache(maxsize=1)
def magnitudes() -> Tensor:
    """(256, 8) float32 the table of magnitudes."""
    rows = [parts for parts in product((0.5, 1.5, 2.5), repeat=SIZE) if sum(part * part for part in parts) <= 10]
    rows += [tuple(1.5 if bit == "1" else 0.5 for bit in reversed(word)) for word in _NORM_12.split()]
    return torch.tensor(rows)


@lru_cache(maxsize=1)
def points() -> Tensor:
    """(65536, 8) float32: bits 0-7 of a code are the magnitudes, 8-14 the signs of the first seven, 15 the shift."""
    code = torch.arange(1 << 16)
    size = magnitudes()[code & 255]
    minus = (code[:, None] >> (8 + torch.arange(7))) & 1
    # a sign changes the sum by an odd number: the signs make it even
    last = (minus.sum(1) + size.sum(1).long()) % 2
    signs = 1 - 2 * torch.cat([minus, last[:, None]], 1)
    return size * signs + (0.25 - 0.5 * (code >> 15))[:, None]


@lru_cache(maxsize=1)
def _by_key() -> Tensor:
    """(3**8,) the place in the table of magnitudes read as base-3 digits, -1 where it holds none."""
    found = torch.full((3**SIZE,), -1)
    found[((magnitudes() - 0.5).long() * _KEY).sum(1)] = torch.arange(256)
    return found


def nearest_codes(vectors: Tensor) -> Tensor:
    """(R,) int64 codes of the points nearest to ``vectors`` (R, 8)."""
    one, other = (_rounded(vectors, shift) for shift in (0, 1))
    best, distance = one
    closer = other[1] < distance
    best, distance = torch.where(closer, other[0], best), torch.where(closer, other[1], distance)
    outside = (best < 0).nonzero()[:, 0]
    for part in torch.split(outside, _CHUNK):
        best[part] = _searched(vectors[part])
    return best


def _rounded(vectors: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Codes of the nearest lattice points of one shift, -1 outside the table, and squared distances."""
    y = vectors - (0.25 - 0.5 * shift)
    point = y.floor() + 0.5
    left = y - point
    odd = point.sum(1).long() % 2 != 0  # the next best: the coordinate rounded worst goes to its other side
    place = left.abs().argmax(1, keepdim=True)
    step = torch.where(left.gather(1, place) < 0, -1.0, 1.0) * odd[:, None]
    point = point.scatter_add(1, place, step)
    digits = (point.abs() - 0.5).long()
    inside = (digits <= 2).all(1)
    index = _by_key()[(digits.clamp_max(2) * _KEY).sum(1)]
    code = _code(index.clamp_min(0), point < 0, shift)
    return torch.where(inside & (index >= 0), code, -1), (y - point).square().sum(1)


def _code(index: Tensor, minus: Tensor, shift: int | Tensor) -> Tensor:
    return index + ((minus[:, :7].long() << (8 + torch.arange(7))).sum(1)) + (shift << 15)


def _searched(vectors: Tensor) -> Tensor:
    """The same by looking at the whole table."""
    table = magnitudes()
    odd = table.sum(1).long() % 2
    found, distances = [], []
    for shift in (0, 1):
        y = vectors - (0.25 - 0.5 * shift)
        size, minus = y.abs(), y < 0
        product = size[:, None] * table  # (R, 256, 8)
        # the signs of y cost nothing; where their number does not suit the sum, the cheapest is the other one
        cheapest, place = product.min(2)
        unfit = (minus.sum(1)[:, None] + odd) % 2
        distance = table.square().sum(1) - 2 * product.sum(2) + 4 * cheapest * unfit
        low, index = distance.min(1)
        rows = torch.arange(len(y))
        minus = minus.clone()
        where = place[rows, index]
        minus[rows, where] ^= unfit[rows, index].bool()
        found.append(_code(index, minus, shift))
        distances.append(low + y.square().sum(1))
    return torch.where(distances[1] < distances[0], found[1], found[0])


@form("lattice")
class Lattice(Weight):
    """``W[i, 8*v : 8*(v+1)] = scale[i] * point[code[i, v]]``: two bits a weight.

    Args:
        codes: (M, V) int16, the 16 bits of a code (the sign being one of them).
        scale: (M,), or (1,) for the whole matrix; trained.
        columns: N; the last vector of a row may reach beyond it.

    Computes in float32 (float64 where the scale is).

    Cost: M*ceil(N/8) codes of two bytes, and the scale; 2*M*N FLOPs a row. Exact for scaled points.
    """

    tensors = ("codes", "scale")
    codes: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, *, columns: int) -> None:
        if codes.dtype != torch.int16 or codes.ndim != 2 or codes.shape[1] != -(-columns // SIZE):
            raise FormError(
                f"Lattice: {codes.dtype} codes {tuple(codes.shape)} for {columns} columns; "
                f"give int16 (out, {-(-columns // SIZE)})"
            )
        if scale.shape not in ((codes.shape[0],), (1,)) or not scale.is_floating_point():
            raise ShapeError(
                f"Lattice: a {scale.dtype} scale {tuple(scale.shape)} for {codes.shape[0]} rows; "
                f"give floating ({codes.shape[0]},) or (1,)"
            )
        super().__init__(shape=(codes.shape[0], columns))
        check_finite(scale, "Lattice: scale")
        self.register_buffer("codes", codes)
        self.scale = scale if isinstance(scale, nn.Parameter) else nn.Parameter(scale)

    @classmethod
    def nearest(cls, matrix: Tensor, scale: Tensor) -> Lattice:
        """``matrix`` (M, N) rounded to the nearest points under ``scale``, (M,) or (1,), none of it zero."""
        padded = nn.functional.pad(matrix.detach().float() / scale.float()[:, None], (0, -matrix.shape[1] % SIZE))
        codes = nearest_codes(padded.reshape(-1, SIZE)).view(matrix.shape[0], -1)
        return cls(stored(codes), scale, columns=matrix.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.scale.dtype, torch.float32)

    def _values(self, codes: Tensor, scale: Tensor) -> Tensor:
        table = points().to(device=codes.device, dtype=self.dtype)
        found = nn.functional.embedding(codes.int() & 0xFFFF, table).flatten(-2)[..., : self.shape[1]]
        return found * scale.to(self.dtype)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self, x)

    def dense(self) -> Tensor:
        return self._values(self.codes, self.scale)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        scale = self.scale if self.scale.numel() == 1 else self.scale[flat]
        return self._values(self.codes[flat], scale).view(*index.shape, self.shape[1])

    def settings(self) -> dict[str, Any]:
        return {"columns": self.shape[1]}

    def cost(self) -> Cost:
        count = self.codes.numel() + self.scale.numel()
        return Cost(count, self.codes.nbytes + self.scale.nbytes, 2 * self.shape[0] * self.shape[1])


def stored(codes: Tensor) -> Tensor:
    """Codes of 0 ... 65535 as int16 of the same bits."""
    return torch.where(codes >= 1 << 15, codes - (1 << 16), codes).to(torch.int16)
