"""Range calibration: which part of its values a uniform grid spans, and the grid that spans it.

Row 226. Source: A. Gholami et al., "A Survey of Quantization Methods for Efficient Neural Network Inference",
arXiv:2103.13630, section III-B to III-D; the entropy method is S. Migacz, "8-bit Inference with TensorRT", 2017.
Differs from them: the entropy method takes each row of values by itself, and keeps the sign of one-sided ones.

Shape letters: R rows of values that share a range, S values of a row, B bins, L levels; M, N, G as in `weights.grid`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.weights.grid import Grid

Range = Literal["min-max", "percentile", "mse", "kl"]
_SHRINKS, _SMALLEST = 100, 0.01  # ranges tried by "mse": in steps of 5 %, about which the loss is flat
_BINS = 1024


def find_range(
    x: Tensor, method: Range, *, bits: int, symmetric: bool, percentile: float = 99.9
) -> tuple[Tensor, Tensor]:
    """The range (low, high), (R,) each, of every row of ``x``; it holds zero, and is (-high, high) when symmetric.

    Args:
        x: (R, S).
        method: "min-max" clips nothing; "percentile" the values outside the central ``percentile`` %; "mse" takes the
            range of least squared error, never a worse one than "min-max"; "kl" the one whose quantized histogram
            diverges least from that of the values.
        bits: of the grid that is to span it.
        symmetric: whether that grid has no zero.
        percentile: 50 to 100.

    Raises:
        OptionError: an unknown method, or a percentile out of range.
    """
    x = x.detach().float()
    if method == "min-max":
        low, high = x.amin(1), x.amax(1)
    elif method == "percentile":
        if not 50 < percentile <= 100:
            raise OptionError(f"percentile {percentile}: give more than 50 and at most 100")
        tail = (1 - percentile / 100) / 2
        low, high = _quantile(x, tail), _quantile(x, 1 - tail)
    elif method == "mse":
        return _least_squares(x, bits, symmetric)
    elif method == "kl":
        low, high = _least_divergence(x, bits, symmetric)
    else:
        raise OptionError(f"unknown range {method!r}; give min-max, percentile, mse or kl")
    return _with_zero(low, high, symmetric)


def grid_of(low: Tensor, high: Tensor, *, bits: int, symmetric: bool, group_size: int | None = None) -> Grid:
    """The uniform grid that spans ``low`` to ``high``, (M, G) each: inside, rounding is off by half a step at most.

    Raises:
        OptionError: one bit without a zero has one level.
    """
    if symmetric and bits < 2:
        raise OptionError("a symmetric uniform grid of 1 bit has no level but 0; give values = binary, or 2 bits")
    span, steps = (high, 2 ** (bits - 1) - 1) if symmetric else (high - low, 2**bits - 1)
    exact = torch.where(span > 0, span / steps, torch.ones_like(span))
    scale = exact.to(torch.float16)
    # rounded up, not to nearest: a smaller step would leave the ends of the range outside the grid
    scale = torch.where(scale.float() < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    if symmetric:
        return Grid(bits, group_size, scale, None, "none")
    zero = (-low / scale.float()).round().clamp(0, steps).to(torch.uint8)
    return Grid(bits, group_size, scale, zero, "integer")


def _with_zero(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = low.clamp_max(0), high.clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        return -high, high
    return low, high


def _quantile(x: Tensor, share: float) -> Tensor:
    """Linear interpolation, as NumPy's default; `torch.quantile` refuses rows of more than 2^24 values."""
    place = share * (x.shape[1] - 1)
    below = int(place)
    ordered = x.sort(1).values
    nearest = ordered[:, below]
    return nearest + (place - below) * (ordered[:, min(below + 1, x.shape[1] - 1)] - nearest)


def _least_squares(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The larger end is drawn in first, then the other: values behind a GELU end at -0.17 and at any height."""
    low, high = _with_zero(x.amin(1), x.amax(1), symmetric)
    if symmetric:
        high = _drawn_in(x, bits, lambda end: (-end, end), high, symmetric=True)
        return -high, high
    up = high > -low
    large, small = torch.where(up, high, low), torch.where(up, low, high)
    large = _drawn_in(x, bits, lambda end: _ends(up, end, small), large)
    small = _drawn_in(x, bits, lambda end: _ends(up, large, end), small)
    return _ends(up, large, small)


def _ends(up: Tensor, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(up, small, large), torch.where(up, large, small)


def _drawn_in(
    x: Tensor, bits: int, ends: Callable[[Tensor], tuple[Tensor, Tensor]], full: Tensor, *, symmetric: bool = False
) -> Tensor:
    """The share of ``full``, (R,), whose grid from ``ends`` has least squared error; ``full`` itself on ties."""
    best, found = torch.full_like(full, torch.inf), full
    for step in range(_SHRINKS):
        tried = full * _SMALLEST ** (step / (_SHRINKS - 1))
        low, high = ends(tried)
        grid = grid_of(low[:, None], high[:, None], bits=bits, symmetric=symmetric)
        loss = (grid.values(grid.codes(x)) - x).square().sum(1)
        better = loss < best
        best, found = torch.where(better, loss, best), torch.where(better, tried, found)
    return found


def _least_divergence(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Migacz: of the thresholds on ``|x|``, the one whose clipped histogram its own quantization resembles most."""
    magnitude = x.abs()
    largest = magnitude.amax(1, keepdim=True)
    width = torch.where(largest > 0, largest, torch.ones_like(largest)) / _BINS
    bins = (magnitude / width).long().clamp_max(_BINS - 1)
    counts = torch.zeros(x.shape[0], _BINS).scatter_add_(1, bins, torch.ones_like(x))
    one_sided = not symmetric and bool((x.amin(1) >= 0).all() | (x.amax(1) <= 0).all())
    levels = 2**bits if one_sided else max(2, 2 ** (bits - 1))
    best = torch.full((x.shape[0],), torch.inf)
    kept = torch.full((x.shape[0],), _BINS)
    for last in sorted(set(torch.linspace(min(levels, _BINS), _BINS, 128).round().long().tolist())):
        divergence = _divergence(counts, last, levels)
        better = divergence < best
        best = torch.where(better, divergence, best)
        kept = torch.where(better, last, kept)
    threshold = kept * width[:, 0]
    return torch.maximum(x.amin(1), -threshold), torch.minimum(x.amax(1), threshold)


def _divergence(counts: Tensor, last: int, levels: int) -> Tensor:
    """(R,) KL divergence of the first ``last`` bins (B) with all beyond added to the last, from their ``levels``."""
    inside = counts[:, :last]
    clipped = inside.clone()
    clipped[:, -1] += counts[:, last:].sum(1)
    level = (torch.arange(last) * levels // last).expand_as(inside)
    # each level spreads its count evenly over those of its bins that hold anything, as the source does: the clipped
    # mass is in the reference alone, and that is what clipping costs
    held = (inside > 0).to(inside)
    total = torch.zeros(len(counts), levels).scatter_add_(1, level, inside)
    among = torch.zeros(len(counts), levels).scatter_add_(1, level, held).clamp_min(1)
    spread = (total / among).gather(1, level) * held
    reference = clipped / clipped.sum(1, keepdim=True)
    smallest = 1e-6  # of a bin the quantized histogram holds nothing of
    candidate = (spread / spread.sum(1, keepdim=True).clamp_min(1)).clamp_min(smallest)
    return torch.where(reference > 0, reference * (reference / candidate).log(), torch.zeros_like(reference)).sum(1)
