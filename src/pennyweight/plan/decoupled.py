"""Two groups of layers, each judged by a metric of its own, under one budget: share it out in several ways and measure.

Row 172. Source: T. Zhao et al., "MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled
Mixed Precision Quantization", arXiv:2405.17873, and its code (thu-nics/MixDQ): what an image shows and how good it
looks are hurt by different layers, and the two are never added. With r the weights of the first group over those of
the second and k how many times wider the first is to be, a mean of B bits gives the second ``B (1 + r) / (k r + 1)``
bits and the first k times as many. Differs from the source: budgets are ceilings in exact bits, without the band of
0.02 below; any two groups, any two metrics. Scores have to add up: the paper's signal to noise in decibels does not
(one layer at 60 decibels would make up for one at 0), noise over signal does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pennyweight.errors import BudgetError, OptionError
from pennyweight.plan.allocation import Allocation, Layers, bits

#: Ratios of widths that are tried, as the paper's code has them, and shares of the budget that are aimed at.
RATIOS = tuple(0.46 + 0.1 * step for step in range(10))
TARGETS = (1.0, 0.975, 0.95, 0.925)


@dataclass(frozen=True)
class Candidate:
    """One way to share the budget out.

    Attributes:
        ratio: mean bits of the first group over those of the second, as asked.
        target: mean bits over both, as asked.
        allocation: what each group then does best.
        figure: measured, smaller is better.
    """

    ratio: float
    target: float
    allocation: Allocation
    figure: float


def group_bits(target: float, ratio: float, first: int, second: int) -> tuple[float, float]:
    """Mean bits of two groups of ``first`` and ``second`` weights whose mean is ``target`` and whose ratio ``ratio``.

    >>> group_bits(4.0, 2.0, 100, 100)
    (5.333333333333333, 2.6666666666666665)
    """
    size = first / second
    narrow = target * (1 + size) / (ratio * size + 1)
    return ratio * narrow, narrow


def shares(
    layers: Layers, counts: Mapping[str, int], target: float, *, ratios: Sequence[float] = RATIOS,
    targets: Sequence[float] = TARGETS, protect: float = 0.0, resource: str = "bits",
) -> Iterator[tuple[float, float, Allocation]]:  # fmt: skip
    """(ratio, target, allocation) of every share that can be met, equal allocations once.

    Args:
        layers: in exactly two groups; the first is the one that ``ratios`` speak of.
        counts: weights of each layer.
        target: most mean bits over both groups.
        ratios: mean bits of the first group over those of the second.
        targets: shares of ``target`` to aim at: rounding leaves some of them better than the whole.
        protect: see `pennyweight.plan.bits`; in each group.
        resource: the cost that counts bits.
    """
    if layers.groups is None or len(groups := list(dict.fromkeys(layers.groups[name] for name in layers.offers))) != 2:
        raise OptionError("bits: decoupled planning is for two groups of layers; give every layer one of two")
    sizes = [sum(counts[name] for name in layers.offers if layers.groups[name] == group) for group in groups]
    seen = set()
    for part in targets:
        for ratio in ratios:
            means = group_bits(part * target, ratio, *sizes)
            budgets = {
                group: {resource: math.floor(mean * size + 1e-9)}
                for group, mean, size in zip(groups, means, sizes, strict=True)
            }
            try:
                found = bits(layers, budgets, protect=protect)
            except BudgetError:  # a share below the narrowest or protected widths of a group
                continue
            key = tuple(found.pick.items())
            if key not in seen:
                seen.add(key)
                yield ratio, part * target, found


def metric_decoupled(
    layers: Layers, counts: Mapping[str, int], target: float, measure: Callable[[Mapping[str, int]], float], *,
    ratios: Sequence[float] = RATIOS, targets: Sequence[float] = TARGETS, protect: float = 0.0, resource: str = "bits",
) -> tuple[Candidate, tuple[Candidate, ...]]:  # fmt: skip
    """The best measured share, and all of them: not every allocation that the scores like is good.

    Args:
        layers: see `shares`, as the others.
        counts: weights of each layer.
        target: most mean bits.
        measure: from layer -> index of its offer, the figure to minimize.
        ratios: of the first group's mean bits over the second's.
        targets: shares of ``target``.
        protect: share of each group's layers.
        resource: the cost that counts bits.

    Raises:
        BudgetError: no share can be met.
    """
    found = tuple(
        Candidate(ratio, aim, allocation, float(measure(allocation.pick)))
        for ratio, aim, allocation in shares(
            layers, counts, target, ratios=ratios, targets=targets, protect=protect, resource=resource
        )
    )
    if not found:
        raise BudgetError(f"bits: no share of {target:g} bits between the groups can be met; raise it or offer less")
    return min(found, key=lambda one: one.figure), found
