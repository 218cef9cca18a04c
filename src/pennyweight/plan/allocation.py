"""Bits for every layer: scores and costs in, one setting a layer out. One allocator for every kind of score.

Rows 5, 56, 124 and 172 differ in what they call sensitive; what they then do is one problem: each layer takes one of
its settings (offers, from the mildest to the harshest), and the sum of their scores, with what pairs of layers do to
each other where that is known, is to be small within budgets. Five ways to search, behind one call:

* ``milp``: the exact least sum of scores under the budgets (`pennyweight.plan.choose`, HiGHS).
* ``exact``: the same with interactions of pairs, every product of two choices linearized; for tens of layers.
* ``greedy``: from the mildest on, the step of least further score (interactions with the steps taken included) for what
  it saves, until the budgets hold.
* ``bisect``: width by width from mild to harsh, layers sorted by score; how many of the least sensitive take the width
  is found by bisection on a *measured* floor. ceil(log2(layers + 1)) measurements a width.
* `pareto`: the whole curve of score over one cost.

Sources: C. J. S. Schaefer et al., "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
Quantization", arXiv:2306.04879 (scores with interactions, bisection to a floor); T. Zhao et al., "MixDQ",
arXiv:2405.17873 (groups with metrics of their own); the linearization of products is F. Glover and E. Woolsey's, 1974.
Differs from the sources: the paper of row 5 gives no formula for its augmentation, see `pennyweight.plan.sensitivity`;
the floor is a one-sided test at 95 % on paired samples, where the paper compares two means.

Shape letters: L layers, F offers of all layers together, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from pennyweight.errors import BudgetError, DataError, OptionError
from pennyweight.measure.stats import Verdict, below
from pennyweight.plan.choose import Certificate, Offer, Pick, Problem, choose, frontier
from pennyweight.plan.pairs import choose_with_pairs

Search = Literal["milp", "exact", "greedy", "bisect"]
Order = Literal["static", "greedy"]
#: From the setting of every layer (its index), the harm of each sample: paired with the original on common batches.
Measure = Callable[[Mapping[str, int]], Any]

SEARCHES: tuple[Search, ...] = ("milp", "exact", "greedy", "bisect")


@dataclass(frozen=True)
class Layers:
    """The layers, what each may become, and what that does.

    Attributes:
        offers: layer -> settings, from the mildest to the harshest; ``damage`` is the score (smaller is better).
        fixed: costs that no choice changes.
        pairs: (F, F) symmetric: what two settings of different layers add to the sum of their scores; None for nothing.
            Entries within one layer are not looked at.
        groups: layer -> group, where scores of different groups are in different units and must not be added.
    """

    offers: Mapping[str, Sequence[Offer]]
    fixed: Mapping[str, int] | None = None
    pairs: NDArray[np.float64] | None = None
    groups: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        total = sum(map(len, self.offers.values()))
        if not self.offers:
            raise DataError("bits: no layers to choose for; select some")
        if self.pairs is not None:
            if self.pairs.shape != (total, total) or not np.isfinite(self.pairs).all():
                raise DataError(f"bits: pairs {self.pairs.shape} for {total} offers; give finite ({total}, {total})")
            if not np.allclose(self.pairs, self.pairs.T, atol=1e-12 + 1e-6 * np.abs(self.pairs).max()):
                raise DataError("bits: pairs are not symmetric; what i does to j is what j does to i")
        if self.groups is not None and (missing := [name for name in self.offers if name not in self.groups]):
            raise DataError(f"bits: {missing[0]} is in no group; give every layer one")

    @cached_property
    def problem(self) -> Problem:
        """The knapsack without the interactions."""
        return Problem(self.offers, self.fixed or {})

    @cached_property
    def starts(self) -> list[int]:
        """Where each layer's offers begin among all F."""
        return [0, *np.cumsum([len(offers) for offers in self.offers.values()]).tolist()]

    def score(self, pick: Pick) -> float:
        """The sum of scores of ``pick``, interactions included."""
        return self.problem.damage(pick) + (0.0 if self.pairs is None else self._between(pick))

    def _between(self, pick: Pick) -> float:
        assert self.pairs is not None
        at = [start + index for start, index in zip(self.starts, pick, strict=False)]
        part = self.pairs[np.ix_(at, at)]
        return float((part.sum() - part.trace()) / 2)

    def step(self, pick: Pick, layer: int, index: int) -> float:
        """What score layer number ``layer`` adds by going from where it is in ``pick`` to ``index``."""
        offers = list(self.offers.values())[layer]
        found = offers[index].damage - offers[pick[layer]].damage
        if self.pairs is not None:
            at = [start + index for start, index in zip(self.starts, pick, strict=False)]
            del at[layer]
            start = self.starts[layer]
            found += float((self.pairs[start + index, at] - self.pairs[start + pick[layer], at]).sum())
        return found

    def only(self, names: Sequence[str], *, mildest: frozenset[str] = frozenset()) -> Layers:
        """Some of the layers, in their order; of those in ``mildest`` only the first offer."""
        kept: dict[str, Sequence[Offer]] = {}
        flat: list[int] = []
        for start, (name, offers) in zip(self.starts, self.offers.items(), strict=False):
            if name in names:
                kept[name] = offers[:1] if name in mildest else offers
                flat += range(start, start + len(kept[name]))
        pairs = None if self.pairs is None else self.pairs[np.ix_(flat, flat)]
        return replace(self, offers=kept, pairs=pairs)


@dataclass(frozen=True)
class Allocation:
    """One setting a layer.

    Attributes:
        pick: layer -> index of its offer.
        labels: layer -> its offer's label.
        score: sum of scores, interactions included; None where groups have units of their own.
        cost: by resource, what is fixed included.
        evaluations: measurements made.
        verdict: of the floor, where it was measured.
        certificate: what the solver proved, where it was exact.
        scores: group -> sum of its scores.
    """

    pick: dict[str, int]
    labels: dict[str, str]
    score: float | None
    cost: dict[str, int]
    evaluations: int = 0
    verdict: Verdict | None = None
    certificate: Certificate | None = None
    scores: Mapping[str, float] | None = None


def width_offer(
    score: float, bits: int, *, count: int, macs: int = 0, activation_bits: int = 16, overhead_bits: int = 0
) -> Offer:
    """The offer of a layer at one width, with the costs that allocations are made against.

    Args:
        score: smaller is better.
        bits: of a weight.
        count: weights.
        macs: multiply-accumulates of one input.
        activation_bits: of the inputs.
        overhead_bits: of scales and zeros, for the whole layer.

    Costs: "bits" (of the weights, overhead included), "bytes", "bit_macs" (``macs * bits * activation_bits``), "macs".
    """
    stored = count * bits + overhead_bits
    return Offer(
        f"{bits} bits" if activation_bits == 16 else f"W{bits}A{activation_bits}",
        {"bits": stored, "bytes": -(-stored // 8), "bit_macs": macs * bits * activation_bits, "macs": macs},
        score,
    )


def average(target: float, counts: Mapping[str, int]) -> int:
    """The budget in bits that a mean of ``target`` bits over ``counts`` weights allows."""
    return math.floor(target * sum(counts.values()) + 1e-9)


def bits(
    layers: Layers | Mapping[str, Sequence[Offer]],
    budgets: Mapping[str, Any] | None = None,
    *,
    search: Search = "milp",
    measure: Measure | None = None,
    most_harm: float | None = None,
    level: float | None = 0.95,
    order: Order = "greedy",
    per: str | None = None,
    protect: float = 0.0,
    seconds: float = 30.0,
) -> Allocation:
    """Choose a setting for every layer.

    Args:
        layers: see `Layers`; a bare mapping of offers has no interactions and no groups.
        budgets: resource -> most that may be used. With groups: group -> such budgets, each solved by itself.
        search: "milp", "exact", "greedy" or "bisect"; see the module's text.
        measure: for "bisect".
        most_harm: for "bisect": the mean harm that is allowed.
        level: of the one-sided test of the floor; None compares means.
        order: for "bisect" with interactions: "static" sorts by the score plus half of all interactions, "greedy" takes
            one layer after the other, each by its score plus its interactions with those taken before.
        per: for "greedy" and "bisect": the resource whose saving scores are divided by; None takes the budgets' own
            ("greedy") or plain scores ("bisect").
        protect: share of the layers, those of the highest score at their harshest, that keep their mildest setting.
        seconds: time limit of the solver.

    Raises:
        BudgetError: budgets or floor that no choice meets.
        OptionError: options that do not go together.
    """
    found = layers if isinstance(layers, Layers) else Layers(layers)
    if search not in SEARCHES:
        raise OptionError(f"bits: search = {search!r}; give one of {', '.join(SEARCHES)}")
    if not 0 <= protect < 1:
        raise OptionError(f"bits: protect = {protect} is no share of the layers; give 0 up to 1")
    if found.groups is not None:
        return _by_group(found, budgets or {}, search=search, protect=protect, seconds=seconds, per=per)
    found = found.only(list(found.offers), mildest=protected(found, protect))
    limits = dict(budgets or {})
    if search == "bisect":
        if measure is None or most_harm is None:
            raise OptionError("bits: bisection measures a floor; give measure and most_harm")
        return _bisect(found, limits, measure, most_harm, level, order, per)
    if measure is not None or most_harm is not None:
        raise OptionError(f"bits: {search} measures nothing; leave measure and most_harm out, or search by bisection")
    if not limits:
        raise OptionError(f"bits: {search} needs a budget; give one, such as {{'bytes': 1_000_000}}")
    if search == "greedy":
        return _allocation(found, _greedy(found, limits, per))
    if search == "milp" and found.pairs is not None:
        raise OptionError("bits: milp adds scores up and cannot see pairs; search by exact, greedy or bisect")
    if found.pairs is None:
        choice = choose(found.problem, limits, seconds=seconds, gap=1e-9)
        return replace(_allocation(found, choice.pick), certificate=choice.certificate)
    pick, certificate = choose_with_pairs(found.problem, found.pairs, limits, seconds=seconds)
    return replace(_allocation(found, pick), certificate=certificate)


def protected(layers: Layers, share: float) -> frozenset[str]:
    """The ``share`` of the layers (at least one, when it is above 0) that suffer most at their harshest."""
    count = math.ceil(share * len(layers.offers) - 1e-9)
    worst = sorted(layers.offers, key=lambda name: -max(offer.damage for offer in layers.offers[name]))
    return frozenset(worst[:count])


def pareto(layers: Layers | Mapping[str, Sequence[Offer]], resource: str = "bits") -> list[Allocation]:
    """The curve of score over ``resource`` from its cheapest to its dearest end, every point optimal at its cost.

    Raises:
        OptionError: layers with interactions, for which no such curve is convex.
    """
    found = layers if isinstance(layers, Layers) else Layers(layers)
    if found.pairs is not None or found.groups is not None:
        raise OptionError("bits: the curve adds scores up; leave pairs and groups out")
    return [_allocation(found, pick) for _, _, pick in frontier(found.problem, resource)]


def best_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, harm) points that no other point beats, by rising cost: the envelope of what was measured.

    Of equal points the first is kept.
    """
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if not kept or points[index][1] < points[kept[-1]][1]:
            kept.append(index)
    return kept


def _allocation(layers: Layers, pick: Pick) -> Allocation:
    named = dict(zip(layers.offers, pick, strict=True))
    return Allocation(
        pick=named,
        labels={name: layers.offers[name][index].label for name, index in named.items()},
        score=layers.score(pick),
        cost={name: layers.problem.total(pick, name) for name in layers.problem.resources()},
    )


def _by_group(
    layers: Layers, budgets: Mapping[str, Any], *, search: Search, protect: float, seconds: float, per: str | None
) -> Allocation:
    assert layers.groups is not None
    groups = list(dict.fromkeys(layers.groups[name] for name in layers.offers))
    if search == "bisect":
        raise OptionError("bits: bisection sorts all layers by one score; search groups by milp, exact or greedy")
    if sorted(budgets) != sorted(groups) or not all(isinstance(one, Mapping) for one in budgets.values()):
        raise OptionError(f"bits: layers in groups {', '.join(groups)} need a budget each: {{group: {{resource: n}}}}")
    parts = {}
    for group in groups:
        some = [name for name in layers.offers if layers.groups[name] == group]
        own = replace(layers.only(some), groups=None, fixed={})
        parts[group] = bits(own, budgets[group], search=search, protect=protect, seconds=seconds, per=per)
    pick = {name: parts[layers.groups[name]].pick[name] for name in layers.offers}
    whole = _allocation(replace(layers, groups=None), tuple(pick.values()))
    return replace(whole, score=None, scores={group: cast(float, part.score) for group, part in parts.items()})


def _greedy(layers: Layers, limits: Mapping[str, int], per: str | None) -> Pick:
    problem, offers = layers.problem, list(layers.offers.values())
    pick: Pick = (0,) * len(offers)

    def over(now: Pick) -> dict[str, int]:
        return {name: more for name, limit in limits.items() if (more := problem.total(now, name) - limit) > 0}

    while excess := over(pick):
        steps = []
        for layer, choices in enumerate(offers):
            for index in range(pick[layer] + 1, len(choices)):
                saved = _saved(choices[pick[layer]], choices[index], {per: 1} if per is not None else excess)
                useful = any(choices[pick[layer]].cost.get(n, 0) > choices[index].cost.get(n, 0) for n in excess)
                if saved > 0 and useful:
                    more = layers.step(pick, layer, index)
                    steps.append((more / saved if more > 0 else more * saved, layer, index))
        if not steps:
            raise BudgetError("bits: " + _no(problem, limits))
        _, layer, index = min(steps)
        pick = (*pick[:layer], index, *pick[layer + 1 :])
    # the last step may have saved more than was needed: what still fits goes back, the greatest relief first
    while True:
        back = []
        for layer in range(len(offers)):
            for index in range(len(offers[layer])):
                relief = layers.step(pick, layer, index)
                now = (*pick[:layer], index, *pick[layer + 1 :])
                if relief < 0 and not over(now):
                    back.append((relief, layer, index))
        if not back:
            return pick
        _, layer, index = min(back)
        pick = (*pick[:layer], index, *pick[layer + 1 :])


def _saved(now: Offer, then: Offer, units: Mapping[str, int]) -> float:
    """What a step saves, each resource in its unit."""
    return sum((now.cost.get(name, 0) - then.cost.get(name, 0)) / unit for name, unit in units.items())


def _no(problem: Problem, limits: Mapping[str, int]) -> str:
    asked = " and ".join(f"{limit:,} {name}" for name, limit in limits.items())
    smallest = ", ".join(f"{problem.least(name):,} {name}" for name in limits)
    return f"{asked} cannot be met (smallest {smallest}); raise the budget or offer harsher settings"


def _bisect(
    layers: Layers, limits: Mapping[str, int], measure: Measure, most_harm: float, level: float | None, order: Order,
    per: str | None,
) -> Allocation:  # fmt: skip
    names, offers = list(layers.offers), list(layers.offers.values())
    pick: Pick = (0,) * len(offers)
    evaluations, verdict = 0, None
    for width in range(1, max(map(len, offers))):
        # only what took the width before may take the next one: a layer that 8 bits hurt is not asked for 4
        asked = [n for n, choices in enumerate(offers) if len(choices) > width and pick[n] == width - 1]
        ranked = ranking(layers, pick, asked, width, order=order, per=per)
        low, high = 0, len(ranked)  # the first ``low`` are known to do
        while low < high:
            middle = (low + high + 1) // 2
            now = _moved(pick, ranked[:middle], width)
            found = _judge(measure(dict(zip(names, now, strict=True))), most_harm, level)
            evaluations += 1
            if found.holds:
                low, verdict = middle, found
            else:
                high = middle - 1
        pick = _moved(pick, ranked[:low], width)
    problem = layers.problem
    if over := [name for name, limit in limits.items() if problem.total(pick, name) > limit]:
        raise BudgetError(
            f"bits: a harm of {most_harm:.4g} allows no fewer than {problem.total(pick, over[0]):,} {over[0]}, and "
            f"{limits[over[0]]:,} were asked for; allow more harm or raise the budget"
        )
    return replace(_allocation(layers, pick), evaluations=evaluations, verdict=verdict)


def ranking(
    layers: Layers, pick: Pick, asked: Sequence[int], index: int, *, order: Order = "greedy", per: str | None = None
) -> list[int]:
    """The layers ``asked`` (numbers) by what taking offer ``index`` adds to the score, least first.

    Args:
        layers: with their scores and, where known, interactions.
        pick: where every layer stands.
        asked: those to sort.
        index: the offer each of them would take.
        order: see `bits`.
        per: resource whose saving scores are divided by.
    """
    offers = list(layers.offers.values())

    def worth(layer: int, score: float) -> float:
        if per is None:
            return score
        saved = _saved(offers[layer][pick[layer]], offers[layer][index], {per: 1})
        if saved <= 0:
            return math.inf
        return score / saved if score > 0 else score * saved

    if layers.pairs is None or order == "static":
        together = _moved(pick, asked, index)
        alone = {n: layers.step(pick, n, index) for n in asked}
        crowd = {n: layers.step(_moved(together, [n], pick[n]), n, index) for n in asked}
        return sorted(asked, key=lambda n: (worth(n, (alone[n] + crowd[n]) / 2), n))
    found: list[int] = []
    left, now = list(asked), pick
    while left:
        best = min(left, key=lambda n: (worth(n, layers.step(now, n, index)), n))
        left.remove(best)
        found.append(best)
        now = _moved(now, [best], index)
    return found


def _moved(pick: Pick, layers: Sequence[int], index: int) -> Pick:
    return tuple(index if n in layers else old for n, old in enumerate(pick))


def _judge(harm: Any, most: float, level: float | None) -> Verdict:
    samples = np.atleast_1d(np.asarray(harm, dtype=np.float64))
    if samples.size > 1 and level is not None:
        return below(samples, most, level=level)
    mean = float(samples.mean())
    if not math.isfinite(mean):
        raise DataError(f"bits: measured a harm of {mean}; the model overflows at these widths")
    return Verdict(mean <= most, float("nan"), mean, samples.size, 0.0, mean, most, None, None, "difference")
