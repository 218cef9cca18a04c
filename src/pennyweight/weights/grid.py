"""The grid of a quantized matrix: which values its codes stand for, and how to fit it.

A matrix is cut along its rows into groups that share one scale (and one zero). With ``level`` the value of a code:

=============  ==========================  =====================================
``zero_kind``  the matrix                  ``level(code)``
=============  ==========================  =====================================
``none``       ``scale * level``           ``code - 2**(bits - 1)`` (symmetric)
``integer``    ``scale * (level - zero)``  ``code``
``float``      ``scale * level + zero``    ``code`` (zero is the minimum)
=============  ==========================  =====================================

Formats ``e4m3``, ``e5m2`` (OCP FP8: P. Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433) and
``e2m1`` (OCP Microscaling, FP4) and ``e3m0`` (powers of two) have the floating-point value of the code's bit pattern as
level; ``nl4`` has the sixteen levels of the IQ4_NL blocks of ggml, denser about zero; ``unsigned`` has the code itself,
for matrices without negative values such as the scales of another grid.

Shape letters: M out features, N in features, G groups of a row, S features of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from pennyweight.errors import FormError, OptionError, ShapeError
from pennyweight.weights.weight import Weight, check_finite

ZeroKind = Literal["none", "integer", "float"]
#: exponent bits, mantissa bits, and whether the largest exponent is spent on infinities (IEEE) or not (OCP "fn").
_FLOATS: dict[str, tuple[int, int, bool]] = {
    "e4m3": (4, 3, False),
    "e5m2": (5, 2, True),
    "e2m1": (2, 1, False),
    "e3m0": (3, 0, False),
    "nl4": (2, 1, False),  # as wide as e2m1; its levels are listed
}
#: Levels in order of the codes, where no bit pattern says them.
_TABLES = {"nl4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)}
FORMATS = ("integer", "unsigned", *_FLOATS)


@cache
def float_levels(format: str) -> Tensor:
    """The value of every bit pattern of a floating-point ``format``, (2**bits,) float32, NaN and infinity included."""
    if format in _TABLES:
        return torch.tensor(_TABLES[format], dtype=torch.float32)
    exponent_bits, mantissa_bits, has_infinity = _FLOATS[format]
    code = torch.arange(2 ** (1 + exponent_bits + mantissa_bits))
    sign = 1.0 - 2.0 * (code >> (exponent_bits + mantissa_bits)).double()
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = (code & (2**mantissa_bits - 1)).double() / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    normal = (1 + mantissa) * torch.exp2((exponent - bias).double())
    subnormal = mantissa * 2.0 ** (1 - bias)
    value = sign * torch.where(exponent > 0, normal, subnormal)
    last = exponent == 2**exponent_bits - 1
    if has_infinity:
        value[last] = torch.where(mantissa[last] > 0, torch.nan, sign[last] * torch.inf)
    elif format == "e4m3":  # "fn": only the all-ones pattern is lost, to NaN
        value[last & (mantissa == mantissa.max())] = torch.nan
    return value.float()


@cache
def _sorted_levels(format: str) -> tuple[Tensor, Tensor]:
    """The finite levels in increasing order, and their codes; of the two zeros, the positive one."""
    levels = float_levels(format)
    half = levels.numel() // 2
    usable = torch.isfinite(levels)
    usable[half] = format in _TABLES  # else minus zero
    codes = usable.nonzero()[:, 0]
    order = levels[codes].argsort()
    return levels[codes][order], codes[order]


@cache
def _codes_of_halves(format: str) -> Tensor:
    """(512,) uint8: the nearest code for numbers from k / 2 up to (k + 1) / 2, k from -256."""
    ordered, codes = _sorted_levels(format)
    middle = (ordered[1:] + ordered[:-1]) / 2
    return codes[torch.bucketize(torch.arange(-256, 256) / 2, middle, right=True)].to(torch.uint8)


def check_format(format: str, bits: int, zero_kind: str, where: str) -> None:
    """Refuse what no grid can be, in words."""
    if format not in FORMATS:
        raise OptionError(f"{where}: unknown format {format!r}; give one of {', '.join(FORMATS)}")
    if zero_kind not in ("none", "integer", "float"):
        raise OptionError(f"{where}: unknown zero_kind {zero_kind!r}; give none, integer or float")
    if format in _FLOATS and bits != 1 + sum(_FLOATS[format][:2]):
        raise OptionError(f"{where}: format {format} has {1 + sum(_FLOATS[format][:2])} bits, not {bits}")
    if not 1 <= bits <= 8:
        raise OptionError(f"{where}: {bits} bits; give 1 to 8 (16 bits are a Dense weight)")
    if format != "integer" and zero_kind != "none":
        raise OptionError(f"{where}: format {format} takes no zero; give symmetric=True or format='integer'")


def group_count(columns: int, group_size: int | None) -> int:
    """Groups in a row of ``columns``; the last one may be shorter."""
    return 1 if group_size is None else -(-columns // group_size)


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of a quantized matrix, already rounded as they are stored.

    Attributes:
        bits: bits of a code, 1 to 8.
        group_size: input features that share a scale, or None for the whole row.
        scale: (M, G), or (1, 1) for one scale in all.
        zero: the shape of ``scale``, or None.
        zero_kind: what ``zero`` means, see the module's text.
        format: what a code means.
        stored_scale, stored_zero: the weights that hold ``scale`` and ``zero`` where they are compact themselves.
    """

    bits: int
    group_size: int | None
    scale: Tensor
    zero: Tensor | None
    zero_kind: ZeroKind
    format: str = "integer"
    stored_scale: Weight | None = None
    stored_zero: Weight | None = None

    @classmethod
    def fit(
        cls,
        matrix: Tensor,
        *,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = False,
        zero_kind: ZeroKind = "integer",
        format: str = "integer",
        importance: Tensor | None = None,
        search: int = 0,
        scale_dtype: torch.dtype = torch.float16,
        per_tensor: bool = False,
    ) -> Grid:
        """The grid for ``matrix``.

        Args:
            matrix: (M, N).
            bits: 1 to 8.
            group_size: input features that share a scale; None for the whole row. The last group may be shorter.
            symmetric: no zero; the value of largest magnitude is exact (the scale takes its sign).
            zero_kind: "integer" or "float"; the range of integer zeros always holds 0.
            format: one of `FORMATS`; all but "integer" are without a zero.
            importance: (N,) or (M, N), how much the squared error of an entry counts.
            search: 0 takes the range from minimum to maximum. Otherwise as many smaller ranges are tried, each
                followed by a weighted least-squares refit of scale and float zero, and each group keeps its best.
            scale_dtype: dtype that scales and float zeros are stored in.
            per_tensor: one scale and zero for the whole matrix; ``group_size`` must be None.

        Raises:
            OptionError: bits, format, zero_kind, group_size or search that do not go together.
            ShapeError: ``importance`` does not fit ``matrix``.
            FormError: NaN or infinity, or a scale beyond ``scale_dtype``.
        """
        kind: ZeroKind = "none" if symmetric or format != "integer" else zero_kind
        check_format(format, bits, kind, "Grid.fit")
        if matrix.ndim != 2:
            raise ShapeError(f"Grid.fit: a tensor of shape {tuple(matrix.shape)} is not a matrix; give (out, in)")
        if group_size is not None and (group_size < 1 or per_tensor):
            raise OptionError(f"Grid.fit: group_size {group_size}; give at least 1, or None with per_tensor")
        if search < 0:
            raise OptionError(f"Grid.fit: search {search}; give 0 (minimum to maximum) or more")
        check_finite(matrix, "Grid.fit: matrix")
        x = matrix.detach().float()
        weight = check_importance(importance, x, "Grid.fit")
        if per_tensor:
            x = x.reshape(1, -1)
            weight = None if weight is None else weight.expand(matrix.shape).reshape(1, -1)
        groups, weights = grouped(x, weight, group_size)
        fitting = _Fit(bits, kind, format, scale_dtype, groups, weights)
        scale, zero = fitting.range(1.0)
        if search:
            scale, zero = fitting.search(search, scale, zero)
        stored_zero = zero if zero is None or kind == "float" else zero.to(torch.uint8)
        return cls(bits, group_size, scale, stored_zero, kind, format)

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.scale.shape[1]

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of columns ``start`` to ``stop``, expanded to (M, stop - start) float32."""
        zero = None if self.zero is None else self._expanded(_wide(self.zero), start, stop)
        return self._expanded(_wide(self.scale), start, stop), zero

    def _expanded(self, held: Tensor, start: int, stop: int) -> Tensor:
        if self.group_size is None:
            return held.expand(-1, stop - start)
        first = start // self.group_size
        part = held[:, first : -(-stop // self.group_size)]
        # a copied expansion: five times faster than an index of columns
        wide = part[..., None].expand(-1, -1, self.group_size).reshape(held.shape[0], part.shape[1] * self.group_size)
        return wide[:, start - first * self.group_size : stop - first * self.group_size]

    def codes(self, matrix: Tensor, start: int = 0) -> Tensor:
        """The nearest codes, uint8 of the shape of ``matrix``, which begins at column ``start``."""
        scale, zero = self._spread(matrix.shape[1], start)
        x = _split(_wide(matrix), scale)
        return _codes(x, scale, zero, self.bits, self.zero_kind, self.format).reshape(matrix.shape)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and offset (M, G) float32 with ``W = scale * code + offset``, for the formats of whole numbers."""
        assert self.format in ("integer", "unsigned"), self.format
        scale = self.scale.float()
        if self.zero_kind == "float":
            assert self.zero is not None
            return scale, self.zero.float()
        zero = 0.0 if self.format == "unsigned" else 2.0 ** (self.bits - 1)
        return scale, -scale * (zero if self.zero is None else self.zero.float())

    def values(self, codes: Tensor, start: int = 0) -> Tensor:
        """The entries that ``codes`` stand for, float32 of their shape; they begin at column ``start``."""
        scale, zero = self._spread(codes.shape[1], start)
        level = _levels(_split(codes, scale), zero, self.bits, self.zero_kind, self.format)
        return _entries(level, scale, zero, self.zero_kind).reshape(codes.shape)

    def _times(self, entries: Tensor) -> Tensor:
        scale, _ = self._spread(entries.shape[1], 0)
        return _entries(_split(entries, scale), scale, None, "none").reshape(entries.shape)

    def _spread(self, width: int, start: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero that broadcast against the output of `_split`: by group where groups fit, else by column."""
        if self.group_size is None:
            return _wide(self.scale), None if self.zero is None else _wide(self.zero)
        if start == 0 and width == self.groups * self.group_size:
            return _wide(self.scale)[..., None], None if self.zero is None else _wide(self.zero)[..., None]
        return self.columns(start, start + width)


def scaled(entries: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    """``entries`` (M, N), each times the ``scale`` (M, G) of its group; at least float32."""
    return Grid(8, group_size, scale, None, "none")._times(entries)


def _split(entries: Tensor, scale: Tensor) -> Tensor:
    if scale.ndim == 2:
        return entries
    rows, columns = entries.shape
    return entries.reshape(rows, scale.shape[1], columns // scale.shape[1])


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: 16-bit products would add an error of their own."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _levels(codes: Tensor, zero: Tensor | None, bits: int, kind: str, format: str) -> Tensor:
    if format in _FLOATS:
        return float_levels(format).to(codes.device)[codes.int()]
    level = codes.to(torch.float32)
    if kind == "integer":
        assert zero is not None
        return level - zero
    return level - 2 ** (bits - 1) if kind == "none" and format == "integer" else level


def _entries(level: Tensor, scale: Tensor, zero: Tensor | None, kind: str) -> Tensor:
    if kind != "float":
        return level * scale
    assert zero is not None
    return torch.addcmul(zero, level, scale)


def _codes(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, format: str) -> Tensor:
    # a scale of zero (a doubly quantized one may be) says that the whole group is its zero: any code is as good
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    if kind == "float":
        assert zero is not None
        x = x - zero
    level = x / step
    if format in _FLOATS:
        return _nearest_float(level, format)
    if kind == "integer":
        assert zero is not None
        level = level.round() + zero
    elif kind == "none" and format == "integer":
        level = level + 2 ** (bits - 1)
    return level.round().clamp(0, 2**bits - 1).to(torch.uint8)


def _nearest_float(level: Tensor, format: str) -> Tensor:
    """Round to the nearest value of ``format``, ties to the even pattern, beyond the largest to the largest.

    Levels of a table are whole numbers of a byte: every half of one has its code listed, ties upward.
    """
    if format in _TABLES:
        listed = _codes_of_halves(format).to(level.device)
        return listed[(2 * level).floor_().clamp_(-256, 255).add_(256).int()]
    ordered, codes = (t.to(level.device) for t in _sorted_levels(format))
    middle = (ordered[1:] + ordered[:-1]) / 2
    low = torch.bucketize(level, middle)
    high = torch.bucketize(level, middle, right=True)  # differs from `low` on ties alone
    return torch.where(codes[low] % 2 == 0, codes[low], codes[high]).to(torch.uint8)


def check_importance(importance: Tensor | None, x: Tensor, where: str) -> Tensor | None:
    """``importance`` as float32 of the shape of ``x`` (M, N), or an error that says what is wrong with it."""
    if importance is None:
        return None
    if importance.shape not in (x.shape, x.shape[1:]):
        raise ShapeError(
            f"{where}: importance of shape {tuple(importance.shape)} for a matrix {tuple(x.shape)}; "
            f"give ({x.shape[1]},) or {tuple(x.shape)}"
        )
    check_finite(importance, f"{where}: importance")
    if bool((importance < 0).any()):
        raise FormError(f"{where}: importance has negative entries; give weights of a squared error, at least 0")
    return importance.detach().float().expand_as(x)


def grouped(x: Tensor, weight: Tensor | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    """(M, G, S) entries and weights; a short last group is filled with its own last entry, at weight zero."""
    count = group_count(x.shape[1], group_size)
    size = x.shape[1] if group_size is None else group_size
    missing = count * size - x.shape[1]
    weight = torch.ones_like(x) if weight is None else weight
    if missing:
        x = torch.cat([x, x[:, -1:].expand(-1, missing)], dim=1)
        weight = torch.cat([weight, weight.new_zeros(weight.shape[0], missing)], dim=1)
    weight = weight.reshape(-1, count, size)
    # a group that nothing depends on is still fitted, to all of its entries alike
    real = (torch.arange(count * size, device=x.device) < count * size - missing).to(x).view(count, size)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, real)
    return x.reshape(-1, count, size), weight / weight.amax(-1, keepdim=True)


@dataclass(frozen=True)
class _Fit:
    """The fit of every group at once; x and weight are (M, G, S), scales and zeros (M, G)."""

    bits: int
    kind: ZeroKind
    format: str
    dtype: torch.dtype
    x: Tensor
    weight: Tensor

    def range(self, factor: float) -> tuple[Tensor, Tensor | None]:
        """The grid that spans ``factor`` of the range of each group; a negative factor turns a symmetric one over."""
        low, high = self.x.amin(-1), self.x.amax(-1)
        if self.kind == "none":
            largest = torch.where(-low > high, low, high)  # with its sign
            if self.format == "integer":
                return self.rounded(factor * largest / -(2 ** (self.bits - 1))), None
            if self.format == "unsigned":
                return self.rounded(factor * high.clamp_min(0) / (2**self.bits - 1)), None
            if self.format in _TABLES:  # the first level is the largest, as that of whole numbers is
                return self.rounded(factor * largest / _TABLES[self.format][0]), None
            scale = factor * largest.abs() / float(_sorted_levels(self.format)[0][-1])
            # a subnormal scale has few digits left, and these formats resolve small values as well as large ones:
            # raise it by powers of two, which keeps the largest value on a level
            octaves = (torch.finfo(self.dtype).smallest_normal / scale).log2().ceil().clamp_min(0)
            return self.rounded(torch.where(scale > 0, scale * octaves.exp2(), scale)), None
        if self.kind == "integer":
            low, high = factor * low.clamp_max(0), factor * high.clamp_min(0)
            scale = self.rounded((high - low) / (2**self.bits - 1))
            return scale, (-low / scale.float()).round().clamp(0, 2**self.bits - 1)
        middle, half = (low + high) / 2, factor * (high - low) / 2
        return self.rounded(2 * half / (2**self.bits - 1)), self.rounded_zero(middle - half)

    def search(self, steps: int, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The best grid of each group over ``steps`` ranges, refitted; never worse than the one given."""
        best = self.loss(scale, zero)
        for factor in self._factors(steps):
            tried = self.refit(*self.range(factor))
            loss = self.loss(*tried)
            better = loss < best
            best = torch.where(better, loss, best)
            scale = torch.where(better, tried[0], scale)
            zero = None if zero is None or tried[1] is None else torch.where(better, tried[1], zero)
        return scale, zero

    def _factors(self, steps: int) -> Iterator[float]:
        # the fewer the levels, the more of the range is worth giving up: Gaussian groups of 64 like 0.4 of it at 2
        # bits and 0.8 at 4; the smallest factor leaves room below that
        smallest = max(0.2, 1 - 1.3 / self.bits) if self.format not in _FLOATS else 0.5
        both = self.kind == "none" and (self.format == "integer" or self.format in _TABLES)
        count = -(-steps // 2) if both else steps
        for index in range(steps):
            place = index // 2 if both else index
            factor = 1 - (1 - smallest) * place / max(1, count - 1)
            yield -factor if both and index % 2 else factor

    def refit(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weighted least squares for the scale (and a float zero) with the codes held."""
        level = self._level(scale, zero)
        x, weighted = self.x, self.weight * level
        if self.kind != "float":
            square = (weighted * level).sum(-1)
            found = (weighted * x).sum(-1) / square
            return self.rounded(torch.where(square > 0, found, scale.float())), zero
        assert zero is not None
        # 2 x 2 normal equations, about the means: no cancellation where the levels lie far from zero
        total = self.weight.sum(-1)
        level_mean, x_mean = weighted.sum(-1) / total, (self.weight * x).sum(-1) / total
        offset = level - level_mean[..., None]
        spread = (self.weight * offset * offset).sum(-1)
        slope = (self.weight * offset * (x - x_mean[..., None])).sum(-1) / spread
        new = self.rounded(torch.where(spread > 0, slope, scale.float()))
        # the zero belongs to the scale as stored, so that one rounding repairs part of the other
        return new, self.rounded_zero(x_mean - new.float() * level_mean)

    def loss(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """(M, G) weighted squared error with the nearest codes."""
        entries = _entries(
            self._level(scale, zero),
            _wide(scale)[..., None],
            None if zero is None else _wide(zero)[..., None],
            self.kind,
        )
        return (self.weight * (self.x - entries).square()).sum(-1)

    def _level(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        wide, wide_zero = _wide(scale)[..., None], None if zero is None else _wide(zero)[..., None]
        codes = _codes(self.x, wide, wide_zero, self.bits, self.kind, self.format)
        return _levels(codes, wide_zero, self.bits, self.kind, self.format)

    def rounded(self, scale: Tensor) -> Tensor:
        """``scale`` as stored; one for groups that are all zero, and never rounded away to zero."""
        stored = self.rounded_zero(scale)
        tiny = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        lost = (stored == 0) & (scale != 0)
        stored = torch.where(lost, torch.where(scale < 0, -tiny, tiny).to(stored), stored)
        return torch.where(scale == 0, torch.ones_like(stored), stored)

    def rounded_zero(self, zero: Tensor) -> Tensor:
        stored = zero.to(self.dtype)
        if not bool(torch.isfinite(stored).all()):
            largest = float(zero.abs().max())
            raise FormError(
                f"Grid.fit: a scale or zero of {largest:.4g} is beyond {self.dtype}; give another scale_dtype"
            )
        return stored
