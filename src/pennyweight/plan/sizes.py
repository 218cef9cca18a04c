"""Which size at which width: the envelope of models that were trained, and the best of them for a budget.

Row 124. Source: A. Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", arXiv:2105.03536: a large
model of few bits is compared with a small one of many at equal cost, not only with itself; what counts is the lower
envelope over widths, depths and bits. Differs from the source: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pennyweight.errors import BudgetError, DataError
from pennyweight.plan.allocation import best_of


@dataclass(frozen=True)
class Trial:
    """A model that was trained and judged.

    Attributes:
        name: shown to people.
        cost: such as `measure.bit_macs.bit_macs`.
        harm: smaller is better: a loss, a share of errors.
        settings: width, depth, bits, ...
    """

    name: str
    cost: float
    harm: float
    settings: Mapping[str, Any] = field(default_factory=dict)


def envelope(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in cost and harm at once, by rising cost.

    Raises:
        DataError: none.
    """
    if not trials:
        raise DataError("envelope: no trials; train some sizes first")
    return [trials[index] for index in best_of([(one.cost, one.harm) for one in trials])]


def best_within(trials: Sequence[Trial], cost: float) -> Trial:
    """The trial of least harm that costs no more than ``cost``.

    Raises:
        BudgetError: all cost more; it says what the cheapest costs.
    """
    if not trials:
        raise DataError("best_within: no trials; train some sizes first")
    fitting = [one for one in envelope(trials) if one.cost <= cost]
    if not fitting:
        cheapest = min(trials, key=lambda one: one.cost)
        raise BudgetError(
            f"a cost of {cost:,.0f} cannot be met: the cheapest trial, {cheapest.name}, costs {cheapest.cost:,.0f}"
        )
    return fitting[-1]
