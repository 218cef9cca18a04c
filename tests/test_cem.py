"""The cross-entropy method against brute force, against planted optima, and against drawing blindly."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp

from pennyweight.errors import BudgetError, OptionError
from pennyweight.plan import Choice, Span, cross_entropy


def brute_force(space, loss):
    return min(loss(dict(zip(space, values, strict=True))) for values in itertools.product(*space.values()))


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_the_best_of_all_settings_that_act_on_each_other(seed):
    rng = np.random.default_rng(seed)
    alone, pairs = rng.normal(size=(7, 4)), 0.5 * rng.normal(size=(7, 7, 4, 4))
    space = {f"layer {index}": range(4) for index in range(7)}

    def loss(setting):
        at = list(setting.values())
        return sum(alone[i, a] for i, a in enumerate(at)) + sum(
            pairs[i, j, at[i], at[j]] for i in range(7) for j in range(i)
        )

    found = cross_entropy(space, loss, evaluations=2500, samples=200, seed=seed)
    assert found.loss == pytest.approx(brute_force(space, loss))  # of 16,384
    assert found.loss == loss(found.best)
    assert found.evaluations <= 2500
    assert list(found.history) == sorted(found.history, reverse=True)


def test_it_beats_blind_draws_on_a_knapsack_and_comes_near_the_exact_one():
    rng = np.random.default_rng(0)
    weight, gain = rng.uniform(1, 2, 24), rng.uniform(1, 2, 24)
    room = 0.5 * weight.sum()

    def loss(setting):
        taken = np.array(list(setting.values()))
        return -float(gain @ taken) if weight @ taken <= room else math.inf  # half of all settings cannot be

    space = {f"item {index}": (0, 1) for index in range(24)}
    found = cross_entropy(space, loss, evaluations=3000, samples=150, seed=1)
    exact = milp(-gain, constraints=LinearConstraint(weight[None], -np.inf, room), integrality=1, bounds=Bounds(0, 1))
    assert 0.98 * exact.fun >= found.loss >= exact.fun - 1e-9
    blind = random.Random(2)
    drawn = min(loss({name: blind.randint(0, 1) for name in space}) for _ in range(found.evaluations))
    assert found.loss < 1.02 * drawn < 0


@pytest.mark.parametrize("log", [False, True])
def test_it_finds_the_planted_optimum_of_a_quadratic_within_five_percent(log):
    planted = {"a": 0.31, "b": 7.0}

    def loss(setting):
        far = {
            name: math.log(setting[name] / planted[name]) if log else setting[name] - planted[name] for name in planted
        }
        return far["a"] ** 2 + far["a"] * far["b"] + far["b"] ** 2

    found = cross_entropy({"a": Span(0.01, 1, log=log), "b": Span(1, 100, log=log)}, loss, evaluations=1500)
    for name, value in planted.items():
        assert found.best[name] == pytest.approx(value, rel=0.05)


def test_a_small_space_is_searched_whole_and_no_setting_is_evaluated_twice():
    seen = []

    def loss(setting):
        seen.append(tuple(setting.values()))
        return -seen[-1][0] * seen[-1][1]

    found = cross_entropy({"a": (1, 2, 3), "b": Choice((2, -1))}, loss, evaluations=6, samples=30, floor=0.5)
    assert len(seen) == len(set(seen)) == found.evaluations == 6
    assert found.best == {"a": 3, "b": 2}
    assert found.loss == -6


def test_the_same_seed_finds_the_same_and_another_one_draws_otherwise():
    costs = np.random.default_rng(0).normal(size=(5, 5))
    space = {str(row): range(5) for row in range(5)}

    def loss(setting):
        columns = list(setting.values())  # a column twice is dearer than anything
        return float(costs[range(5), columns].sum()) + 5 * (5 - len(set(columns)))

    first, second, third = (cross_entropy(space, loss, evaluations=1500, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert first.history != third.history
    rows, columns = linear_sum_assignment(costs)
    assert first.loss == pytest.approx(costs[rows, columns].sum())


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(BudgetError, match=r"none of 4 settings drawn is possible; widen the space"):
        cross_entropy({"a": range(4)}, lambda setting: math.nan, evaluations=50)
    with pytest.raises(OptionError, match="0 settings, samples = 100"):
        cross_entropy({}, lambda setting: 0.0)
    with pytest.raises(OptionError, match=r"elite = 1\.5"):
        cross_entropy({"a": (1, 2)}, lambda setting: 0.0, elite=1.5)
    with pytest.raises(OptionError, match=r"choices \[1, 1\]; give at least one, no two equal"):
        cross_entropy({"a": (1, 1)}, lambda setting: 0.0)
    with pytest.raises(OptionError, match="low > 0 for a logarithm"):
        Span(0.0, 1.0, log=True)
