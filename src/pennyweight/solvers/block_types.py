"""Grids that ggml stores in blocks: 32 entries of a row with a scale, or 256 whose scales share one in turn.

A matrix on such a grid is a `Quantized` weight. In the types that end in K its scales, and its minima, are `Quantized`
themselves: whole numbers of 4, 6 or 8 bits times one 16-bit number for each 256 entries. What is fitted and rounded to
here is therefore what a GGUF file holds, to the bit.

Scales are found in four steps, the objective the squared error weighted by the inputs' second moments: ranges are
searched group by group; the largest scale of 256 entries sets theirs; both levels of scales and the codes are then
settled in turn by least squares; and once the codes are, `refitted` fits the 16-bit numbers of a row together under
the whole second moment of the inputs.

Source: the block layouts of ggml (``ggml-common.h``). Differs from the source: how grids are fitted.

Shape letters: M out features, N in features, S entries of a group, G groups of a row, B 16-bit scales of a row, P
groups that share one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.weights import Dense
from pennyweight.weights.grid import Grid, grouped
from pennyweight.weights.quantized import Quantized

#: Entries of a row that share a 16-bit scale in the types that end in K.
SUPER = 256
_STARTS = (1.0, 0.93, 0.86)  # of the largest scale of 256 entries, tried as theirs
_ROUNDS = 4


@dataclass(frozen=True)
class BlockType:
    """How a type of block stores its entries.

    Attributes:
        name: as ggml calls it.
        bits: of a code.
        size: entries of a group.
        minimum: whether a group has one.
        format: of the codes, see `pennyweight.weights.grid`.
        scale_bits: of the scales of groups, whole numbers; 0 for 16-bit scales.
    """

    name: str
    bits: int
    size: int
    minimum: bool = False
    format: str = "integer"
    scale_bits: int = 0

    @property
    def span(self) -> int:
        """Entries of a row that no block divides."""
        return SUPER if self.scale_bits else self.size

    @property
    def scale_format(self) -> str:
        """Of the scales of groups: those beside minima have no sign."""
        return "unsigned" if self.minimum else "integer"

    @property
    def bits_per_weight(self) -> float:
        """With all scales and minima."""
        each = 2 if self.minimum else 1
        inner = self.scale_bits / self.size if self.scale_bits else 0.0
        return self.bits + each * (inner + 16 / self.span)


TYPES = {
    found.name: found
    for found in (
        BlockType("Q2_K", 2, 16, minimum=True, scale_bits=4),
        BlockType("Q3_K", 3, 16, scale_bits=6),
        BlockType("IQ4_NL", 4, 32, format="nl4"),
        BlockType("Q4_0", 4, 32),
        BlockType("Q4_K", 4, 32, minimum=True, scale_bits=6),
        BlockType("Q4_1", 4, 32, minimum=True),
        BlockType("Q5_0", 5, 32),
        BlockType("Q5_K", 5, 32, minimum=True, scale_bits=6),
        BlockType("Q5_1", 5, 32, minimum=True),
        BlockType("Q6_K", 6, 16, scale_bits=8),
        BlockType("Q8_0", 8, 32),
    )
}


def fit(kind: BlockType, matrix: Tensor, importance: Tensor | None, *, search: int) -> Grid:
    """The grid of ``kind`` for ``matrix`` (M, N), its scales as they are stored.

    Args:
        kind: its ``span`` divides N.
        matrix: (M, N) float32.
        importance: (N,), how much the squared error of an input counts.
        search: ranges tried for each group.
    """
    assert matrix.shape[1] % kind.span == 0, (kind.name, matrix.shape)
    inner = Grid.fit(
        matrix, bits=kind.bits, group_size=kind.size, symmetric=not kind.minimum, zero_kind="float",
        format=kind.format, importance=importance, search=search,
        scale_dtype=torch.float32 if kind.scale_bits else torch.float16,
    )  # fmt: skip
    if not kind.scale_bits:
        if kind.format != "nl4":
            return inner
        empty = matrix.reshape(len(matrix), -1, kind.size).abs().amax(-1) == 0  # its table has no level of nothing
        return replace(inner, scale=torch.where(empty, torch.finfo(torch.float16).smallest_normal, inner.scale))
    weight = None if importance is None else importance.detach().float().expand_as(matrix)
    fitting = _Shared(kind, *grouped(matrix, weight, kind.size))
    return _grid(kind, *fitting.best(inner.scale, inner.zero))


def _grid(kind: BlockType, d: Tensor, scale: Tensor, m: Tensor | None, minimum: Tensor | None) -> Grid:
    """The grid of 16-bit ``d``, ``m`` (M, B) and whole numbers ``scale``, ``minimum`` (M, G)."""

    def held(outer: Tensor, whole: Tensor, format: str) -> Quantized:
        codes = whole + (0 if format == "unsigned" else 2 ** (kind.scale_bits - 1))
        inner = Grid(kind.scale_bits, SUPER // kind.size, outer.to(torch.float16), None, "none", format)
        return Quantized.from_codes(codes.to(torch.uint8), inner)

    scales = held(d, scale, kind.scale_format)
    zeros = None if m is None or minimum is None else held(-m, minimum, "unsigned")
    return Grid(
        kind.bits, kind.size, scales.dense().detach(), None if zeros is None else zeros.dense().detach(),
        "none" if zeros is None else "float", kind.format, scales, zeros,
    )  # fmt: skip


class _Shared:
    """Two levels of scales, settled in turn. Entries and weights are (M, B, P, S), whole numbers (M, B, P)."""

    def __init__(self, kind: BlockType, x: Tensor, weight: Tensor) -> None:
        shared = SUPER // kind.size
        self.kind = kind
        self.x = x.reshape(x.shape[0], -1, shared, kind.size)
        self.weight = weight.reshape(self.x.shape)
        top = 2**kind.scale_bits
        # a scale of nothing would make every code as good: the smallest is one
        self.least: int = 1 if kind.minimum else -(top // 2)
        self.most: int = top - 1 if kind.minimum else top // 2 - 1

    def best(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The 16-bit numbers (M, B) and whole numbers (M, G) of least error, from free scales and minima (M, G)."""
        scale = scale.reshape(self.x.shape[:3])
        minimum = None if zero is None else -zero.reshape(scale.shape).clamp_max(0)
        found: list[Tensor | None] = [None] * 4
        loss = torch.full(scale.shape[:2], torch.inf)
        for start in _STARTS:
            d = self._outer(scale, start)
            m = None if minimum is None else self._outer(minimum, start)
            whole, low = self._whole(scale, d), None if minimum is None or m is None else self._low(minimum, m)
            for _ in range(_ROUNDS):
                level = self._levels(d, whole, m, low)
                now = self._loss(level, d, whole, m, low)
                better = now < loss
                loss = torch.where(better, now, loss)
                for index, held in enumerate((d, whole, m, low)):
                    if held is not None:
                        old = found[index]
                        chosen = better if held.ndim == 2 else better[..., None]
                        found[index] = held if old is None else torch.where(chosen, held, old)
                d, m = self._refit_outer(level, d, whole, m, low)
                whole, low = self._refit_whole(level, d, m, whole, low)
        d, whole, m, low = found  # type: ignore[assignment]  # _STARTS is not empty
        assert d is not None
        assert whole is not None
        rows = len(whole)
        return d, whole.reshape(rows, -1), m, None if low is None else low.reshape(rows, -1)

    def _outer(self, held: Tensor, share: float) -> Tensor:
        """(M, B) 16-bit scale of the scales ``held``; the largest of them in size is met where ``share`` is one."""
        low, high = held.amin(-1), held.amax(-1)
        largest = torch.where(-low > high, low, high)
        return self._stored(share * largest / (self.most if self.kind.minimum else self.least))

    def _stored(self, outer: Tensor) -> Tensor:
        """As 16 bits hold it, never nothing."""
        tiny = torch.finfo(torch.float16).smallest_normal
        held = outer.to(torch.float16).float().clamp(-65504.0, 65504.0)
        return torch.where(held.abs() < tiny, torch.full_like(held, tiny).copysign(outer), held)

    def _whole(self, scale: Tensor, d: Tensor) -> Tensor:
        whole = (scale / d[..., None]).round().clamp(self.least, self.most)
        return torch.where(whole == 0, torch.ones_like(whole), whole)

    def _low(self, minimum: Tensor, m: Tensor) -> Tensor:
        return (minimum / m[..., None]).round().clamp(0, 2**self.kind.scale_bits - 1)

    def _levels(self, d: Tensor, whole: Tensor, m: Tensor | None, low: Tensor | None) -> Tensor:
        step = (d[..., None] * whole)[..., None]
        x = self.x if m is None or low is None else self.x + (m[..., None] * low)[..., None]
        least = 0 if self.kind.minimum else -(2 ** (self.kind.bits - 1))
        return (x / step).round_().clamp_(least, least + 2**self.kind.bits - 1)

    def _loss(self, level: Tensor, d: Tensor, whole: Tensor, m: Tensor | None, low: Tensor | None) -> Tensor:
        off = self.x - (d[..., None] * whole)[..., None] * level
        if m is not None and low is not None:
            off += (m[..., None] * low)[..., None]
        return (self.weight * off.square()).sum((-1, -2))

    def _refit_outer(
        self, level: Tensor, d: Tensor, whole: Tensor, m: Tensor | None, low: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Least squares for the 16-bit numbers, codes and whole numbers held."""
        first = whole[..., None] * level
        a = (self.weight * first * first).sum((-1, -2))
        p = (self.weight * first * self.x).sum((-1, -2))
        if m is None or low is None:
            return self._stored(torch.where(a > 0, p / a, d)), None
        second = low[..., None].expand_as(first)
        b = (self.weight * second * second).sum((-1, -2))
        c = (self.weight * first * second).sum((-1, -2))
        q = (self.weight * second * self.x).sum((-1, -2))
        rest = a * b - c * c
        sound = rest > 1e-6 * a * b
        new = self._stored(torch.where(sound, (p * b - q * c) / rest, d))
        # the minimum belongs to the scale as stored
        other = torch.where(b > 0, (new * c - q) / b, m)
        return new, self._stored(torch.where(other > 0, other, m))

    def _refit_whole(
        self, level: Tensor, d: Tensor, m: Tensor | None, whole: Tensor, low: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Least squares for the scale and minimum of each group, codes held, rounded to whole numbers."""
        weighted = self.weight * level
        if m is None or low is None:
            square = (weighted * level).sum(-1)
            found = (weighted * self.x).sum(-1) / square
            return self._whole(torch.where(square > 0, found, d[..., None] * whole), d), None
        total = self.weight.sum(-1)
        level_mean, x_mean = weighted.sum(-1) / total, (self.weight * self.x).sum(-1) / total
        offset = level - level_mean[..., None]
        spread = (self.weight * offset * offset).sum(-1)
        slope = (self.weight * offset * (self.x - x_mean[..., None])).sum(-1) / spread
        new = self._whole(torch.where(spread > 0, slope, d[..., None] * whole), d)
        return new, self._low(d[..., None] * new * level_mean - x_mean, m)


def refitted(
    kind: BlockType, matrix: Tensor, codes: Tensor, grid: Grid, moment: Tensor, *, damping: float = 1e-3
) -> Grid:
    """``grid`` with the 16-bit numbers of each row fitted together, by least squares under ``moment``, codes held.

    Args:
        kind: of the grid.
        matrix: (M, N) what the codes stand for.
        codes: (M, N) uint8.
        grid: that the codes are on.
        moment: (N, N) second moment of the inputs; the objective is ``tr(D H D^T)``, each row for itself.
        damping: how firmly the numbers are held where they were, as a share of each one's own curvature.
    """
    rows, width = matrix.shape
    plain = Grid(kind.bits, kind.size, torch.ones_like(grid.scale), None, "none", kind.format)
    level = codes.float() if kind.minimum else plain.values(codes)
    low: Tensor | None = None
    if kind.scale_bits:
        outer = [_outer_of(grid.stored_scale)]
        level = level * (grid.scale / outer[0].repeat_interleave(SUPER // kind.size, 1)).repeat_interleave(kind.size, 1)
        if kind.minimum:
            assert grid.zero is not None
            outer.append(_outer_of(grid.stored_zero))
            low = grid.zero / outer[1].repeat_interleave(SUPER // kind.size, 1)
            low = low.round().repeat_interleave(kind.size, 1)
    else:
        outer = [grid.scale.float()]
        if kind.minimum:
            assert grid.zero is not None
            outer.append(grid.zero.float())
            low = torch.ones_like(level)
    parts = [level] if low is None else [level, low]
    count = width // kind.span
    gram = level.new_empty(rows, len(parts) * count, len(parts) * count)
    rest = torch.zeros_like(gram[..., 0])
    off = matrix - sum((p * o.repeat_interleave(kind.span, 1) for p, o in zip(parts, outer, strict=True)))
    for index, part in enumerate(parts):
        for block in range(count):
            span = slice(block * kind.span, (block + 1) * kind.span)
            seen = part[:, span] @ moment[span]  # (M, N)
            at = index * count + block
            rest[:, at] = (seen * off).sum(1)
            for other, entries in enumerate(parts):
                sums = (seen * entries).view(rows, count, kind.span).sum(-1)
                gram[:, at, other * count : (other + 1) * count] = sums
    curve = gram.diagonal(dim1=1, dim2=2)
    curve.add_(damping * curve + 1e-20 * curve.amax(1, keepdim=True) + torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(gram)
    step = torch.cholesky_solve(rest[..., None], factor)[..., 0]
    steps = torch.split(torch.where((failed == 0)[:, None] & step.isfinite(), step, 0.0), count, dim=1)
    new = [_kept(o, s) for o, s in zip(outer, steps, strict=True)]
    if not kind.scale_bits:
        return replace(grid, scale=new[0], zero=new[1] if kind.minimum else None)
    held = [_with_scale(grid.stored_scale, new[0])]
    if kind.minimum:
        held.append(_with_scale(grid.stored_zero, new[1]))
    return replace(
        grid, scale=held[0].dense().detach(), zero=held[1].dense().detach() if kind.minimum else None,
        stored_scale=held[0], stored_zero=held[1] if kind.minimum else None,
    )  # fmt: skip


def _outer_of(held: object) -> Tensor:
    """The 16-bit numbers inside ``held``, in float32."""
    assert isinstance(held, Quantized)
    return held.scale.dense().detach().float()


def _kept(outer: Tensor, step: Tensor) -> Tensor:
    """``outer + step`` in 16 bits, or ``outer`` where that turns its sign or leaves their range."""
    new = (outer + step).to(torch.float16)
    sound = torch.isfinite(new) & (new.float() * outer > 0) & (new.abs() > torch.finfo(torch.float16).smallest_normal)
    return torch.where(sound, new, outer.to(torch.float16))


def _with_scale(held: object, outer: Tensor) -> Quantized:
    assert isinstance(held, Quantized)
    return Quantized(
        held.packed, Dense(outer), bits=held.bits, columns=held.shape[1], group_size=held.group_size, format=held.format
    )


def chosen_rows(first: Tensor, one: Grid, other: Grid) -> Grid:
    """The grid with the rows of ``one`` where ``first`` (M,), those of ``other`` elsewhere."""

    def mixed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.where(first[:, None], a, b)

    def held(a: object, b: object) -> Quantized | None:
        if a is None or b is None:
            return None
        assert isinstance(a, Quantized)
        assert isinstance(b, Quantized)
        packed = mixed(a.packed, b.packed)
        outer = mixed(a.scale.dense().detach(), b.scale.dense().detach())
        assert packed is not None
        assert outer is not None
        return _with_scale(
            Quantized(
                packed, a.scale, bits=a.bits, columns=a.shape[1], group_size=a.group_size, format=a.format
            ), outer
        )  # fmt: skip

    scale = mixed(one.scale, other.scale)
    assert scale is not None
    return replace(
        one, scale=scale, zero=mixed(one.zero, other.zero), stored_scale=held(one.stored_scale, other.stored_scale),
        stored_zero=held(one.stored_zero, other.stored_zero),
    )  # fmt: skip
