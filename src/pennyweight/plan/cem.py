"""Search by the cross-entropy method: draw settings, keep the best, draw the next ones as the best were.

Row 122. Source: F. Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative
AI", arXiv:2410.18441, who tunes hyper-parameters by it; the method as in P.-T. de Boer et al., "A Tutorial on the
Cross-Entropy Method", Annals of Operations Research 134, 2005: independent distributions, refitted to the elite share
by maximum likelihood and smoothed. Differs from the source: a setting is never evaluated twice; probabilities of
choices and widths of spans have a floor, so that nothing is ruled out for good by one bad draw; a search that has
narrowed down begins anew with what evaluations are left; where too few of a round's settings are possible to fill the
elite, the step towards them is as much smaller.

No assumption on what is searched: settings may act on each other, and may be impossible (an infinite loss). Where the
losses of parts add up, `pennyweight.plan.choose` is exact and faster.

This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pennyweight.errors import BudgetError, OptionError

#: A round with a smaller share of new settings is stale; so many in a row, and the search begins anew.
_NEW, _STALE = 0.1, 3
#: Rounds in a row without anything new that end a search of a space too large to count off.
_PATIENCE = 30


@dataclass(frozen=True)
class Choice:
    """One of several values, drawn with a probability each.

    Args:
        values: at least one, no two equal.
    """

    values: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) < len(self.values):
            raise OptionError(f"cross_entropy: choices {list(self.values)}; give at least one, no two equal")


@dataclass(frozen=True)
class Span:
    """A number between two others, drawn from a normal distribution cut off at both.

    Args:
        low, high: the ends, finite.
        log: whether its logarithm is what is drawn; needs a positive ``low``.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        if not (finite and self.low < self.high) or (self.log and self.low <= 0):
            raise OptionError(f"cross_entropy: {self}; give low < high, and low > 0 for a logarithm")


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: the setting of least loss among those evaluated.
        loss: its loss.
        evaluations: settings evaluated.
        history: least loss after each round; it never rises.
    """

    best: dict[str, Any]
    loss: float
    evaluations: int
    history: tuple[float, ...]


def cross_entropy(
    space: Mapping[str, Sequence[Any] | Choice | Span],
    loss: Callable[[dict[str, Any]], float],
    *,
    evaluations: int = 1000,
    samples: int = 100,
    elite: float = 0.1,
    smoothing: float = 0.5,
    floor: float = 0.05,
    seed: int = 0,
) -> Search:
    """Look for the setting of least loss.

    Args:
        space: what is set, and to what: a list of values, or a `Choice` or `Span`.
        loss: of a setting, lower is better; infinite for one that cannot be. Where most cannot be, a penalty that grows
            with how far off they are guides the search, and infinity does not.
        evaluations: losses computed at most.
        samples: settings drawn in a round.
        elite: share of a round that the next distribution is fitted to.
        smoothing: share of the new distribution; the rest stays the old one.
        floor: least probability of a choice, times their number. (The deviation of a span stays above 0.1 % of it.)
        seed: of the draws.

    The search ends when ``evaluations`` are spent, or every setting of the space is known: it is then exact.

    Raises:
        OptionError: an empty space, or options out of range.
        BudgetError: no setting that was drawn is possible.
    """
    if not space or samples < 2 or evaluations < 1 or not 0 < elite < 1 or not 0 < smoothing <= 1 or floor < 0:
        raise OptionError(
            f"cross_entropy: {len(space)} settings, samples = {samples}, evaluations = {evaluations}, elite = {elite}, "
            f"smoothing = {smoothing}, floor = {floor}; give a space, at least 2 samples and 1 evaluation, and shares "
            "between 0 and 1"
        )
    rng = np.random.default_rng(seed)
    draws = {name: _drawer(one, floor) for name, one in space.items()}
    known: dict[tuple[Hashable, ...], float] = {}
    history: list[float] = []
    settings = math.inf if any(isinstance(one, Span) for one in space.values()) else _count(draws.values())
    stale = idle = 0
    while len(known) < min(evaluations, settings) and idle < _PATIENCE:
        before = len(known)
        drawn = [tuple(draw.one(rng) for draw in draws.values()) for _ in range(samples)]
        fresh = list(dict.fromkeys(setting for setting in drawn if setting not in known))
        for setting in fresh[: evaluations - before]:
            value = float(loss(dict(zip(draws, setting, strict=True))))
            known[setting] = math.inf if math.isnan(value) else value
        idle = idle + 1 if len(known) == before else 0
        stale = stale + 1 if len(fresh) < _NEW * samples else 0
        history.append(min(known.values()))
        # ties by the order drawn: what is seen twice counts twice, as the likelihood has it
        possible = [setting for setting in drawn if known.get(setting, math.inf) < math.inf]
        possible.sort(key=known.__getitem__)
        wanted = max(1, round(elite * samples))
        best = possible[:wanted]
        for place, draw in enumerate(draws.values()):
            if best:
                draw.refit([setting[place] for setting in best], smoothing * len(best) / wanted)
        if stale == _STALE:
            stale, draws = 0, {name: _drawer(one, floor) for name, one in space.items()}
    least = min(known, key=known.__getitem__)
    if math.isinf(known[least]):
        raise BudgetError(
            f"cross_entropy: none of {len(known)} settings drawn is possible; widen the space or spend more evaluations"
        )
    return Search(dict(zip(space, least, strict=True)), known[least], len(known), tuple(history))


class _Choices:
    def __init__(self, choice: Choice, floor: float) -> None:
        self.values = choice.values
        count = len(choice.values)
        self.probability: NDArray[np.float64] = np.full(count, 1 / count)
        self.floor = min(floor, 1.0) / count

    def one(self, rng: Generator) -> Hashable:
        return self.values[int(rng.choice(len(self.values), p=self.probability))]

    def refit(self, chosen: Sequence[Hashable], smoothing: float) -> None:
        share = np.array([sum(value == one for one in chosen) for value in self.values]) / len(chosen)
        mixed = np.maximum(smoothing * share + (1 - smoothing) * self.probability, self.floor)
        self.probability = mixed / mixed.sum()


class _Spans:
    def __init__(self, span: Span) -> None:
        self.span = span
        self.low, self.high = (math.log(end) if span.log else end for end in (span.low, span.high))
        self.mean, self.deviation = (self.low + self.high) / 2, (self.high - self.low) / 2
        self.floor = 1e-3 * (self.high - self.low)

    def one(self, rng: Generator) -> float:
        drawn = min(max(rng.normal(self.mean, self.deviation), self.low), self.high)
        return self._shown(drawn)

    def _shown(self, inner: float) -> float:
        return min(max(math.exp(inner), self.span.low), self.span.high) if self.span.log else inner

    def refit(self, chosen: Sequence[Any], smoothing: float) -> None:
        inner = np.array([math.log(one) if self.span.log else one for one in chosen])
        self.mean += smoothing * (float(inner.mean()) - self.mean)
        self.deviation = max(self.deviation + smoothing * (float(inner.std()) - self.deviation), self.floor)


def _count(draws: Iterable[_Choices | _Spans]) -> float:
    return math.prod(len(draw.values) for draw in draws if isinstance(draw, _Choices))


def _drawer(one: Sequence[Any] | Choice | Span, floor: float) -> _Choices | _Spans:
    if isinstance(one, Span):
        return _Spans(one)
    return _Choices(one if isinstance(one, Choice) else Choice(tuple(one)), floor)
