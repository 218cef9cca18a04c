"""Runs of blocks that a linear map could stand for, found by linear probes.

Row 24. Source: "Pluggable Pruning with Contiguous Layer Distillation for Diffusion Transformers" (PPCL),
arXiv:2511.16156: a residual probe for every block by least squares, probes chained over a run, their output held
against the block's by centered kernel alignment, and a run closed where the alignment's first difference turns. Differs
from the source: the least squares are solved in closed form, which their training would come to; detection is from the
paper's words, since its code is not public.

Source of the alignment: S. Kornblith et al., "Similarity of Neural Network Representations Revisited",
arXiv:1905.00414.

Shape letters: L blocks, R rows (tokens of all windows), D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.errors import DataError


@dataclass(frozen=True)
class Interval:
    """Blocks ``first`` to ``last``, both in it, and the alignment of their chained probes with them."""

    first: int
    last: int
    alignment: float

    @property
    def blocks(self) -> list[int]:
        """The indices of its blocks."""
        return list(range(self.first, self.last + 1))


def alignment(one: Tensor, other: Tensor) -> float:
    """Linear centered kernel alignment of rows (R, .): 1 where one set is a turned and scaled copy of the other.

    Raises:
        DataError: not as many rows.
    """
    if len(one) != len(other) or len(one) < 2:
        raise DataError(f"alignment: {len(one)} rows and {len(other)}; give the same, two at least")
    x, y = (rows.double() - rows.double().mean(0) for rows in (one, other))
    both = (x.mT @ y).square().sum()
    return float(both / ((x.mT @ x).norm() * (y.mT @ y).norm()).clamp(min=1e-300))


def probe(into: Tensor, out: Tensor, *, damping: float = 1e-6) -> Tensor:
    """(D, D) W of the residual map ``x + W x`` from rows ``into`` (R, D) nearest to ``out`` in the least squares."""
    x, change = into.double(), (out - into).double()
    gram = x.mT @ x
    gram = gram + damping * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(gram, x.mT @ change).mT
    return found


def probes(streams: Sequence[Tensor]) -> list[Tensor]:
    """A probe of every block, from the L + 1 streams (..., D) between them."""
    rows = [stream.flatten(0, -2) for stream in streams]
    return [probe(before, after) for before, after in itertools.pairwise(rows)]


def chained(streams: Sequence[Tensor], maps: Sequence[Tensor], first: int) -> list[float]:
    """Alignment of the chained probes of blocks ``first`` to k with the stream after k, for every k from ``first``."""
    x, found = streams[first].flatten(0, -2).double(), []
    for block in range(first, len(maps)):
        x = x + x @ maps[block].mT
        found.append(alignment(x, streams[block + 1].flatten(0, -2)))
    return found


def turning(values: Sequence[float]) -> int:
    """Where the first difference ``v[k-1] - v[k]``, which first falls, begins to rise; the last place if nowhere."""
    drops = [before - after for before, after in itertools.pairwise(values)]
    for place in range(1, len(drops)):
        if drops[place] > drops[place - 1]:
            return place
    return len(values) - 1


def intervals(streams: Sequence[Tensor], *, held_out: Sequence[Tensor] | None = None) -> list[Interval]:
    """Runs of two blocks or more that chained probes stand for, one after the other, in order.

    Args:
        streams: L + 1 tensors (..., D) between the blocks, to fit the probes on.
        held_out: the same on other inputs, to align on; None for ``streams``.
    """
    maps, found, first = probes(streams), [], 0
    judged = streams if held_out is None else held_out
    while first < len(maps) - 1:
        values = chained(judged, maps, first)
        last = first + turning(values)
        if last > first:
            found.append(Interval(first, last, values[last - first]))
        first = last + 1
    return found
