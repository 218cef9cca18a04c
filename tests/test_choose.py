"""The planner's knapsack against brute force, dynamic programming and its own bounds."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import BudgetError, DataError
from pennyweight.plan.choose import Offer, Problem, choose, frontier


def random_problem(seed: int, slots: int, offers: int, resources: tuple[str, ...] = ("bytes",)) -> Problem:
    g = np.random.default_rng(seed)
    made = {}
    for slot in range(slots):
        bits = np.sort(g.uniform(1, 8, offers))
        size, weight = int(g.integers(1_000, 100_000)), g.uniform(0.01, 1)
        made[f"slot {slot}"] = [
            Offer(f"{b:.1f}", {r: int(size * b * g.uniform(0.9, 1.1)) for r in resources}, weight * 4.0**-b)
            for b in bits
        ]
    return Problem(made, {"bytes": 1234})


@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_no_choice_is_better_by_brute_force(seed: int, share: float) -> None:
    problem = random_problem(seed, 4, 4, ("bytes", "flops"))
    low, high = problem.least("bytes"), sum(max(o.cost["bytes"] for o in s) for s in problem.slots.values()) + 1234
    budgets = {"bytes": int(low + share * (high - low)), "flops": int(1.3 * problem.least("flops"))}
    feasible = [
        pick
        for pick in itertools.product(range(4), repeat=4)
        if all(problem.total(pick, name) <= limit for name, limit in budgets.items())
    ]
    if not feasible:
        with pytest.raises(BudgetError, match="cannot be met"):
            choose(problem, budgets)
        return
    found = choose(problem, budgets)
    assert found.damage == pytest.approx(min(problem.damage(pick) for pick in feasible), rel=1e-4)
    assert all(found.cost[name] <= limit for name, limit in budgets.items())
    assert found.certificate.bound <= found.damage * (1 + 1e-9)


def test_smallest_above_a_floor_is_the_other_question() -> None:
    problem = random_problem(7, 5, 4)
    ceiling = 0.05
    best = min(
        problem.total(pick, "bytes")
        for pick in itertools.product(range(4), repeat=5)
        if problem.damage(pick) <= ceiling
    )
    found = choose(problem, {}, minimize="bytes", most_damage=ceiling)
    assert found.cost["bytes"] == best
    assert found.damage <= ceiling


def test_every_frontier_point_is_optimal_at_its_cost() -> None:
    problem = random_problem(3, 6, 5)
    points = frontier(problem)
    costs, damages = [p[0] for p in points], [p[1] for p in points]
    assert costs == sorted(costs)
    assert damages == sorted(damages, reverse=True)
    assert costs[0] == problem.least("bytes")
    for cost, damage, pick in points[::3]:
        assert problem.total(pick, "bytes") == cost
        assert choose(problem, {"bytes": cost}).damage == pytest.approx(damage, rel=1e-4)


def test_the_last_byte_counts() -> None:
    problem = Problem({"a": [Offer("big", {"bytes": 10**15 + 1}, 0.0), Offer("small", {"bytes": 10**15}, 1.0)]})
    assert choose(problem, {"bytes": 10**15}).pick == (1,)
    assert choose(problem, {"bytes": 10**15 + 1}).pick == (0,)


def test_a_large_model_is_planned_within_a_minute() -> None:
    problem = random_problem(0, 560, 12)
    began = time.perf_counter()
    found = choose(problem, {"bytes": int(0.5 * (problem.least("bytes") + frontier(problem)[-1][0]))})
    assert time.perf_counter() - began < 60
    assert found.certificate.gap < 1e-3


def test_a_no_names_the_smallest_feasible_value_and_what_binds() -> None:
    problem = Problem(
        {"embedding": [Offer("16 bits", {"bytes": 56}, 0.0)], "rest": [Offer("4 bits", {"bytes": 40}, 0.1)]},
        {"bytes": 3},
    )
    with pytest.raises(BudgetError, match=r"60 bytes cannot be met: the smallest choice needs 99, 56 of it embedding"):
        choose(problem, {"bytes": 60})


def test_ties_take_the_first_offer_and_empty_slots_are_refused() -> None:
    same = [Offer("first", {"bytes": 5}, 0.5), Offer("second", {"bytes": 5}, 0.5)]
    assert choose(Problem({"a": same}), {"bytes": 9}).pick == (0,)
    with pytest.raises(DataError, match="a has no offer"):
        Problem({"a": []})
    with pytest.raises(DataError, match="predicted damage is nan"):
        Problem({"a": [Offer("x", {}, float("nan"))]})
