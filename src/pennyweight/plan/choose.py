"""Choose one offer for every slot: a multiple-choice knapsack under several budgets at once, solved by HiGHS.

A slot is a place in the model (a matrix, a tied embedding, a block that may be dropped); an offer is what could stand
there, with its exact integer costs and its predicted damage in nats. The solver minimizes damage under the budgets, or
one cost under a ceiling on damage; sums are checked in exact integers before a solution is handed out.

Source: P. Sinha and A. Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979 (the problem, and
the hull that `frontier` follows); Q. Huangfu and J. Hall, "Parallelizing the dual revised simplex method", 2018
(HiGHS).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from pennyweight.errors import BudgetError, DataError
from pennyweight.units import show_whole

Pick = tuple[int, ...]


@dataclass(frozen=True)
class Offer:
    """What could stand in a slot.

    Attributes:
        label: shown to people ("4.0 bits").
        cost: exact integers by resource ("bytes", "params", "flops", ...).
        damage: predicted increase of the loss, in nats a token.
    """

    label: str
    cost: Mapping[str, int]
    damage: float


@dataclass(frozen=True)
class Certificate:
    """What the solver proved.

    Attributes:
        status: "optimal", or "gap" where the time limit came first.
        bound: no choice has less damage (or cost) than this.
        gap: (found - bound) / found.
        seconds: spent solving.
        binding: the budgets with less than one further step of room left.
    """

    status: str
    bound: float
    gap: float
    seconds: float
    binding: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """One offer a slot, with the sums and the proof."""

    pick: Pick
    damage: float
    cost: dict[str, int]
    certificate: Certificate


@dataclass(frozen=True)
class Problem:
    """Slots with their offers, and costs that no choice changes.

    Attributes:
        slots: name -> offers, at least one each.
        fixed: costs of everything that is not a slot (norms, biases), by resource.
    """

    slots: Mapping[str, Sequence[Offer]]
    fixed: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, offers in self.slots.items():
            if not offers:
                raise DataError(f"planner: {name} has no offer; allow a lever that applies to it")
            for offer in offers:
                if not math.isfinite(offer.damage):
                    raise DataError(f"planner: {name}, {offer.label}: predicted damage is {offer.damage}")

    @cached_property
    def _flat(self) -> list[Offer]:
        return [offer for offers in self.slots.values() for offer in offers]

    @cached_property
    def _first(self) -> list[int]:
        sizes = [len(offers) for offers in self.slots.values()]
        return [0, *np.cumsum(sizes).tolist()]

    def total(self, pick: Pick, resource: str) -> int:
        """The exact cost of ``pick``, everything fixed included."""
        chosen = (offers[index] for offers, index in zip(self.slots.values(), pick, strict=True))
        return sum(offer.cost.get(resource, 0) for offer in chosen) + self.fixed.get(resource, 0)

    def damage(self, pick: Pick) -> float:
        """Predicted damage of ``pick`` in nats a token."""
        return math.fsum(offers[i].damage for offers, i in zip(self.slots.values(), pick, strict=True))

    def least(self, resource: str) -> int:
        """The smallest cost any choice has."""
        return sum(min(o.cost.get(resource, 0) for o in s) for s in self.slots.values()) + self.fixed.get(resource, 0)

    def resources(self) -> tuple[str, ...]:
        """Every resource some offer has a cost in, sorted."""
        return tuple(sorted({name for offer in self._flat for name in offer.cost}))


def choose(
    problem: Problem,
    budgets: Mapping[str, int],
    *,
    minimize: str = "damage",
    most_damage: float | None = None,
    seconds: float = 30.0,
    gap: float = 1e-5,
) -> Choice:
    """The choice of least damage under ``budgets``; or of least ``minimize`` (a resource) with at most ``most_damage``.

    Args:
        problem: slots and offers.
        budgets: resource -> most that may be used, the fixed part included.
        minimize: "damage", or a resource.
        most_damage: ceiling on predicted damage, in nats a token.
        seconds: time limit; the certificate then says how far from the optimum the choice can be.
        gap: relative gap at which the solver may stop.

    Raises:
        BudgetError: no choice meets the budgets, with the smallest feasible value of each, what binds and what
            relaxing it buys.
    """
    began = time.perf_counter()
    kept = _undominated(problem, [*budgets] + ([minimize] if minimize != "damage" else []))
    flat, offers = np.concatenate(kept), problem._flat
    slot = np.repeat(np.arange(len(kept)), [len(part) for part in kept])
    one_each = csr_matrix((np.ones(len(flat)), (slot, np.arange(len(flat)))), shape=(len(kept), len(flat)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    damage = np.array([offers[i].damage for i in flat])
    costs = {name: np.array([offers[i].cost.get(name, 0) for i in flat], dtype=float) for name in problem.resources()}
    room = {name: limit - problem.fixed.get(name, 0) for name, limit in budgets.items()}
    for name, limit in room.items():
        row = csr_matrix(costs.get(name, np.zeros(len(flat))) / max(abs(limit), 1))
        constraints.append(LinearConstraint(row, -np.inf, limit / max(abs(limit), 1)))  # rows near one
    if most_damage is not None:
        scale = max(abs(most_damage), 1e-12)
        constraints.append(LinearConstraint(csr_matrix(damage / scale), -np.inf, most_damage / scale))
    objective = damage if minimize == "damage" else costs[minimize]
    unit = float(np.abs(objective).max()) or 1.0
    with _hushed():
        found = milp(
            objective / unit, constraints=constraints, integrality=np.ones(len(flat)), bounds=Bounds(0, 1),
            options={"time_limit": seconds, "mip_rel_gap": gap, "presolve": True},
        )  # fmt: skip
    if found.x is None:
        raise BudgetError(_useful_no(problem, budgets, most_damage))
    pick = _within(problem, _pick(problem, kept, found.x), budgets)
    if pick is None:
        raise BudgetError(_useful_no(problem, budgets, most_damage))
    value = problem.damage(pick) if minimize == "damage" else float(problem.total(pick, minimize))
    bound = float(found.mip_dual_bound if found.mip_dual_bound is not None else found.fun) * unit
    bound += 0.0 if minimize == "damage" else problem.fixed.get(minimize, 0)
    certificate = Certificate(
        status="optimal" if found.status == 0 else "gap",
        bound=bound,
        gap=max(0.0, (value - bound) / abs(value)) if value else 0.0,
        seconds=time.perf_counter() - began,
        binding=tuple(name for name, limit in budgets.items() if _binds(problem, pick, name, limit)),
    )
    return Choice(
        pick, problem.damage(pick), {name: problem.total(pick, name) for name in problem.resources()}, certificate
    )


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on standard output: HiGHS prints lines of its heuristics there whatever ``disp`` says."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def frontier(problem: Problem, resource: str = "bytes") -> list[tuple[int, float, Pick]]:
    """The convex frontier (cost, damage, pick) from cheapest to dearest, all of it from one sorted pass.

    Every point is optimal at its own cost (it solves the Lagrangian relaxation exactly); between two neighbors lies at
    most one slot's step, which `choose` fills in.
    """
    hulls = [_hull(offers, resource) for offers in problem.slots.values()]
    pick = [hull[0] for hull in hulls]
    steps = []
    for slot, (hull, offers) in enumerate(zip(hulls, problem.slots.values(), strict=True)):
        for before, after in pairwise(hull):
            more = offers[after].cost.get(resource, 0) - offers[before].cost.get(resource, 0)
            steps.append(((offers[before].damage - offers[after].damage) / more, slot, after))
    points = [(problem.total(tuple(pick), resource), problem.damage(tuple(pick)), tuple(pick))]
    # within a slot gains fall along the hull, so the global order keeps each slot's own order
    for _, slot, after in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        pick[slot] = after
        points.append((problem.total(tuple(pick), resource), problem.damage(tuple(pick)), tuple(pick)))
    return points


def _hull(offers: Sequence[Offer], resource: str) -> list[int]:
    """Indices on the lower convex hull of (cost, damage), by rising cost."""
    order = sorted(range(len(offers)), key=lambda i: (offers[i].cost.get(resource, 0), offers[i].damage, i))
    hull: list[int] = []
    for index in order:
        cost, damage = offers[index].cost.get(resource, 0), offers[index].damage
        if hull and damage >= offers[hull[-1]].damage:
            continue
        while len(hull) >= 2:
            a, b = offers[hull[-2]], offers[hull[-1]]
            across = (b.cost.get(resource, 0) - a.cost.get(resource, 0)) * (damage - a.damage)
            if across > (cost - a.cost.get(resource, 0)) * (b.damage - a.damage):
                break
            hull.pop()
        hull.append(index)
    return hull


def _undominated(problem: Problem, resources: Sequence[str]) -> list[NDArray[np.int64]]:
    """Flat indices of each slot's offers that no other offer beats or equals everywhere."""
    kept = []
    for start, offers in zip(problem._first, problem.slots.values(), strict=False):
        table = np.array([[o.damage, *(float(o.cost.get(name, 0)) for name in resources)] for o in offers])
        no_worse = (table[:, None, :] <= table[None, :, :]).all(2)
        same = no_worse & no_worse.T
        beaten = (no_worse & ~same).any(0) | np.triu(same, 1).any(0)  # of equals the first stays
        kept.append(start + np.flatnonzero(~beaten))
    return kept


def _within(problem: Problem, pick: Pick, budgets: Mapping[str, int]) -> Pick | None:
    """``pick``, or its nearest by single swaps that keeps every budget to the last unit; None if there is none.

    HiGHS works in floating point with a tolerance of a millionth of a row; one byte over is over.
    """
    slots = list(problem.slots.values())
    for name, limit in budgets.items():
        while (over := problem.total(pick, name) - limit) > 0:
            swaps = []
            for slot, offers in enumerate(slots):
                now = offers[pick[slot]]
                for index, other in enumerate(offers):
                    saved = now.cost.get(name, 0) - other.cost.get(name, 0)
                    others_kept = all(other.cost.get(r, 0) <= now.cost.get(r, 0) for r in budgets)
                    if saved > 0 and others_kept:
                        # enough in one swap first, then what costs least for what it saves
                        worse = other.damage - now.damage
                        swaps.append((saved < over, worse if saved >= over else worse / saved, slot, index))
            if not swaps:
                return None
            _, _, slot, index = min(swaps)
            pick = (*pick[:slot], index, *pick[slot + 1 :])
    return pick


def _pick(problem: Problem, kept: Sequence[NDArray[np.int64]], x: NDArray[np.float64]) -> Pick:
    def indices() -> Iterator[int]:
        at = 0
        for start, part in zip(problem._first, kept, strict=False):
            yield int(part[int(np.argmax(x[at : at + len(part)]))]) - start
            at += len(part)

    return tuple(indices())


def _binds(problem: Problem, pick: Pick, resource: str, limit: int) -> bool:
    """Whether some slot's next better offer would not fit any more."""
    spare = limit - problem.total(pick, resource)
    for offers, index in zip(problem.slots.values(), pick, strict=True):
        now = offers[index]
        for other in offers:
            if other.damage < now.damage and other.cost.get(resource, 0) - now.cost.get(resource, 0) > spare:
                return True
    return False


def _useful_no(problem: Problem, budgets: Mapping[str, int], most_damage: float | None) -> str:
    """What is asked, the smallest that is feasible, the slots that weigh most there, and what relaxing buys."""
    lines = []
    for name, limit in budgets.items():
        least = problem.least(name)
        if least > limit:
            biggest = max(problem.slots, key=lambda slot: min(o.cost.get(name, 0) for o in problem.slots[slot]))
            share = min(o.cost.get(name, 0) for o in problem.slots[biggest])
            lines.append(
                f"{show_whole(name, limit)} cannot be met: the smallest choice needs {_bare(name, least)}, "
                f"{_bare(name, share)} of it {biggest}; "
                f"raise the budget or allow levers that make {biggest} smaller"
            )
    if not lines and most_damage is not None:
        best = min(problem.damage(pick) for _, _, pick in frontier(problem, next(iter(budgets), "bytes")))
        lines.append(
            f"a predicted damage of {most_damage:.4g} nats a token cannot be met together with "
            f"{', '.join(show_whole(name, limit) for name, limit in budgets.items()) or 'these offers'}; the least "
            f"possible without budgets is {best:.4g}"
        )
    if not lines:
        asked = " and ".join(show_whole(name, limit) for name, limit in budgets.items())
        smallest = ", ".join(show_whole(name, problem.least(name)) for name in budgets)
        lines.append(f"{asked} cannot be met together (each alone could: smallest {smallest}); relax one of them")
    return "; ".join(lines)


def _bare(name: str, value: int) -> str:
    """The same without its resource."""
    return show_whole(name, value).removesuffix(f" of {name}").removesuffix(f" {name}")
