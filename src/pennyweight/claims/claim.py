"""The contract of a claim, and the registry.

A claim is a function that runs a row's method beside its baseline on a real small model in one process, and hands back
both figures, the control and a verdict. The margin is fixed before the run, the control has the same budget, and a
`holds` that stays true when the method is swapped for a no-op is a bug.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from pennyweight import rows as rows_here
from pennyweight.errors import OptionError

if TYPE_CHECKING:
    from pennyweight.claims.assets import Assets

Pace = Literal["quick", "slow"]
#: How long a claim may take on two cores, in seconds.
PACES: dict[Pace, float] = {"quick": 20.0, "slow": 600.0}


@dataclass(frozen=True)
class Outcome:
    """What a claim found.

    Args:
        method: the figure of the row's method.
        baseline: the figure without it, at the same budget.
        unit: of both figures, and of the control's.
        holds: the verdict.
        lower_is_better: whether a smaller figure is the better one.
        control: what the same budget buys the plain way, in words, and its figure; said even where it wins.
        interval: the confidence interval of ``method`` where there is sampling.
        notes: what a reader must know of the run.
    """

    method: float
    baseline: float
    unit: str
    holds: bool
    lower_is_better: bool = True
    control: tuple[str, float] | None = None
    interval: tuple[float, float] | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        # a NaN compares false with everything, so that a verdict built on one may well say "holds"
        figures = (self.method, self.baseline, *(self.control[1:] if self.control else ()))
        assert all(math.isfinite(figure) for figure in figures), f"a figure is not finite: {figures}"


Check = Callable[["Assets"], Outcome]
CheckType = TypeVar("CheckType", bound=Check)


@dataclass(frozen=True)
class Claim:
    """A registered claim.

    Attributes:
        row: the row it is about.
        name: of the function: what it says, in words.
        room: the room of its row.
        pace: "quick" (< 20 s on 2 cores) or "slow" (< 10 minutes).
        headline: the paper's own figure, and where it stands.
        check: the function.
        text: the first line of its module.
    """

    row: int
    name: str
    room: str
    pace: Pace
    headline: str
    check: Check
    text: str


_REGISTRY: dict[str, Claim] = {}


def claim(*, row: int, pace: Pace, headline: str) -> Callable[[CheckType], CheckType]:
    """Register a claim about ``row``; its name is the function's.

    Args:
        row: its row in `pennyweight rows`.
        pace: "quick" or "slow"; see `PACES`.
        headline: the paper's own figure, and where it stands.
    """
    assert pace in PACES, pace

    def register(check: CheckType) -> CheckType:
        name, module = check.__name__, sys.modules[check.__module__]
        known = _REGISTRY.get(name)
        assert known is None or known.check.__module__ == check.__module__, f"claim {name} registered twice"
        line = (module.__doc__ or "").strip().partition("\n")[0]
        _REGISTRY[name] = Claim(row, name, rows_here.row(row).room, pace, headline, check, line)
        return check

    return register


def claims(rows: Iterable[int] | None = None) -> tuple[Claim, ...]:
    """Every claim, or those about ``rows``, by row and name.

    Raises:
        OptionError: a row without a claim.
    """
    import pennyweight.claims as street

    for room in pkgutil.iter_modules(street.__path__):
        if room.ispkg:
            module = importlib.import_module(f"{street.__name__}.{room.name}")
            for file in pkgutil.iter_modules(module.__path__):
                importlib.import_module(f"{module.__name__}.{file.name}")
    found = sorted(_REGISTRY.values(), key=lambda one: (one.row, one.name))
    if rows is None:
        return tuple(found)
    wanted, there = list(rows), {one.row for one in found}
    missing = [row for row in wanted if row not in there]
    if missing:
        known = ", ".join(map(str, sorted(there)))
        raise OptionError(f"no claim is about row {', '.join(map(str, missing))}; rows with claims: {known}")
    return tuple(one for one in found if one.row in wanted)
