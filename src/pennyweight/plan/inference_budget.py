"""Splitting an inference budget over the stages of a pipeline: which model, and how many samples, for each.

Row 64. Source: F. Wang et al., "AgentTTS: Large Language Model Agent for Test-time Compute-optimal Scaling Strategy in
Complex Tasks", arXiv:2508.00890 (FairyFali/AgentTTS_Code). A stage of S samples costs, in samples of a 3B reference
with 128 prompt and 64 generated tokens, ((M/3e9) (prompt + S generated) - 128)/64. The search follows the paper's three
insights: each stage has a model of its own, scores saturate in S, and the budget is shared by what still gains.
Differs from the source: a rule-based proposer stands where a language model wrote proposals (any callable may), and the
exact integer program is there to compare with, which needs every stage's score instead of a few evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from pennyweight.elementwise import numbers
from pennyweight.errors import BudgetError, OptionError

_REFERENCE, _PROMPT, _GENERATED = 3e9, 128, 64


def cost(params: float, prompt_len: float, gen_len: float, samples: float = 1) -> float:
    """Budget units of ``samples`` samples on a model of ``params``: the prompt is paid once, generation each time."""
    return (params / _REFERENCE * (prompt_len + samples * gen_len) - _PROMPT) / _GENERATED


def samples_for(budget: float, params: float, prompt_len: float, gen_len: float) -> float:
    """Samples that ``budget`` units buy; the inverse of `cost`."""
    return ((_GENERATED * budget + _PROMPT) / (params / _REFERENCE) - prompt_len) / gen_len


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        models: parameters of the models it may use.
        prompt_len: tokens of its prompt.
        gen_len: tokens of a sample.
        scorer: score of (params, samples), larger is better; None when whole pipelines are evaluated instead.
    """

    models: Sequence[float]
    prompt_len: float
    gen_len: float
    scorer: Callable[[float, int], float] | None = None

    def __post_init__(self) -> None:
        try:
            sizes = tuple(float(params) for params in self.models)
        except (TypeError, ValueError):
            raise OptionError(f"Stage: models = {self.models!r}; give a list of parameter counts") from None
        if not sizes or any(not 0 < params < math.inf for params in sizes):
            raise OptionError(f"Stage: models = {list(sizes)!r}; give parameter counts above 0")
        object.__setattr__(self, "models", sizes)
        numbers("Stage", prompt_len=self.prompt_len, gen_len=self.gen_len)
        if not (0 < self.prompt_len < math.inf and 0 < self.gen_len < math.inf):
            raise OptionError(
                f"Stage: prompt_len = {self.prompt_len!r}, gen_len = {self.gen_len!r}; give positive lengths"
            )

    def cost(self, params: float, samples: float) -> float:
        """Budget units of a choice."""
        return cost(params, self.prompt_len, self.gen_len, samples)


#: (params, samples) for each stage.
Choice = tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Split:
    """A split of the budget.

    Attributes:
        choice: model and samples of each stage.
        score: of the whole.
        cost: budget units.
        evaluations: pipelines that were scored to find it.
        history: what was tried, in order.
        exact: whether it is the proven optimum.
    """

    choice: Choice
    score: float
    cost: float
    evaluations: int
    history: tuple[tuple[Choice, float], ...] = ()
    exact: bool = False


@dataclass
class _Search:
    stages: Sequence[Stage]
    budget: float
    evaluate: Callable[[Choice], float]
    most: int
    rng: np.random.Generator
    history: dict[Choice, float]

    def price(self, choice: Choice) -> float:
        return sum(s.cost(params, samples) for s, (params, samples) in zip(self.stages, choice, strict=True))

    def fits(self, choice: Choice) -> bool:
        return self.price(choice) <= self.budget + 1e-9

    def most_samples(self, choice: Choice, at: int, params: float) -> int:
        """Samples stage ``at`` can pay on ``params`` when the others keep their choice."""
        others = sum(s.cost(*c) for i, (s, c) in enumerate(zip(self.stages, choice, strict=True)) if i != at)
        stage = self.stages[at]
        bought = samples_for(self.budget - others, params, stage.prompt_len, stage.gen_len)
        return min(self.most, math.floor(bought + 1e-9))

    def put(self, choice: Choice, at: int, params: float, samples: int) -> Choice:
        return (*choice[:at], (params, samples), *choice[at + 1 :])

    def ranked(self) -> list[Choice]:
        return sorted(self.history, key=lambda c: (-self.history[c], self.price(c)))


def _first(search: _Search) -> list[Choice]:
    """Every model of every stage at one matched budget, the others at their largest affordable single sample."""
    cheapest = tuple((min(s.models), 1) for s in search.stages)
    if not search.fits(cheapest):
        raise BudgetError(
            f"test_time: a budget of {search.budget:g} units does not pay one sample of the smallest model in every "
            f"stage ({search.price(cheapest):.4g})"
        )
    rest = cheapest
    for at, stage in enumerate(search.stages):
        for params in sorted(stage.models, reverse=True):
            if search.fits(search.put(rest, at, params, 1)):
                rest = search.put(rest, at, params, 1)
                break
    found: dict[Choice, None] = {rest: None, cheapest: None}
    for at, stage in enumerate(search.stages):
        for base in (rest, cheapest):
            unit = min(stage.cost(max(stage.models), 1), search.budget - search.price(base) + stage.cost(*base[at]))
            for params in stage.models:
                samples = math.floor(samples_for(unit, params, stage.prompt_len, stage.gen_len) + 1e-9)
                samples = min(samples, search.most, search.most_samples(base, at, params))
                if samples >= 1:
                    found[search.put(base, at, params, samples)] = None
    return list(found)


def _insight(search: _Search, batch: int) -> list[Choice]:
    """Moves around the best so far: spend what is left, shift between stages, other models, and crossover."""
    ranked = search.ranked()
    best = ranked[0]
    found: list[Choice] = []
    for at, stage in enumerate(search.stages):
        for params in stage.models:  # insight 1: the stage's own model, paid with all that is left
            found.append(search.put(best, at, params, search.most_samples(best, at, params)))
        params, samples = best[at]
        for step in (2 * samples, samples + 10, samples + 1, samples // 2, samples - 10, samples - 1):
            found.append(search.put(best, at, params, step))  # insight 2: up to the knee, or back to it
    for give in range(len(search.stages)):  # insight 3: take from one stage what another can use
        params, samples = best[give]
        for less in {max(1, samples // 2), max(1, 3 * samples // 4), 1}:
            lean = search.put(best, give, params, less)
            for at, stage in enumerate(search.stages):
                if at != give:
                    for other in stage.models:
                        found.append(search.put(lean, at, other, search.most_samples(lean, at, other)))
    fresh = _usable(search, found)
    search.rng.shuffle(fresh)
    # half of them by how much of the budget they use, half as they come, then the evolutionary branch
    spending = sorted(fresh, key=lambda c: -search.price(c))[: max(1, (batch - 2) // 2)]
    chosen = spending + [c for c in fresh if c not in spending][: max(0, batch - 2 - len(spending))]
    chosen += [c for c in _usable(search, _evolve(search, ranked, 4 * batch)) if c not in chosen][: batch - len(chosen)]
    return chosen[:batch]


def _evolve(search: _Search, ranked: list[Choice], count: int) -> list[Choice]:
    weights = np.arange(len(ranked), 0, -1, dtype=float)
    found = []
    for _ in range(count):
        first, second = search.rng.choice(len(ranked), 2, p=weights / weights.sum())
        child = list(ranked[first])
        if search.rng.random() < 0.8:
            child = [a if search.rng.random() < 0.5 else b for a, b in zip(ranked[first], ranked[second], strict=True)]
        if search.rng.random() < 0.5:
            at = int(search.rng.integers(len(child)))
            params = float(search.rng.choice(np.asarray(search.stages[at].models, float)))
            child[at] = (params, child[at][1] + int(search.rng.integers(-10, 11)))
        found.append(tuple(child))
    return found


def _usable(search: _Search, choices: Sequence[Choice]) -> list[Choice]:
    found: dict[Choice, None] = {}
    for choice in choices:
        within = all(1 <= samples <= search.most for _, samples in choice)
        if within and choice not in search.history and search.fits(choice):
            found[choice] = None
    return list(found)


#: (history, stages, budget, batch) -> choices; those over budget or seen are dropped.
Proposer = Callable[[Sequence[tuple[Choice, float]], Sequence[Stage], float, int], Sequence[Choice]]


def split_budget(
    stages: Sequence[Stage],
    budget: float,
    iters: int = 5,
    batch: int = 10,
    proposer: Literal["insight", "random"] | Proposer = "insight",
    *,
    evaluate: Callable[[Choice], float] | None = None,
    max_samples: int = 60,
    max_evaluations: int | None = None,
    seed: int = 0,
) -> Split:
    """Search for the best split within ``budget`` units, scoring few whole pipelines.

    Args:
        stages: of the pipeline.
        budget: units, see `cost`.
        iters: rounds of proposals after the first candidates.
        batch: proposals a round.
        proposer: "insight" (the paper's three rules and its evolutionary branch), "random", or a callable.
        evaluate: score of a whole pipeline; by default the mean of the stages' scorers.
        max_samples: samples a stage at most.
        max_evaluations: pipelines scored at most; by default iters * batch and the first candidates.
        seed: of the proposer.

    Raises:
        BudgetError: the cheapest choice is over budget.
        OptionError: neither scorers nor ``evaluate``, or an unknown proposer.
    """
    numbers("test_time", budget=budget)
    if not stages or iters < 0 or batch < 1:
        raise OptionError(
            f"test_time: {len(stages)} stages, iters = {iters}, batch = {batch}; give at least 1, 0 and 1"
        )
    search = _Search(stages, budget, evaluate or _mean(stages), max_samples, np.random.default_rng(seed), {})
    first = _first(search)
    limit = max_evaluations if max_evaluations is not None else len(first) + iters * batch

    def score(choices: Sequence[Choice]) -> None:
        for choice in choices:
            if len(search.history) < limit and choice not in search.history:
                search.history[choice] = float(search.evaluate(choice))

    score(first if proposer != "random" else first[-1:])
    rounds = 0
    while rounds < iters and len(search.history) < limit:
        rounds += 1
        if proposer == "insight":
            proposals: Sequence[Choice] = _insight(search, batch)
        elif proposer == "random":
            proposals = _random(search, batch)
        elif callable(proposer):
            proposals = _usable(search, list(proposer(list(search.history.items()), stages, budget, batch)))
        else:
            raise OptionError(f"test_time: proposer = {proposer!r}; give 'insight', 'random' or a callable")
        if not proposals:
            break
        score(proposals[:batch])
    best = search.ranked()[0]
    found = tuple(search.history.items())
    return Split(best, search.history[best], search.price(best), len(found), found)


def _mean(stages: Sequence[Stage]) -> Callable[[Choice], float]:
    scorers = [stage.scorer for stage in stages]
    if any(scorer is None for scorer in scorers):
        raise OptionError("test_time: a stage has no scorer; give one to each, or evaluate= for whole pipelines")

    def evaluate(choice: Choice) -> float:
        return sum(s(*c) for s, c in zip(scorers, choice, strict=True) if s is not None) / len(scorers)

    return evaluate


def _random(search: _Search, count: int) -> list[Choice]:
    found: list[Choice] = []
    for _ in range(200 * count):
        choice = tuple(
            (float(search.rng.choice(np.asarray(s.models, float))), int(search.rng.integers(1, search.most + 1)))
            for s in search.stages
        )
        if choice not in found:
            found += _usable(search, [choice])
        if len(found) >= count:
            break
    return found


def exact(stages: Sequence[Stage], budget: float, *, max_samples: int = 60) -> Split:
    """The optimum of the mean of the stages' scores: a multiple-choice knapsack, solved by HiGHS to a gap of 0.

    Scores every model at every number of samples of every stage.

    Raises:
        BudgetError: no choice fits.
    """
    _mean(stages)
    items = [(i, p, n) for i, s in enumerate(stages) for p in s.models for n in range(1, max_samples + 1)]
    scores = np.array([float(stages[i].scorer(p, n)) for i, p, n in items])  # type: ignore[misc]
    prices = np.array([stages[i].cost(p, n) for i, p, n in items])
    one_each = np.array([[float(i == at) for i, _, _ in items] for at in range(len(stages))])
    found = milp(
        -scores,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(prices[None], -np.inf, budget)],
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise BudgetError(f"test_time: no choice of models and samples fits {budget:g} units")
    taken = [items[at] for at in np.flatnonzero(found.x > 0.5)]
    choice = tuple((p, n) for _, p, n in sorted(taken))
    price = float(prices[found.x > 0.5].sum())
    return Split(choice, float(scores[found.x > 0.5].mean()), price, len(items), exact=True)


#: Offered as `pennyweight.plan.test_time`; defined under a name that pytest does not take for a test.
test_time = split_budget
