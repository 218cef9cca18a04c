"""Positions in attention: a turn of queries and keys times a decay with distance.

Row 122. Source: F. Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative
AI", arXiv:2410.18441: rotary positions (J. Su et al., arXiv:2104.09864) factored with linear biases (ALiBi: O. Press et
al., arXiv:2108.12409) and a harmonic series. Differs from the source: only its abstract is public, so the series is
read as that of the slopes, 1, 1/2, 1/3 ..., where ALiBi's are geometric: a head of slope m weighs a key at distance n
by exp(-m n) besides what the turn says. The other reading is there too (``distance="harmonic"``): biases that grow as
1 + 1/2 + ... + 1/n, a decay close to n^-m.

Shape letters: B sequences, H heads, T positions, D head dimension (even).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pennyweight.errors import OptionError, ShapeError

#: How a bias grows with distance.
Distance = Literal["none", "linear", "harmonic"]
DISTANCES = ("none", "linear", "harmonic")
#: How slopes fall from head to head.
Series = Literal["harmonic", "geometric"]


def angles(length: int, head_dim: int, *, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, D/2) of rotary positions; pair d turns by ``base ** (-2 d / D)`` a position.

    Raises:
        OptionError: an odd head dimension.
    """
    if head_dim % 2 or head_dim < 2:
        raise OptionError(f"positions: head_dim {head_dim}; rotary positions turn pairs: give an even number")
    frequency = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    turned = torch.outer(torch.arange(length), frequency)
    return turned.cos(), turned.sin()


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``x`` (..., T, D) with its pairs (d, d + D/2) turned; lengths stay, products depend on the distance alone."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def slopes(num_heads: int, series: Series = "harmonic") -> Tensor:
    """The slope of every head (H,): "harmonic" is 1, 1/2, ... 1/H; "geometric" is ALiBi's, from 2^(-8/H) to 2^-8.

    Raises:
        OptionError: no heads, or another series.
    """
    if num_heads < 1 or series not in ("harmonic", "geometric"):
        raise OptionError(
            f"positions: {num_heads} heads, series {series!r}; give at least 1, and harmonic or geometric"
        )
    head = torch.arange(1, num_heads + 1)
    return 1.0 / head if series == "harmonic" else torch.exp2(-8.0 * head / num_heads)


def distance_bias(length: int, slope: Tensor, distance: Distance = "linear") -> Tensor:
    """What attention logits are lowered by, as a mask to add: (H, T, T), -infinity for keys to come.

    Args:
        length: T.
        slope: (H,), at least 0.
        distance: what grows with the distance n: "linear" n itself, "harmonic" 1 + 1/2 + ... + 1/n; "none" 0.

    Raises:
        OptionError: another kind of distance, or negative slopes.
    """
    if distance not in DISTANCES:
        raise OptionError(f"positions: distance {distance!r}; give one of {', '.join(DISTANCES)}")
    if slope.ndim != 1 or bool((slope < 0).any()):
        raise OptionError("positions: slopes are one number a head, at least 0")
    steps = torch.arange(length, device=slope.device)
    if distance == "harmonic":
        # in double: float32 stops adding 1/n long before it should
        grown = torch.cat([steps[:1].double(), (1.0 / steps[1:].double()).cumsum(0)])
    else:
        grown = steps.double() * (distance == "linear")
    apart = steps[:, None] - steps
    bias = -slope[:, None, None] * grown[apart.clamp_min(0)].to(slope.dtype)
    return bias.masked_fill(apart < 0, -torch.inf)


def rope_alibi(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    slope: Tensor | None = None,
    distance: Distance = "linear",
    base: float = 10_000.0,
) -> Tensor:
    """Causal attention with both: softmax(rotated q . rotated k / sqrt(D) - slope * distance) @ value.

    Args:
        query: (B, H, T, D).
        key: likewise.
        value: likewise, of any last dimension.
        slope: (H,); None for the harmonic series.
        distance: see `distance_bias`.
        base: see `angles`.

    Exact limit: slopes of 0 are rotary attention alone.

    Raises:
        ShapeError: tensors that do not fit each other.
    """
    if query.ndim != 4 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (query, key, value))
        raise ShapeError(f"rope_alibi: query, key and value are {shapes}; give (B, H, T, D), the same B, H and T")
    length, head_dim = query.shape[-2:]
    turn = tuple(part.to(query.device) for part in angles(length, head_dim, base=base))
    slope = slopes(query.shape[1]) if slope is None else slope
    if slope.shape != query.shape[1:2]:
        raise ShapeError(f"rope_alibi: slopes {tuple(slope.shape)} for {query.shape[1]} heads; give one a head")
    bias = distance_bias(length, slope.to(query), distance)
    return functional.scaled_dot_product_attention(rotated(query, *turn), rotated(key, *turn), value, attn_mask=bias)
