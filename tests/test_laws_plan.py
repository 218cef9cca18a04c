"""Planners that rest on laws: inference budgets, augmentation, width for memory."""

import math

import numpy as np
import pytest

from pennyweight import laws, plan
from pennyweight.errors import BudgetError, DataError, OptionError
from pennyweight.laws.qat import QATLaw
from pennyweight.plan import augmentation_arms, inference_budget

MODELS = (3e9, 8e9, 70e9)


def saturating(seed):
    g = np.random.default_rng(seed)
    made = {m: (g.uniform(0.3, 0.6) + 0.1 * i, g.uniform(0.1, 0.4), g.uniform(3, 15)) for i, m in enumerate(MODELS)}
    return lambda params, samples: made[params][0] + made[params][1] * (1 - math.exp(-(samples - 1) / made[params][2]))


def pipeline(seed):
    return [plan.Stage(MODELS, 512, 64, saturating(10 * seed)), plan.Stage(MODELS, 256, 128, saturating(10 * seed + 1))]


@pytest.mark.parametrize(
    ("params", "prompt", "generated", "samples", "units"),
    [
        (72e9, 2048, 128, 1, 814), (70e9, 256, 64, 1, 344 / 3), (70e9, 1024, 64, 1, 1184 / 3),
        (70e9, 1024, 256, 1, 1394 / 3), (70e9, 1024, 2048, 1, 1118), (3e9, 128, 64, 7, 7),
    ],
)  # fmt: skip
def test_cost_of_samples(params, prompt, generated, samples, units):
    assert inference_budget.cost(params, prompt, generated, samples) == pytest.approx(units)
    assert inference_budget.samples_for(units, params, prompt, generated) == pytest.approx(samples)


def test_search_nears_the_exact_optimum_and_beats_chance():
    near = better = 0
    for seed in range(10):
        stages = pipeline(seed)
        best = inference_budget.exact(stages, 400)
        found = plan.test_time(stages, 400, iters=10, max_evaluations=50, seed=seed)
        chance = plan.test_time(stages, 400, iters=10, max_evaluations=50, seed=seed, proposer="random")
        assert found.evaluations <= 50
        assert chance.evaluations == found.evaluations
        assert found.cost <= 400
        assert found.score <= best.score + 1e-12
        near += found.score >= 0.98 * best.score
        better += found.score >= chance.score
    assert near >= 8
    assert better >= 8


def test_exact_program_is_the_best_of_all():
    stages = pipeline(3)
    best = inference_budget.exact(stages, 400, max_samples=12)
    choices = [[(m, n, s.cost(m, n), s.scorer(m, n)) for m in MODELS for n in range(1, 13)] for s in stages]
    brute = max(a[3] + b[3] for a in choices[0] for b in choices[1] if a[2] + b[2] <= 400) / 2
    assert best.score == pytest.approx(brute, abs=1e-9)
    assert best.cost == pytest.approx(sum(s.cost(*c) for s, c in zip(stages, best.choice, strict=True)))


def test_search_takes_whole_pipelines_and_other_proposers():
    stages = [plan.Stage((3e9, 8e9), 128, 64), plan.Stage((3e9,), 128, 64)]
    seen = []

    def evaluate(choice):
        seen.append(choice)
        return -abs(choice[0][1] - 4) - abs(choice[1][1] - 3) - (choice[0][0] > 3e9)

    def proposer(history, stages, budget, batch):
        return [((3e9, n), (3e9, m)) for n in range(1, 7) for m in range(1, 7)][: 4 * batch]

    found = plan.test_time(stages, 9, evaluate=evaluate, proposer=proposer, iters=8)
    assert found.choice == ((3e9, 4), (3e9, 3))
    assert len(seen) == len(set(seen)) == found.evaluations
    with pytest.raises(OptionError, match="a stage has no scorer"):
        plan.test_time(stages, 9)
    with pytest.raises(BudgetError, match="does not pay one sample of the smallest model"):
        plan.test_time(stages, 1.5, evaluate=evaluate)
    with pytest.raises(OptionError, match="proposer = 'best'"):
        plan.test_time(stages, 9, evaluate=evaluate, proposer="best")


def test_augmentation_by_rule_of_thumb():
    chosen = [plan.augmentation(100, budget).strategy for budget in (200, 1000, 5000)]
    assert chosen == ["answer", "rephrase", "new"]
    found = plan.augmentation(100, 5000)
    assert found.examples == 2500
    assert found.queries_per_seed == 50
    assert "rule of thumb" in found.reason
    with pytest.raises(BudgetError, match="pays no example"):
        plan.augmentation(100, 0.5)
    with pytest.raises(OptionError, match="no arm is called 'more'"):
        plan.augmentation(100, 50, {"more": 1.0})


def test_augmentation_from_pilots_finds_the_crossover():
    truth = {"answer": (1.2, 0.35, 0.6, 0.5), "rephrase": (0.9, 0.28, 0.9, 0.45), "new": (0.3, 0.1, 2.0, 0.4)}

    def error(arm, seeds, examples):
        a, alpha, b, beta = truth[arm]
        return a * seeds**-alpha + b * examples**-beta

    g = np.random.default_rng(0)
    cells = [(s, e) for s in (50, 150, 500) for e in (100, 300, 1000, 4000)]
    pilots = {
        arm: [
            {"seeds": s, "examples": e, "error": error(arm, s, e) * math.exp(0.005 * g.standard_normal())}
            for s, e in cells
        ]
        for arm in truth
    }
    arms = augmentation_arms.fit_arms(pilots)
    right, total = 0, 0
    for seeds in (80, 200, 400):
        for budget in np.geomspace(100, 20000, 12):
            best = min(truth, key=lambda arm: error(arm, seeds, math.floor(budget / augmentation_arms.QUERIES[arm])))
            right += plan.augmentation(seeds, budget, arms=arms).strategy == best
            total += 1
    assert right / total >= 0.8
    switch = augmentation_arms.crossover(arms, 200, "answer", "new")
    assert error("answer", 200, switch / 1) == pytest.approx(error("new", 200, switch / 2), rel=0.05)
    with pytest.raises(DataError, match="have no column error"):
        augmentation_arms.fit_arms({"new": [{"seeds": 1, "examples": 2}]})


def test_width_for_memory_is_the_best_of_its_list():
    constants = {
        "E": 1.8, "beta": 2000.0, "gamma": 0.36, "zeta": 400.0, "eta": 0.34, "theta": 0.5, "kappa": 1.0, "phi": 60.0,
        "chi": 0.9, "psi": 0.15, "omega": 0.4, "lambda": 3.0, "mu": 0.5, "nu": 0.1, "xi": 0.3, "rho": 0.2,
    }  # fmt: skip
    law = laws.Law(laws.forms.find("qat"), constants)
    planned = QATLaw(law, law)
    found = plan.bits_for_memory(5e7, 1e10, law=planned)
    assert found.params == 5e7 * 8 / found.bits
    for bits in (1, 2, 3, 4, 6, 8):
        for share in (0.05, 0.3, 0.6, 0.9):
            assert float(planned.loss(5e7 * 8 / bits, (1 - share) * 1e10, share * 1e10, bits)) >= found.loss - 1e-12
    with pytest.raises(BudgetError, match="0 bytes"):
        plan.bits_for_memory(0, 1e10, law=planned)
