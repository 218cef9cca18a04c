"""Regrid: finds the grid that a checkpoint was de-quantized from, and stores the codes again. Lossless.

Many float checkpoints are 4- or 8-bit files that somebody expanded (GGUF to safetensors, GPTQ merged back). Their
values still lie on the old grid: stored as codes they take a fraction of the bytes and not one bit of the model
changes. Known are grids of steps alone (Q4_0, Q8_0, symmetric GPTQ), of steps and whole zeros (GPTQ, AWQ), of steps and
minima (Q4_1, Q5_1; the minimum must occur in each group, as the checkpoint holds it), and bitsandbytes' NF4. Without a
paper of its own. What is returned was compared with the matrix value by value.

Shape letters: M out features, N in features, P groups, S features of a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from pennyweight.errors import FormError, OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.levers.quantize.nf4 import NF4_VALUES
from pennyweight.solvers.inputs import matrix_of
from pennyweight.statistics import Statistics
from pennyweight.weights import Codebook, Dense, Grid, GridCoded, Quantized, Weight, check_finite
from pennyweight.weights.packing import pack

_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_ROWS, _FEW = 8, 6  # rows, and groups of them, looked at before the whole matrix is
_CHUNK = 1 << 15  # groups looked at at a time


@dataclass(frozen=True)
class _Steps:
    """Groups as whole numbers of steps from an origin.

    Attributes:
        step: (P,) in ``dtype``.
        origin: (P,) likewise, the smallest value; None where the origin is zero.
        codes: (P, S) int16.
        count: (P,) how many steps the largest value is away from the origin; 0 where no grid was found.
    """

    step: Tensor
    origin: Tensor | None
    codes: Tensor
    count: Tensor

    @property
    def found(self) -> bool:
        return bool((self.count > 0).all())


def _tried(
    x: Tensor, origin: Tensor, numbers: Tensor, target: torch.dtype, dtype: torch.dtype, *, minima: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups ``x`` (P, S) with their largest value at each of ``numbers`` (K,) of steps from ``origin`` (P,).

    Returns:
        steps (P, K) in ``dtype``, codes (P, K, S), and (P, K) whether they give ``x`` back.
    """
    away = (x.double() - origin.double()[:, None])[:, None]  # (P, 1, S)
    level = (away / (away.abs().amax(2) / numbers)[..., None]).round()
    # every value and product was rounded, which leaves the step an interval: take the middle of what all of them leave
    rounded = torch.finfo(target).eps * x.double().abs()[:, None] + torch.finfo(torch.float32).eps * away.abs()
    step, slack = away / level, rounded / 2 / level.abs()
    low = torch.where(level != 0, step - slack, -torch.inf).amax(2)
    high = torch.where(level != 0, step + slack, torch.inf).amin(2)
    middle, wide, levels = ((low + high) / 2).to(dtype), origin[:, None, None], level.float()
    found, fits = middle, torch.zeros(middle.shape, dtype=torch.bool)
    for toward in (0.0, torch.inf, -torch.inf):
        candidate = middle if toward == 0 else torch.nextafter(middle, torch.full_like(middle, toward))
        scale = candidate.float()[..., None]
        # as the formats compute: step times code, plus the minimum, in single precision
        back = torch.addcmul(wide, levels, scale) if minima else levels * scale
        right = (back.to(target).float() == x[:, None]).all(2) & (candidate > 0) & (levels.abs().amax(2) <= 255)
        found, fits = torch.where(right & ~fits, candidate, found), fits | right
    return found, levels, fits


def _steps(x: Tensor, target: torch.dtype, dtype: torch.dtype, *, minima: bool, tried: list[int]) -> _Steps:
    """The first grid that holds each group of ``x`` (P, S), float32 values as a checkpoint of ``target`` holds them.

    Args:
        x: (P, S).
        target: dtype in which the values must come back.
        dtype: of the steps and minima.
        minima: count from the smallest value, not from zero.
        tried: numbers of steps from the origin to the largest value, in the order they are tried.
    """
    low = x.amin(1).to(dtype)
    origin = low.float() if minima else torch.zeros(len(x))
    step, count = torch.ones(len(x), dtype=dtype), torch.zeros(len(x), dtype=torch.int64)
    codes = torch.zeros(x.shape, dtype=torch.int16)
    # groups of one value are that value (or zero) with code 0
    plain = (x == origin[:, None]).all(1)
    count[plain] = 1
    for part in torch.split((~plain).nonzero()[:, 0], _CHUNK):
        left = part
        for number in tried:
            if not len(left):
                break
            made, level, fits = _tried(x[left], origin[left], torch.tensor([number]), target, dtype, minima=minima)
            chosen = left[fits[:, 0]]
            step[chosen], count[chosen] = made[fits[:, 0], 0], number
            codes[chosen] = level[fits[:, 0], 0].to(torch.int16)
            left = left[~fits[:, 0]]
    return _Steps(step, low if minima else None, codes, count)


def _plausible(x: Tensor, target: torch.dtype, dtype: torch.dtype, *, minima: bool, most: int) -> bool:
    """Whether each of a few groups (P, S) lies on some grid."""
    origin = x.amin(1).to(dtype).float() if minima else torch.zeros(len(x))
    *_, fits = _tried(x, origin, torch.arange(1, most + 1), target, dtype, minima=minima)
    return bool((fits.any(1) | (x == origin[:, None]).all(1)).all())


def _grid(found: _Steps, rows: int, group_size: int | None, limit: int) -> tuple[Tensor, Grid] | None:
    """Codes (M, N) and the cheapest grid of at most ``limit`` bits that holds ``found``."""
    low, high = found.codes.amin(1).long(), found.codes.amax(1).long()  # (P,)
    shape = (rows, -1)
    whole = found.codes.view(rows, -1).long()
    if found.origin is not None:
        bits = int(high.max()).bit_length() or 1
        grid = Grid(bits, group_size, found.step.view(shape), found.origin.view(shape), "float")
        return (whole, grid) if bits <= limit else None
    # a grid without zero reaches one step further down than up: steps may be negative
    flip = -low < high
    down, up = torch.where(flip, -high, low), torch.where(flip, -low, high)
    symmetric = int(torch.maximum(-down - 1, up).clamp_min(0).max()).bit_length() + 1
    wide = int((high.clamp_min(0) - low.clamp_max(0)).max()).bit_length() or 1
    size = found.codes.shape[1]
    if symmetric <= limit and symmetric <= wide + wide / size:
        sign = torch.where(flip, -1, 1)
        codes = (found.codes.long() * sign[:, None]).view(rows, -1) + 2 ** (symmetric - 1)
        scale = (found.step * sign.to(found.step)).view(shape)
        return codes, Grid(symmetric, group_size, scale, None, "none")
    if wide > limit:
        return None
    zero = (-low).clamp(0, 2**wide - 1)
    codes = (found.codes.long() + zero[:, None]).view(rows, -1)
    return codes, Grid(wide, group_size, found.step.view(shape), zero.to(torch.uint8).view(shape), "integer")


@lever("quantize.regrid", reach="weight")
@dataclass(frozen=True, kw_only=True)
class Regrid:
    """Find the grid a matrix lies on already and store its codes: lossless, or refused."""

    group_size: int | None = option(None, at_least(1), "input features that share a scale; none: find it")
    bits: int = option(8, between(1, 8), "widest code to accept")
    entropy: bool = option(False, one_of(True, False), "range-code the codes; not of NF4")
    strict: bool = option(True, one_of(True, False), "refuse a matrix without a grid; false: leave it as it is")

    @torch.no_grad()
    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        """The same matrix, bit for bit in its own dtype.

        Raises:
            FormError: no grid, and ``strict``.
            OptionError: a group size that does not divide the row.
        """
        matrix = check_finite(matrix_of(weight, "quantize.regrid"), "quantize.regrid: matrix")
        columns = matrix.shape[1]
        if self.group_size is not None and columns % self.group_size:
            raise OptionError(f"quantize.regrid: group_size {self.group_size} does not divide {columns} inputs")
        target = weight.dense().dtype
        target = torch.float32 if target == torch.float64 else target
        sizes = [self.group_size] if self.group_size else [g for g in _GROUPS if columns % g == 0 and g < columns]
        offers = sorted(self._offers(matrix, target, [*sizes, columns] if not self.group_size else sizes), key=_rate)
        for _, size, dtype, minima, tried in offers:
            found = self._whole(matrix, target, size, dtype, minima, tried)
            if found is not None:
                return GridCoded.encode(found) if self.entropy else found
        for size in sizes:
            normal = _normal_float(matrix, target, size)
            if normal is not None and self.bits >= 4:
                return normal
        if not self.strict:
            return weight
        raise FormError(
            f"quantize.regrid: no grid of up to {self.bits} bits holds this {matrix.shape[0]}x{columns} matrix in "
            f"groups of {', '.join(map(str, sizes)) or columns}; round it with another lever, or give strict = false"
        )

    def _offers(
        self, matrix: Tensor, target: torch.dtype, sizes: list[int]
    ) -> Iterator[tuple[float, int, torch.dtype, bool, list[int]]]:
        """Bits a weight, group size, dtype, minima and numbers of steps of every grid that some of the rows lie on."""
        some = matrix[torch.linspace(0, len(matrix) - 1, min(_ROWS, len(matrix))).long()]
        most = 2**self.bits - 1
        for size, minima in product(sizes, (False, True)):
            groups = some.reshape(-1, size)
            few = groups[torch.linspace(0, len(groups) - 1, min(_FEW, len(groups))).long()]
            # beside 32-bit steps, whose products are rounded on the way, no format known stores minima
            for dtype in (torch.float16, torch.bfloat16) if minima else (torch.float16, torch.bfloat16, torch.float32):
                if not _plausible(few, target, dtype, minima=minima, most=most):
                    continue
                found = _steps(groups, target, dtype, minima=minima, tried=list(range(1, most + 1)))
                made = _grid(found, len(some), size, self.bits) if found.found else None
                if made is None:
                    continue
                grid = made[1]
                overhead = dtype.itemsize * 8 * (2 if minima else 1) + (grid.bits if grid.zero_kind == "integer" else 0)
                common = [number for number, _ in Counter(found.count.tolist()).most_common()]
                rest = [number for number in range(1, most + 1) if number not in common]
                yield grid.bits + overhead / size, size, dtype, minima, common + rest
                break  # wider steps hold the same, for more

    def _whole(
        self, matrix: Tensor, target: torch.dtype, size: int, dtype: torch.dtype, minima: bool, tried: list[int]
    ) -> Quantized | None:
        found = _steps(matrix.reshape(-1, size), target, dtype, minima=minima, tried=tried)
        made = _grid(found, len(matrix), size, self.bits) if found.found else None
        if made is None:
            return None
        codes, grid = made
        weight = Quantized.from_codes(codes.to(torch.uint8), grid)
        return weight if torch.equal(weight.dense().to(target).float(), matrix) else None


def _rate(offer: tuple[float, int, torch.dtype, bool, list[int]]) -> tuple[float, int]:
    return offer[0], offer[1]


def _normal_float(matrix: Tensor, target: torch.dtype, size: int) -> Codebook | None:
    """``matrix`` as NF4 in blocks of ``size``, if it is."""
    table = torch.tensor(NF4_VALUES)
    x = matrix.reshape(-1, size)
    largest = x.abs().amax(1)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    codes = torch.bucketize(x / scale[:, None], (table[1:] + table[:-1]) / 2)
    if not torch.equal((table[codes] * scale[:, None]).to(target).float(), x):
        return None
    held = scale.half() if torch.equal(scale.half().float(), scale) else scale
    return Codebook(
        pack(codes.view(matrix.shape), 4), table.view(1, 1, -1), Dense(held.view(len(matrix), -1)),
        bits=4, columns=matrix.shape[1], group_size=size,
    )  # fmt: skip
