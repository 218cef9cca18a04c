"""Which way to spend teacher queries: more answers, rephrased questions, or new questions.

Row 89. Source: Y. Chan et al., "Balancing Cost and Effectiveness of Synthetic Data Generation Strategies for LLMs",
arXiv:2409.19759: few queries a seed favor answer augmentation, many favor new questions, rephrasing lies between. Where
the changes come is not a number of the paper; here they are found from pilot cells, err = a seeds^-alpha + b
examples^-beta for each arm, and without pilots a rule of thumb decides and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pennyweight import laws
from pennyweight.elementwise import numbers
from pennyweight.errors import BudgetError, DataError, OptionError

Strategy = Literal["answer", "rephrase", "new"]
ARMS: tuple[Strategy, ...] = ("answer", "rephrase", "new")
#: Teacher queries an example: an answer is one, a rephrased or new question must be asked and then answered.
QUERIES: Mapping[str, float] = {"answer": 1.0, "rephrase": 2.0, "new": 2.0}
#: Without pilots: up to the first, answers; from the second on, new questions. Queries a seed.
RULE = (5.0, 20.0)


@dataclass(frozen=True)
class Augmentation:
    """A recommended strategy.

    Attributes:
        strategy: the arm.
        examples: what the budget buys of it.
        queries_per_seed: the ratio the choice turns on.
        predicted: error of each arm, from pilots; None by rule of thumb.
        reason: in words.
    """

    strategy: Strategy
    examples: int
    queries_per_seed: float
    predicted: Mapping[str, float] | None
    reason: str


def fit_arms(pilots: Mapping[str, Any], **options: Any) -> dict[str, laws.Law]:
    """The law of each arm from pilot cells.

    Args:
        pilots: for each arm, rows or columns with seeds, examples and error.
        options: passed to `pennyweight.laws.fit`.
    """
    found: dict[str, laws.Law] = {}
    for arm, rows in pilots.items():
        if arm not in ARMS:
            raise OptionError(f"augmentation: no arm is called {arm!r}; there are {', '.join(ARMS)}")
        if not hasattr(rows, "keys"):
            listed = list(rows)
            rows = {name: [row[name] for row in listed] for name in (listed[0] if listed else ())}
        if missing := [name for name in ("seeds", "examples", "error") if name not in rows]:
            raise DataError(f"augmentation: pilots of {arm} have no column {', '.join(missing)}")
        table = {"N": rows["seeds"], "D": rows["examples"], "loss": rows["error"]}
        found[arm] = laws.fit(table, "reference", holdout=False, **options)
    return found


def augmentation(
    seeds: int, budget: float, costs: Mapping[str, float] | None = None, *, arms: Mapping[str, laws.Law] | None = None
) -> Augmentation:
    """The arm to spend ``budget`` on.

    Args:
        seeds: seed questions there are.
        budget: in the unit of ``costs``.
        costs: price of one example of each arm; teacher queries (1, 2, 2) by default.
        arms: laws of `fit_arms`; without them the rule of thumb decides.

    Raises:
        BudgetError: not one example can be paid.
    """
    if costs is not None and not isinstance(costs, Mapping):
        raise OptionError(f"augmentation: costs = {costs!r}; give a price for each of {', '.join(ARMS)}, by name")
    prices = dict(QUERIES if costs is None else costs)
    numbers("augmentation", seeds=seeds, budget=budget, **{f"cost of {arm}": price for arm, price in prices.items()})
    if not math.isfinite(budget) or not math.isfinite(seeds):
        raise OptionError(f"augmentation: seeds = {seeds!r}, budget = {budget!r}; give finite numbers")
    if unknown := [arm for arm in prices if arm not in ARMS]:
        raise OptionError(f"augmentation: no arm is called {unknown[0]!r}; there are {', '.join(ARMS)}")
    if seeds < 1 or not prices or any(not price > 0 for price in prices.values()):
        raise OptionError(
            f"augmentation: seeds = {seeds!r}, costs = {prices!r}; give at least one seed and positive costs"
        )
    bought = {arm: math.floor(budget / price) for arm, price in prices.items()}
    if max(bought.values()) < 1:
        raise BudgetError(
            f"augmentation: a budget of {budget:g} pays no example; the cheapest costs {min(prices.values()):g}"
        )
    unit = prices.get("answer", min(prices.values()))
    ratio = budget / unit / seeds
    if arms is None:
        wanted: Strategy = "answer" if ratio <= RULE[0] else "new" if ratio >= RULE[1] else "rephrase"
        offered: list[Strategy] = [arm for arm in (wanted, "rephrase", "answer", "new") if bought.get(arm, 0) >= 1]
        reason = f"rule of thumb at {ratio:.3g} queries a seed (answers to {RULE[0]:g}, new questions from {RULE[1]:g})"
        chosen = offered[0]
        return Augmentation(chosen, bought[chosen], ratio, None, reason + "; fit_arms on pilots decides better")
    predicted = {
        arm: float(arms[arm](N=seeds, D=bought[arm])) for arm in ARMS if arm in arms and bought.get(arm, 0) >= 1
    }
    if not predicted:
        raise OptionError("augmentation: none of the fitted arms has a cost the budget pays")
    best = min(predicted, key=lambda arm: predicted[arm])
    words = ", ".join(f"{arm} {error:.4g}" for arm, error in predicted.items())
    return Augmentation(best, bought[best], ratio, predicted, f"least predicted error: {words}")  # type: ignore[arg-type]


def crossover(
    arms: Mapping[str, laws.Law], seeds: int, first: str, second: str, costs: Mapping[str, float] | None = None
) -> float | None:
    """The budget from which ``second`` has the smaller predicted error, between 1 and 1e9 queries; None when never."""
    prices = QUERIES if costs is None else costs
    budgets = np.geomspace(max(prices[first], prices[second]), 1e9, 4001)
    gap = arms[first](N=seeds, D=budgets / prices[first]) - arms[second](N=seeds, D=budgets / prices[second])
    ahead = gap > 0
    if not ahead[-1]:
        return None
    behind = np.flatnonzero(~ahead)
    return float(budgets[0] if not behind.size else budgets[behind[-1] + 1])
