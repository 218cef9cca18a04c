"""Hashed weights: many entries share few values, and random bases under stored coefficients.

What is random is computed from a seed and the place of an entry by an integer hash, on every machine alike; only
values, coefficients and the seed are stored.

Sources: W. Chen et al., "Compressing Neural Networks with the Hashing Trick", arXiv:1504.04788 (shared values with
random signs); A. Desai and A. Shrivastava, "In defense of parameter sharing for model-compression", arXiv:2310.11611
(the balanced map); S. Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis",
arXiv:2310.02556; C. Wellons, "hash-prospector" (the constants of the hash, public domain).

Shape letters: M out features, N in features, V shared values, K bases; ... any leading dimensions.
"""

from __future__ import annotations

from math import gcd, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import OptionError, ShapeError
from pennyweight.weights.ids import known_ids
from pennyweight.weights.structured import held
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, check_finite, form

_WORD = 2**32 - 1
_CHUNK = 2**22  # entries of random bases made at a time: 16 MB of float32, 32 MB of hashes


def hash32(x: Tensor) -> Tensor:
    """A well-mixed bijection of 32-bit words, held in int64: give int64."""
    x = x & _WORD
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    # less 2**32: the same product in 32 bits, and none that leaves 63
    x = (x * (0x846CA68B - 2**32)) & _WORD
    return x ^ (x >> 16)


def _keys(seed: int, which: Tensor) -> tuple[Tensor, Tensor]:
    """Two random words for each of ``which``, from all 64 bits of the seed."""
    low, high = (torch.tensor(part, device=which.device) for part in (seed & _WORD, (seed >> 32) & _WORD))
    first = hash32(hash32(hash32(low + which) ^ high) + (which >> 32))
    return first, hash32(first + 0x9E3779B9)


def _check_seed(seed: int, where: str) -> None:
    if not 0 <= seed < 2**64:
        raise OptionError(f"{where}: seed {seed}; give 0 to 2**64 - 1")


@form("hashed")
class Hashed(Weight):
    """``W[i, j] = scale * sign * values[place]``: V values shared by all entries.

    Entries are numbered in scan order from ``offset`` on and cut into stretches of V; each stretch takes every value
    once, in an order of its own. So all values are used equally often, and V = M*N of them hold any matrix.

    Args:
        values: (V,). Several weights may hold the same parameter, each at its own offset.
        rows, columns: M and N.
        seed: 0 to 2**64 - 1.
        offset: the number of the first entry.
        scale: what every value is multiplied by here.

    Cost: V parameters, 2*M*N FLOPs a row. Exact where V is at least M*N and ``offset`` 0.
    """

    tensors = ("values",)

    def __init__(
        self, values: Tensor, *, rows: int, columns: int, seed: int = 0, offset: int = 0, scale: float = 1.0
    ) -> None:
        super().__init__(shape=(rows, columns))
        if values.ndim != 1 or not len(values):
            raise ShapeError(f"Hashed: values {tuple(values.shape)}; give (values,), at least one")
        _check_seed(seed, "Hashed")
        if offset < 0 or scale == 0 or not isfinite(scale):
            raise OptionError(
                f"Hashed: offset {offset}, scale {scale}; give an offset from 0 and a finite scale, not 0"
            )
        self.seed, self.offset, self.scale = seed, offset, float(scale)
        self.values = held(values, "Hashed: values")

    @classmethod
    def nearest(cls, matrix: Tensor, count: int, *, seed: int = 0) -> Hashed:
        """The nearest to ``matrix`` (M, N) with ``count`` shared values: each the mean of its entries."""
        if matrix.ndim != 2:
            raise ShapeError(f"Hashed.nearest: a tensor of shape {tuple(matrix.shape)} is not a matrix; give (out, in)")
        if count < 1:
            raise OptionError(f"Hashed.nearest: {count} values; give at least 1")
        check_finite(matrix, "Hashed.nearest: matrix")
        empty = cls(matrix.new_zeros(count), rows=matrix.shape[0], columns=matrix.shape[1], seed=seed)
        place, sign = empty._places(0, matrix.numel())
        # double: a value may be shared by millions
        total = torch.zeros(count, dtype=torch.float64, device=matrix.device)
        uses = total.index_add(0, place, torch.ones_like(place, dtype=torch.float64)).clamp_min(1)
        total = total.index_add(0, place, matrix.detach().reshape(-1).double() * sign)
        return cls((total / uses).to(matrix), rows=matrix.shape[0], columns=matrix.shape[1], seed=seed)

    def places(self) -> tuple[Tensor, Tensor]:
        """(M*N,) the place of the value of each entry, and its sign (int8), in scan order."""
        return self._places(0, self.shape[0] * self.shape[1])

    def _places(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(stop - start,) place of the value and sign (int8) of each entry of that stretch of the scan order."""
        return self._places_of(torch.arange(start, stop, device=self.values.device), start, stop)

    def _places_of(self, entries: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The same of ``entries``, numbers in scan order from ``start`` to below ``stop``."""
        count, device = len(self.values), self.values.device
        number = entries + self.offset
        stretch = torch.div(number, count, rounding_mode="floor")
        first = int(self.offset + start) // count
        last = int(self.offset + stop - 1) // count
        multiply, add = _keys(self.seed, torch.arange(first, last + 1, device=device))
        # an affine map is a bijection of 0 ... V-1 when its factor has no divisor in common with V
        factors = torch.tensor([_coprime(int(key) % count, count) for key in multiply], device=device)
        which = stretch - first
        place = (factors[which] * (number - stretch * count) + add[which]) % count
        low, high = (part for part in _keys(self.seed ^ 0x5851F42D4C957F2D, torch.zeros(1, dtype=torch.long)))
        sign = hash32(hash32(number ^ int(low)) + (number >> 32) * 0x9E3779B9 + int(high)) & 1
        return place, (1 - 2 * sign).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    def dense(self) -> Tensor:
        return self._entries(0, self.shape[0] * self.shape[1]).view(self.shape)

    def rows(self, index: Tensor) -> Tensor:
        flat = known_ids(index, self.shape[0], "Hashed").reshape(-1)
        if not len(flat):
            return self.values.new_zeros(*index.shape, self.shape[1])
        start, stop = int(flat.min()) * self.shape[1], (int(flat.max()) + 1) * self.shape[1]
        entries = flat[:, None] * self.shape[1] + torch.arange(self.shape[1], device=flat.device)
        place, sign = self._places_of(entries.reshape(-1), start, stop)
        found = self.values.index_select(0, place) * (sign * self.scale).to(self.values.dtype)
        return found.view(*index.shape, self.shape[1])

    def _entries(self, start: int, stop: int) -> Tensor:
        place, sign = self._places(start, stop)
        return self.values.index_select(0, place) * (sign * self.scale).to(self.values.dtype)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def settings(self) -> dict[str, Any]:
        return {
            "rows": self.shape[0],
            "columns": self.shape[1],
            "seed": self.seed,
            "offset": self.offset,
            "scale": self.scale,
        }

    def cost(self) -> Cost:
        return Cost(len(self.values), self.values.nbytes, 2 * self.shape[0] * self.shape[1])


def _coprime(factor: int, count: int) -> int:
    """The next number from ``factor`` on, around, that shares no divisor with ``count``."""
    while gcd(factor, count) != 1:
        factor = (factor + 1) % count if count > 1 else 1
    return factor


@form("random_basis")
class RandomBasis(Weight):
    """``W = sum of coefficients[k] * B_k / sqrt(K)``: random matrices B_k, entries uniform in [-1, 1), from a seed.

    Args:
        coefficients: (K,).
        rows, columns: M and N.
        seed: 0 to 2**64 - 1.

    Computes in float32 (float64 where the coefficients are). The bases are made anew at each use, some at a time, and
    again for gradients.

    Cost: K parameters, 2*M*N FLOPs a row (making the bases, once a call, is not among them: 2*K*M*N and K*M*N hashes).
    Exact where K is at least M*N.
    """

    tensors = ("coefficients",)

    def __init__(self, coefficients: Tensor, *, rows: int, columns: int, seed: int = 0) -> None:
        super().__init__(shape=(rows, columns))
        if coefficients.ndim != 1 or not len(coefficients):
            raise ShapeError(f"RandomBasis: coefficients {tuple(coefficients.shape)}; give (bases,), at least one")
        _check_seed(seed, "RandomBasis")
        self.seed = seed
        self.coefficients = held(coefficients, "RandomBasis: coefficients")

    @classmethod
    def nearest(cls, matrix: Tensor, count: int, *, seed: int = 0) -> RandomBasis:
        """The nearest to ``matrix`` (M, N) in ``count`` bases, by least squares in ``count`` * M * N doubles."""
        if matrix.ndim != 2:
            raise ShapeError(f"RandomBasis.nearest: a tensor {tuple(matrix.shape)} is not a matrix; give (out, in)")
        if count < 1:
            raise OptionError(f"RandomBasis.nearest: {count} bases; give at least 1")
        check_finite(matrix, "RandomBasis.nearest: matrix")
        bases = random_bases(seed, 0, count, count, matrix.numel(), matrix.device).double()
        target = matrix.detach().double().reshape(-1, 1)
        found = torch.linalg.lstsq(bases.T.cpu(), target.cpu(), driver="gelsd").solution[:, 0]
        return cls(found.to(matrix), rows=matrix.shape[0], columns=matrix.shape[1], seed=seed)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.coefficients.dtype, torch.float32)

    def bases(self) -> Tensor:
        """(K, M, N) the scaled bases themselves: memory for K matrices."""
        count, size = len(self.coefficients), self.shape[0] * self.shape[1]
        return random_bases(self.seed, 0, count, count, size, self.device).view(count, *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    def dense(self) -> Tensor:
        size = self.shape[0] * self.shape[1]
        found: Tensor = _Combine.apply(self.coefficients.to(self.dtype), self.seed, size)  # type: ignore[no-untyped-call]
        return found.view(self.shape)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def settings(self) -> dict[str, Any]:
        return {"rows": self.shape[0], "columns": self.shape[1], "seed": self.seed}

    def cost(self) -> Cost:
        return Cost(len(self.coefficients), self.coefficients.nbytes, 2 * self.shape[0] * self.shape[1])


def random_bases(seed: int, start: int, stop: int, count: int, size: int, device: torch.device) -> Tensor:
    """(stop - start, ``size``) float32 bases ``start`` to ``stop`` of ``count``, scaled by ``1 / sqrt(count)``."""
    add, multiply = _keys(seed, torch.arange(start, stop, device=device))
    # an odd factor of its own for each basis: with a shift alone, two of them could be the same numbers further on
    words = torch.arange(size, device=device)
    high = (words >> 32) * 0x9E3779B9
    factor = ((multiply | 1) & 0x7FFFFFFF)[:, None]
    found = hash32((words & _WORD) * factor + add[:, None] + high) >> 8  # 24 bits: exact in float32
    return (found.float() * 2.0**-23 - 1) / sqrt(count)


class _Combine(torch.autograd.Function):
    """(M*N,) the combination of bases, holding only some of them in memory at a time, both ways."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, seed: int, size: int) -> Tensor:
        ctx.seed, ctx.size, ctx.count = seed, size, len(coefficients)
        found: Tensor = coefficients.new_zeros(size)
        for start, stop in _chunks(len(coefficients), size):
            bases = random_bases(seed, start, stop, len(coefficients), size, coefficients.device)
            found += coefficients[start:stop] @ bases.to(coefficients)
        return found

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        (wanted,) = gradient
        parts = [
            random_bases(ctx.seed, start, stop, ctx.count, ctx.size, wanted.device).to(wanted) @ wanted.reshape(-1)
            for start, stop in _chunks(ctx.count, ctx.size)
        ]
        return torch.cat(parts), None, None


def _chunks(count: int, size: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK // size)
    return [(start, min(count, start + step)) for start in range(0, count, step)]
