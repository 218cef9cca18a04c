"""TIES: trim what each model adds, elect a sign for each element, average those that agree.

Row 95. Source: P. Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708.
Differs from the source: differences are trimmed tensor by tensor, as mergekit does, not over the whole model; those
equal to the smallest kept one are all kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pennyweight.lever import ANY, between, option
from pennyweight.merge.formula import Formula, Rule, Span, Stretched, elected_mean


@dataclass(frozen=True, kw_only=True)
class Ties(Formula):
    """``base + scale * (mean of the deltas that are among the largest of their model and have the elected sign)``."""

    density: float = option(0.2, between(0, 1), "share of each model's differences that is kept, the largest")
    scale: float = option(1.0, ANY, "of the mean difference")

    def prepare(self, tensor: Stretched) -> Rule:
        least = None
        if self.density < 1:
            keep = max(1, int(self.density * prod(tensor.shape)))  # a tensor is never trimmed to nothing
            least = nth_largest(lambda: (span.deltas()[1].abs_() for span in tensor.spans()), keep)

        def rule(span: Span) -> Tensor:
            base, deltas = span.deltas()
            if least is not None:
                trim(deltas, deltas.abs(), least)
            return elected_mean(deltas, self.shares(len(deltas))).mul_(self.scale).add_(base)

        return rule


def trim(deltas: Tensor, scores: Tensor, least: Sequence[float]) -> Tensor:
    """``deltas`` (E, n), zero where ``scores`` (E, n) are below the ``least`` of their model; in place."""
    for delta, score, bound in zip(deltas, scores, least, strict=True):
        delta.mul_(score >= bound)
    return deltas


_LOW = 15  # the bits of a float32 that the second walk tells apart; the first one sees exponent and upper mantissa


def nth_largest(walk: Callable[[], Iterator[Tensor]], nth: int) -> list[float]:
    """The exact ``nth`` largest number of each row, two walks over stretches (E, n) of float32 numbers of at least 0.

    Floats of one sign are ordered as their bits are: the first walk counts by the upper 16 bits, the second by the
    lower ones of those that share the upper bits of the one wanted. Memory does not grow with what is walked over.

    Args:
        walk: begins a walk; its stretches are only looked at.
        nth: 1 for the largest; 0 gives infinity.
    """
    if nth < 1:
        return [torch.inf] * len(next(walk()))
    upper: Tensor | None = None
    for values in walk():
        counts = torch.stack([_count(bits >> _LOW, 1 << (31 - _LOW)) for bits in values.view(torch.int32)])
        upper = counts if upper is None else upper.add_(counts)
    assert upper is not None
    bins, left = zip(*(_place(row, nth) for row in upper), strict=True)
    lower = torch.zeros(len(bins), 1 << _LOW, dtype=torch.int64)
    for values in walk():
        for counted, bits, bin in zip(lower, values.view(torch.int32), bins, strict=True):
            begin = bin << _LOW
            inside = bits[(bits >= begin) & (bits <= begin + ((1 << _LOW) - 1))]  # the sum would pass 2^31 for NaN
            if len(inside):
                counted += _count(inside - begin, 1 << _LOW)
    bits = [(bin << _LOW) + _place(row, nth)[0] for bin, nth, row in zip(bins, left, lower, strict=True)]
    found: list[float] = torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()
    return found


def _count(places: Tensor, size: int) -> Tensor:
    return torch.bincount(places, minlength=size)


def _place(counts: Tensor, nth: int) -> tuple[int, int]:
    """The bin of the ``nth`` from above, and its number within the bin."""
    above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(above, nth))
    before = int(above[index - 1]) if index else 0
    return len(counts) - 1 - index, nth - before
