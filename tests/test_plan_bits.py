"""Bits for every layer, by every searcher, against brute force; groups that are never added."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight import plan
from pennyweight.errors import BudgetError, DataError, OptionError
from pennyweight.plan.allocation import SEARCHES, Layers, average, best_of, bits, pareto, ranking, width_offer
from pennyweight.plan.decoupled import group_bits, metric_decoupled, shares

WIDTHS = (8, 4, 2)


def made(seed: int, layers: int, widths: tuple[int, ...] = WIDTHS, *, pairs: float = 0.0) -> tuple[Layers, dict]:
    """Random layers with scores that grow fourfold a bit; interactions of either sign, as large as ``pairs`` scores."""
    g = np.random.default_rng(seed)
    counts = {f"layer {n}": int(g.integers(10, 400)) for n in range(layers)}
    weight = {name: g.lognormal(0, 1) for name in counts}
    offers = {
        name: [width_offer(weight[name] * 4.0**-b, b, count=count, macs=3 * count) for b in widths]
        for name, count in counts.items()
    }
    total = layers * len(widths)
    root = np.sqrt([offer.damage for one in offers.values() for offer in one])
    raw = g.normal(size=(total, total))
    between = pairs * (raw + raw.T) * np.outer(root, root)
    return Layers(offers, pairs=between if pairs else None), counts


def brute(layers: Layers, budgets: dict[str, int]) -> tuple[float, tuple[int, ...]] | None:
    """The least score by looking at every pick."""
    best = None
    for pick in itertools.product(*(range(len(one)) for one in layers.offers.values())):
        if all(layers.problem.total(pick, name) <= limit for name, limit in budgets.items()):
            offers = [one[i] for one, i in zip(layers.offers.values(), pick, strict=True)]
            score = sum(offer.damage for offer in offers)
            if layers.pairs is not None:
                at = np.cumsum([0, *map(len, layers.offers.values())])[:-1] + pick
                score += sum(layers.pairs[a, b] for a, b in itertools.combinations(at, 2))
            if best is None or score < best[0]:
                best = (score, pick)
    return best


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 8), target=st.floats(2.0, 8.0))
@settings(max_examples=30, deadline=None)
def test_the_program_finds_what_brute_force_finds(seed, layers, target):
    found, counts = made(seed, layers)
    budgets = {"bits": average(target, counts)}
    if budgets["bits"] < 2 * sum(counts.values()):
        return
    allocation = bits(found, budgets)
    assert allocation.score == pytest.approx(brute(found, budgets)[0], rel=1e-9)
    assert allocation.cost["bits"] <= budgets["bits"]
    assert allocation.certificate.status == "optimal"
    assert set(allocation.labels.values()) <= {"8 bits", "4 bits", "2 bits"}


@given(seed=st.integers(0, 10**6), target=st.floats(2.2, 7.0), pairs=st.floats(0.05, 0.5))
@settings(max_examples=15, deadline=None)
def test_the_quadratic_program_finds_what_brute_force_finds(seed, target, pairs):
    found, counts = made(seed, 5, pairs=pairs)
    budgets = {"bits": average(target, counts), "bit_macs": int(1.05 * 16 * 3 * target * sum(counts.values()))}
    allocation = bits(found, budgets, search="exact")
    assert allocation.score == pytest.approx(brute(found, budgets)[0], rel=1e-7)
    assert all(allocation.cost[name] <= limit for name, limit in budgets.items())
    assert allocation.certificate.bound <= allocation.score + 1e-9


def test_without_interactions_the_two_programs_agree():
    found, counts = made(3, 7)
    zero = Layers(found.offers, pairs=np.zeros((21, 21)))
    budgets = {"bytes": 3 * sum(counts.values()) // 8}
    assert bits(zero, budgets, search="exact").score == pytest.approx(bits(found, budgets).score)


@given(seed=st.integers(0, 10**6), pairs=st.sampled_from([0.0, 0.3]))
@settings(max_examples=20, deadline=None)
def test_greedy_meets_the_budget_near_the_optimum_and_leaves_no_room_that_helps(seed, pairs):
    found, counts = made(seed, 6, pairs=pairs)
    budgets = {"bits": average(4.0, counts)}
    allocation = bits(found, budgets, search="greedy")
    best, _ = brute(found, budgets)
    start = found.score((2,) * 6)
    assert allocation.cost["bits"] <= budgets["bits"]
    assert best - 1e-12 <= allocation.score <= best + 0.25 * abs(start - best) + 1e-12
    pick = tuple(allocation.pick.values())
    for layer, index in itertools.product(range(6), range(3)):
        moved = (*pick[:layer], index, *pick[layer + 1 :])
        assert found.problem.total(moved, "bits") > budgets["bits"] or found.score(moved) >= allocation.score - 1e-12


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_step_is_the_difference_of_two_scores(seed):
    found, _ = made(seed, 5, pairs=0.4)
    g = np.random.default_rng(seed)
    pick = tuple(int(i) for i in g.integers(0, 3, 5))
    layer, index = int(g.integers(5)), int(g.integers(3))
    moved = (*pick[:layer], index, *pick[layer + 1 :])
    assert found.step(pick, layer, index) == pytest.approx(found.score(moved) - found.score(pick), abs=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 7, 8, 23])
def test_bisection_finds_the_longest_prefix_and_asks_no_oftener_than_it_must(layers):
    found, _ = made(layers, layers, widths=(16, 8, 4))
    asked = []

    def measure(pick):
        asked.append(pick)
        return found.score(tuple(pick.values()))  # the floor is on the score itself: the oracle can be counted

    limit = 0.4 * found.score((2,) * layers)
    allocation = bits(found, search="bisect", measure=measure, most_harm=limit)
    assert allocation.evaluations == len(asked) <= 2 * math.ceil(math.log2(layers + 1))
    assert found.score(tuple(allocation.pick.values())) <= limit
    pick = (0,) * layers
    for width in (1, 2):  # the oracle goes one by one
        order = sorted((n for n in range(layers) if pick[n] == width - 1), key=lambda n: found.step(pick, n, width))
        for n in order:
            moved = (*pick[:n], width, *pick[n + 1 :])
            if found.score(moved) > limit:
                break
            pick = moved
    assert tuple(allocation.pick.values()) == pick


def test_a_measured_floor_needs_more_than_a_mean_below_it():
    found, _ = made(1, 8, widths=(8, 4))
    g = np.random.default_rng(0)
    noise = g.normal(size=12)
    noise -= noise.mean()

    def measure(pick):
        return sum(pick.values()) / 8 + noise

    sure = bits(found, search="bisect", measure=measure, most_harm=0.51)
    mean = bits(found, search="bisect", measure=measure, most_harm=0.51, level=None)
    assert sum(mean.pick.values()) == 4  # 4/8 is below 0.51, but twelve such noisy samples do not show it
    assert sum(sure.pick.values()) < 4
    assert sure.verdict is None or sure.verdict.upper < 0.51


def test_interactions_change_the_order_of_layers():
    offers = {name: [width_offer(0, 8, count=1), width_offer(s, 4, count=1)] for s, name in enumerate("abc", 1)}
    pairs = np.zeros((6, 6))
    pairs[1, 3] = pairs[3, 1] = 5.0  # a and b hurt together
    found = Layers(offers, pairs=pairs)
    assert ranking(Layers(offers), (0, 0, 0), [0, 1, 2], 1) == [0, 1, 2]
    assert ranking(found, (0, 0, 0), [0, 1, 2], 1, order="greedy") == [0, 2, 1]
    assert ranking(found, (0, 0, 0), [0, 1, 2], 1, order="static") == [2, 0, 1]  # 3, 1 + 5/2, 2 + 5/2


def test_scores_are_divided_by_what_a_step_saves():
    offers = {
        "large": [width_offer(0, 8, count=100), width_offer(2.0, 4, count=100)],
        "small": [width_offer(0, 8, count=10), width_offer(1.0, 4, count=10)],
    }
    assert ranking(Layers(offers), (0, 0), [0, 1], 1) == [1, 0]
    assert ranking(Layers(offers), (0, 0), [0, 1], 1, per="bits") == [0, 1]


def test_the_curve_is_the_best_at_each_of_its_costs():
    found, _ = made(5, 5)
    curve = pareto(found)
    for point in curve:
        assert point.score == pytest.approx(brute(found, {"bits": point.cost["bits"]})[0])
    assert best_of([(2, 1.0), (1, 2.0), (3, 1.0), (1, 2.0), (2, 3.0)]) == [1, 0]


def test_protected_layers_keep_their_mildest_setting():
    found, counts = made(11, 10)
    worst = max(found.offers, key=lambda name: found.offers[name][-1].damage)
    small = {"bits": 2 * sum(counts.values()) + 6 * counts[worst]}
    assert bits(found, small, protect=0.01).pick[worst] == 0
    assert bits(found, small, protect=0.01).cost["bits"] <= small["bits"]


def test_groups_are_solved_by_themselves_and_never_added():
    found, counts = made(2, 6)
    groups = {name: "content" if n % 2 else "quality" for n, name in enumerate(found.offers)}
    # content is in a unit a million times as large: an allocation of the sum would spend everything there
    offers = {
        name: [width_offer(o.damage * (1e6 if groups[name] == "content" else 1), b, count=counts[name])
               for o, b in zip(one, WIDTHS, strict=True)]
        for name, one in found.offers.items()
    }  # fmt: skip
    layers = Layers(offers, groups=groups)
    sizes = {g: sum(counts[name] for name in counts if groups[name] == g) for g in ("content", "quality")}
    budgets = {g: {"bits": 4 * size} for g, size in sizes.items()}
    allocation = bits(layers, budgets)
    for group in sizes:
        some = Layers({name: offers[name] for name in offers if groups[name] == group})
        best, _ = brute(some, budgets[group])
        assert allocation.scores[group] == pytest.approx(best)
    assert allocation.score is None
    with pytest.raises(OptionError, match="a budget each"):
        bits(layers, {"bits": 100})


def test_shares_between_two_groups_keep_the_mean_and_the_best_measured_is_taken():
    assert group_bits(4.0, 1.0, 30, 70) == pytest.approx((4.0, 4.0))
    content, quality = group_bits(4.0, 1.3, 30, 70)
    assert content == pytest.approx(1.3 * quality)
    assert (30 * content + 70 * quality) / 100 == pytest.approx(4.0)
    found, counts = made(4, 8)
    layers = Layers(found.offers, groups={name: "ab"[n % 2] for n, name in enumerate(found.offers)})
    every = list(shares(layers, counts, 4.0))
    assert len(every) > 3
    assert all(one.cost["bits"] <= average(4.0, counts) for _, _, one in every)
    # measured by something the scores know nothing of: layer 0 must be wide
    best, tried = metric_decoupled(layers, counts, 4.0, lambda pick: pick["layer 0"] + 1e-3 * sum(pick.values()))
    assert len(tried) == len(every)
    assert best.figure == min(one.figure for one in tried)
    with pytest.raises(BudgetError, match="no share"):
        metric_decoupled(layers, counts, 1.0, lambda pick: 0.0)


def test_costs_of_a_width():
    offer = width_offer(0.5, 3, count=101, macs=200, activation_bits=8, overhead_bits=32)
    assert offer.cost == {"bits": 335, "bytes": 42, "bit_macs": 4800, "macs": 200}
    assert offer.label == "W3A8"
    assert plan.bits is bits


def test_what_does_not_go_together_is_said():
    found, _ = made(0, 3)
    paired = Layers(found.offers, pairs=np.zeros((9, 9)))
    with pytest.raises(BudgetError, match="cannot be met"):
        bits(found, {"bits": 3})
    with pytest.raises(BudgetError, match="smallest"):
        bits(paired, {"bits": 3}, search="exact")
    with pytest.raises(BudgetError, match="harsher settings"):
        bits(found, {"bits": 3}, search="greedy")
    with pytest.raises(OptionError, match="cannot see pairs"):
        bits(paired, {"bits": 3000})
    with pytest.raises(OptionError, match="give measure"):
        bits(found, search="bisect")
    with pytest.raises(OptionError, match="measures nothing"):
        bits(found, {"bits": 3000}, most_harm=0.1)
    with pytest.raises(OptionError, match="needs a budget"):
        bits(found)
    with pytest.raises(OptionError, match=", ".join(SEARCHES)):
        bits(found, {"bits": 1}, search="random")
    with pytest.raises(OptionError, match="share of the layers"):
        bits(found, {"bits": 1}, protect=1.0)
    with pytest.raises(DataError, match="no layers"):
        bits({}, {"bits": 1})
    with pytest.raises(DataError, match=r"give finite \(9, 9\)"):
        Layers(found.offers, pairs=np.zeros((3, 3)))
    with pytest.raises(DataError, match="not symmetric"):
        Layers(found.offers, pairs=np.triu(np.ones((9, 9))))
    with pytest.raises(BudgetError, match="allow more harm"):
        bits(found, {"bits": 3}, search="bisect", measure=lambda pick: float(sum(pick.values())), most_harm=1.0)
    with pytest.raises(DataError, match="overflows"):
        bits(found, search="bisect", measure=lambda pick: float("nan"), most_harm=1.0)
