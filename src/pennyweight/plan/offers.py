"""What could stand in a slot: every candidate of every allowed lever, with its cost and its predicted damage.

A lever may predict all its candidates at once (`predict`, see `pennyweight.damage`); for any other, its solver runs on
a sample of rows. Levers of reach ``weight`` treat rows alike given the second moment of their inputs, so a sample tells
the whole: damage scales with what the rows count for, and costs are affine in their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from pennyweight.damage import Prediction, Predicts, damage, sample
from pennyweight.lever import Card, WeightLever, candidates_of
from pennyweight.statistics import Statistics
from pennyweight.weights import Cost, Weight

#: Rows a solver is tried on; damage of a sample of 96 rows is within a tenth of the whole's on the default model.
SAMPLED_ROWS = 96


def predict(settings: Sequence[Any], weight: Weight, statistics: Statistics, *, seed: int = 0) -> list[Prediction]:
    """Predictions for lever instances of any kinds, in their order."""
    by_class: dict[type, list[int]] = defaultdict(list)
    for index, lever in enumerate(settings):
        by_class[type(lever)].append(index)
    found: dict[int, Prediction] = {}
    for cls, indices in by_class.items():
        asked = [settings[index] for index in indices]
        if isinstance(cls, Predicts):
            made = cls.predict(asked, weight, statistics)
        else:
            made = [_by_sample(lever, weight, statistics, seed) for lever in asked]
        found.update(zip(indices, made, strict=True))
    return [found[index] for index in range(len(settings))]


def _by_sample(lever: WeightLever, weight: Weight, statistics: Statistics, seed: int) -> Prediction:
    rows = weight.shape[0]
    if rows <= 2 * SAMPLED_ROWS:
        solved = lever.solve(weight, statistics)
        return Prediction(lever, solved.cost(), damage(solved.dense() - weight.dense(), statistics))
    large, its_statistics = sample(weight, statistics, SAMPLED_ROWS, seed)
    small, small_statistics = sample(weight, statistics, SAMPLED_ROWS // 2, seed)
    solved = lever.solve(large, its_statistics)
    a, b = lever.solve(small, small_statistics).cost(), solved.cost()
    beyond = rows - SAMPLED_ROWS
    step = SAMPLED_ROWS - SAMPLED_ROWS // 2
    cost = Cost(*(hi + (hi - lo) * beyond // step for lo, hi in zip(_numbers(a), _numbers(b), strict=True)))
    harm = damage(solved.dense() - large.dense(), its_statistics)
    whole = statistics.gradient
    part = its_statistics.gradient
    # weighted by what the rows count for, not by their number: a few sensitive rows carry most of the damage
    share = SAMPLED_ROWS / rows if whole is None or part is None else float(part.sum() / whole.sum().clamp_min(1e-30))
    return Prediction(lever, cost, harm / max(share, 1e-12))


def _numbers(cost: Cost) -> tuple[int, int, int]:
    return cost.params, cost.bytes, cost.flops


def settings_for(cards: Iterable[Card], shape: tuple[int, int]) -> list[Any]:
    """Every candidate of the given levers for a matrix of ``shape``."""
    return [setting for card in cards if card.reach == "weight" for setting in candidates_of(card, shape)]
