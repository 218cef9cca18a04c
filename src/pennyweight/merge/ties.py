"""TIES: trim what each model adds, elect a sign for each element, average those that agree.

Row 95. Source: P. Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708.
Differs from the source: differences are trimmed tensor by tensor, as mergekit does, not over the whole model; those
equal to the smallest kept one are all kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pennyweight.lever import ANY, between, option
from pennyweight.merge.formula import Formula, Rule, Span, Stretched, elected_mean
from pennyweight.native import library


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
                for delta, bound in zip(deltas, least, strict=True):
                    shrink(delta, bound)
            return elected_mean(deltas, self.shares(len(deltas))).mul_(self.scale).add_(base)

        return rule


def shrink(delta: Tensor, bound: float) -> Tensor:
    """``delta`` (n,) float32, zero where its size is below ``bound``; in place."""
    if bound == 0:
        return delta
    # what torch drops is at most a number, and not below it: so take the float32 before the bound
    below = float(torch.nextafter(torch.tensor(bound), torch.tensor(0.0)))
    torch.ops.aten.hardshrink.out(delta, below, out=delta)
    return delta


def trim(weights: Tensor, scores: Tensor, least: Sequence[float]) -> Tensor:
    """``weights`` (E, n), zero where ``scores`` (E, n) are below the ``least`` of their model; both overwritten."""
    for weight, score, bound in zip(weights, scores, least, strict=True):
        weight.mul_(score.ge_(bound))
    return weights


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
    upper = _counted(walk(), None, _LOW, 1 << (31 - _LOW))
    bins, left = zip(*(_place(row, nth) for row in upper), strict=True)
    lower = _counted(walk(), [bin << _LOW for bin in bins], 0, 1 << _LOW)
    bits = [(bin << _LOW) + _place(row, nth)[0] for bin, nth, row in zip(bins, left, lower, strict=True)]
    found: list[float] = torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()
    return found


def _counted(stretches: Iterator[Tensor], begins: Sequence[int] | None, shift: int, bins: int) -> Tensor:
    """How many numbers of each row lie in each range of 2^shift bit patterns from ``begins`` (0) on: (E, bins)."""
    routines = library("counts")
    found: Tensor | None = None
    for values in stretches:
        if found is None:
            found = torch.zeros(len(values), bins, dtype=torch.int64)
        for row, begin, counts in zip(values, begins or [0] * len(values), found, strict=True):
            if routines is None:
                numbers = row.view(torch.int32)
                last = begin + (bins << shift) - 1  # of the last range; of the first walk's, all there is
                inside = numbers if begins is None else numbers[(numbers >= begin) & (numbers <= last)]
                if len(inside):
                    counts += torch.bincount((inside - begin) >> shift, minlength=bins)
                continue
            row = row.contiguous()
            routines.pw_counts(
                ctypes.c_void_p(row.data_ptr()), ctypes.c_int64(len(row)), ctypes.c_uint32(begin),
                ctypes.c_int(shift), ctypes.c_uint32(bins), ctypes.c_void_p(counts.data_ptr()),
            )  # fmt: skip
    assert found is not None
    return found


def _place(counts: Tensor, nth: int) -> tuple[int, int]:
    """The bin of the ``nth`` from above, and its number within the bin."""
    above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(above, nth))
    before = int(above[index - 1]) if index else 0
    return len(counts) - 1 - index, nth - before
