"""From predictions to a plan that holds: choose, solve, measure, rescale what was predicted, and choose again.

Predictions come from a quadratic form and a little text; measurements come from the model. Each round rescales the
predicted damage of a group of slots (the embedding, the blocks) by what was measured, and what the files need beside
the weights by what they were seen to need, so that the second plan already trades the groups at their true price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pennyweight.damage import Prediction
from pennyweight.lever import options_of
from pennyweight.plan.choose import Choice, Offer, Problem, choose
from pennyweight.plan.slots import Slot


@dataclass(frozen=True)
class Prices:
    """What measurements have taught so far.

    Attributes:
        factors: group -> measured damage over predicted damage.
        fixed: costs of what no choice changes, by resource.
        bundles: slot -> the bundle it takes one setting with, where an engine runs several maps as one; their offers
            are of the same settings in the same order.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    bundles: Mapping[str, str] = field(default_factory=dict)

    def _bundled(self, slots: Sequence[Slot]) -> dict[str, list[Slot]]:
        found: dict[str, list[Slot]] = {}
        for slot in slots:
            found.setdefault(self.bundles.get(slot.name, slot.name), []).append(slot)
        return found

    def problem(self, slots: Sequence[Slot], offers: Mapping[str, Sequence[Prediction]]) -> Problem:
        """The knapsack at these prices."""
        return Problem(
            {
                name: [
                    _together(part, [offers[slot.name][index] for slot in part], self)
                    for index in range(len(offers[part[0].name]))
                ]
                for name, part in self._bundled(slots).items()
            },
            self.fixed,
        )

    def plan(
        self, slots: Sequence[Slot], offers: Mapping[str, Sequence[Prediction]], budgets: Mapping[str, int],
        most_damage: float | None = None,
    ) -> Plan:  # fmt: skip
        """The best plan at these prices: least damage under ``budgets``, or fewest bytes under ``most_damage``.

        Raises:
            BudgetError: none meets what is asked.
        """
        problem = self.problem(slots, offers)
        minimize = "damage" if most_damage is None else "bytes"
        choice = choose(problem, budgets, minimize=minimize, most_damage=most_damage)
        chosen = zip(self._bundled(slots).values(), choice.pick, strict=True)
        picked = {slot.name: offers[slot.name][index] for part, index in chosen for slot in part}
        by_group: dict[str, float] = {}
        for slot in slots:
            by_group[slot.group] = by_group.get(slot.group, 0.0) + picked[slot.name].damage
        return Plan(picked, by_group, choice)

    def learn(self, group: str, measured: float, predicted: float) -> Prices:
        """These prices with the factor of ``group`` set to what was measured.

        A measurement within noise of nothing, or below it, teaches no more than that the factor is small.
        """
        if predicted <= 0:
            return self
        return replace(self, factors={**self.factors, group: min(50.0, max(0.02, measured / predicted))})


def _together(slots: Sequence[Slot], offers: Sequence[Prediction], prices: Prices) -> Offer:
    """One setting for all of ``slots``: costs and damages add up."""
    cost: dict[str, int] = {}
    for offer in offers:
        for name, value in offer.costs.items():
            cost[name] = cost.get(name, 0) + value
    damage = sum(offer.damage * prices.factors.get(slot.group, 1.0) for slot, offer in zip(slots, offers, strict=True))
    return Offer(label=label_of(offers[0]), cost=cost, damage=damage)


@dataclass(frozen=True)
class Plan:
    """One lever a slot.

    Attributes:
        picked: slot name -> the prediction that was picked.
        damage: group -> predicted damage in nats a token, before rescaling.
        choice: sums at current prices, and the proof.
    """

    picked: Mapping[str, Prediction]
    damage: Mapping[str, float]
    choice: Choice


def label_of(offer: Prediction) -> str:
    """A short name for people: "quantize.entropy bits=3.5"."""
    return "as it is" if offer.lever is None else label_of_lever(offer.lever)


def label_of_lever(lever: Any) -> str:
    """The same of a lever itself."""
    options = " ".join(f"{key}={value}" for key, value in options_of(lever).items())
    return f"{lever.lever_name} {options}".strip()
