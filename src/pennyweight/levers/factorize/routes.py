"""Which low-rank route pays at a length: factors of the weights, or attention to mixtures of keys.

Row 242. Source: S. Cahyawijaya, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via
Low-Rank Approximation", arXiv:2108.10808: low-rank weights for sequences up to 512 tokens, Linformer beyond. Differs
from the source: no constant; one encoder layer of the sizes asked for is timed three ways on this machine, and the
counts of multiplications say where the crossing would be if all of them took equally long.

Shape letters: T tokens, D width, S projected positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from pennyweight.errors import OptionError
from pennyweight.levers.factorize.auto import Auto
from pennyweight.measure import latency
from pennyweight.model import anatomy
from pennyweight.weights import LowRank
from pennyweight.zoo.linformer import EncoderLayer

Way = Literal["dense", "low_rank", "linformer"]


@dataclass(frozen=True)
class Route:
    """One layer at one length, three ways.

    Attributes:
        length: T.
        milliseconds: medians on this machine.
        flops: as counted by `flops`.
        best: the fastest way.
    """

    length: int
    milliseconds: dict[Way, float]
    flops: dict[Way, int]

    @property
    def best(self) -> Way:
        return min(self.milliseconds, key=lambda way: self.milliseconds[way])


def flops(length: int, *, width: int, rank: float = 0.5, keys: int = 128, expansion: int = 4) -> dict[Way, int]:
    """FLOPs of one layer's products for a sequence: ``2 T (4 + 2 X) D^2`` in its maps, and ``4 T^2 D`` in attention.

    Factors take ``rank`` of the first term (a share of the break-even rank); Linformer makes the second ``8 T S D``,
    half of it the projections.
    """
    maps, attention = 2 * length * (4 + 2 * expansion) * width**2, 4 * length**2 * width
    mixed = 8 * length * min(keys, length) * width
    return {"dense": maps + attention, "low_rank": int(rank * maps) + attention, "linformer": maps + mixed}


def crossing(*, width: int, rank: float = 0.5, keys: int = 128, expansion: int = 4) -> float:
    """The length from which Linformer multiplies less than factors do: ``(1 - rank) (2 + X) D + 2 S``."""
    return (1 - rank) * (2 + expansion) * width + 2 * keys


def choose(
    length: int,
    *,
    width: int,
    num_heads: int,
    rank: float = 0.5,
    keys: int = 128,
    expansion: int = 4,
    batch: int = 1,
    repeats: int = 5,
) -> Route:
    """Time one encoder layer of these sizes at ``length``, dense, factorized and as a Linformer, in turns.

    Args:
        length: T.
        width: D.
        num_heads: heads of attention.
        rank: of factors, as for `factorize.auto`.
        keys: S, at most ``length``.
        expansion: width of the feed-forward pair / D.
        batch: sequences at once.
        repeats: rounds.

    Raises:
        OptionError: a length below 1.
    """
    if length < 1 or batch < 1:
        raise OptionError(f"factorize: a length of {length}, {batch} sequences; give at least 1 of each")
    g = torch.Generator().manual_seed(0)
    dense = EncoderLayer(width, num_heads, expansion=expansion, generator=g)
    factors = EncoderLayer(width, num_heads, expansion=expansion, generator=g)
    mixtures = EncoderLayer(width, num_heads, length=length, keys=min(keys, length), expansion=expansion, generator=g)
    lever = Auto(rank=rank)
    for name, layer in list(factors.named_modules()):
        if isinstance(layer, nn.Linear):
            size = lever.rank_for((layer.out_features, layer.in_features))
            # how long they take does not hang on their values
            empty = LowRank(torch.zeros(layer.out_features, size), torch.zeros(size, layer.in_features))
            anatomy.replace(factors, name, empty)
    x = torch.randn(batch, length, width, generator=g)
    with torch.inference_mode():
        rounds = latency.in_turns(
            [lambda: dense(x), lambda: factors(x), lambda: mixtures(x)], repeats=repeats, warmup=1
        )
        times = 1e3 * np.median(np.array(list(rounds)), axis=0)
    counts = flops(length, width=width, rank=rank, keys=keys, expansion=expansion)
    ways: tuple[Way, ...] = ("dense", "low_rank", "linformer")
    return Route(
        length,
        {way: float(time) for way, time in zip(ways, times, strict=True)},
        {way: batch * count for way, count in counts.items()},
    )
