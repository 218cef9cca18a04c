"""The average-parameter law: closed forms against the sum over steps, and a law recovered from its own runs."""

import numpy as np
import pytest
import scipy.integrate
from hypothesis import given
from hypothesis.strategies import floats, integers

from pennyweight import laws
from pennyweight.errors import DataError, OptionError
from pennyweight.laws.average import average_params, fit_sparse, mean_sparsity
from pennyweight.plan import pretraining
from pennyweight.train import sparsity_schedules as steps


@given(final=floats(0, 1), a=floats(0, 1), b=floats(0, 1), power=integers(1, 4))
def test_the_closed_form_is_the_integral(final, a, b, power):
    start, end = min(a, b), max(a, b)

    def zeros(t):
        if t < start:
            return 0.0
        return final if t >= end else final * (1 - (1 - (t - start) / (end - start)) ** power)

    integral = scipy.integrate.quad(zeros, 0, 1, points=[start, end])[0]
    assert mean_sparsity(final, start=start, end=end, power=power) == pytest.approx(integral, abs=1e-6)


@pytest.mark.parametrize(("ramp", "power"), [(steps.CubicSchedule, 3), (steps.LinearSchedule, 1)])
def test_a_schedule_of_fine_steps_comes_to_the_closed_form(ramp, power):
    schedule = ramp(final=0.8, start=250_000, end=750_000, every=1)
    assert steps.mean_sparsity(schedule, 1_000_000) == pytest.approx(mean_sparsity(0.8, power=power), abs=1e-6)
    assert schedule.mean(1_000_000) == pytest.approx(mean_sparsity(0.8, power=power), abs=1e-12)
    assert average_params(1e6, schedule, total=1_000_000) == pytest.approx(
        average_params(1e6, 0.8, power=power), rel=3e-6
    )
    assert average_params(1e6, 0.8) == pytest.approx(1e6 * (1 - 0.625 * 0.8))


def runs(by="average", noise=0.0):
    g = np.random.default_rng(0)
    rows = []
    for n0, sparsity, tokens in [
        (1e5, 0, 1e7), (2e5, 0, 1e7), (4e5, 0, 1e7), (8e5, 0, 1e7), (1e5, 0, 4e7), (4e5, 0, 4e7), (8e5, 0, 4e7),
        (4e5, 0.5, 1e7), (4e5, 0.8, 1e7), (8e5, 0.5, 1e7), (8e5, 0.9, 1e7), (8e5, 0.8, 4e7), (2e5, 0.6, 4e7),
        (2e5, 0, 2e6), (8e5, 0.5, 2e6),
    ]:  # fmt: skip
        size = {"average": n0 * (1 - 0.625 * sparsity), "final": n0 * (1 - sparsity), "initial": n0}[by]
        loss = 1.5 + 40 / size**0.35 + 200 / tokens**0.4
        rows.append({"N0": n0, "sparsity": sparsity, "D": tokens, "loss": loss * (1 + noise * g.standard_normal())})
    return rows


@pytest.mark.parametrize("by", ["average", "final", "initial"])
def test_the_size_that_the_runs_follow_is_told(by):
    found = fit_sparse(runs(by), starts=1024)
    assert found.best == by
    assert found.errors[by] < 0.2 * min(error for size, error in found.errors.items() if size != by)


def test_the_constants_come_back():
    found = fit_sparse(runs(), starts=2048)
    want = {"E": 1.5, "A": 40, "alpha": 0.35, "B": 200, "beta": 0.4}
    assert {name: found.law.constants[name] for name in want} == pytest.approx(want, rel=0.02)
    again = laws.law("average_params", **found.law.constants)
    assert float(again(N_avg=3e5, D=2e7)) == pytest.approx(1.5 + 40 / 3e5**0.35 + 200 / 2e7**0.4, rel=1e-4)
    assert laws.show("average_params").row == 6


def test_runs_of_one_length_have_a_law_in_size_alone():
    one = [row for row in runs() if row["D"] == 1e7]
    found = fit_sparse(one, starts=1024)
    assert found.best == "average"
    assert found.law.form.name == "power_const"


def test_a_plan_prices_sparse_runs_by_their_average():
    plan = pretraining.training("1e19")
    by_name = {one.name: one for one in plan.alternatives}
    dense, sparse = by_name["compute-optimal"], by_name["sparse pre-training to 75% zeros"]
    assert sparse.loss == pytest.approx(dense.loss, rel=1e-9)  # the same average, the same tokens
    assert sparse.train_flops == pytest.approx(dense.train_flops, rel=1e-9)
    assert sparse.params == pytest.approx(dense.params / (1 - 0.625 * 0.75), rel=1e-9)
    assert sparse.stored_params == pytest.approx(0.25 * sparse.params, rel=1e-9)
    assert average_params(sparse.params, 0.75) == pytest.approx(dense.params, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mean_sparsity(1.2), OptionError, "shares within 0 to 1"),
        (lambda: mean_sparsity(0.5, start=0.8, end=0.2), OptionError, "start <= end"),
        (lambda: average_params(1e6, 0.5, total=10), OptionError, "steps are of a schedule"),
        (lambda: average_params(1e6, steps.Constant(final=0.5)), OptionError, "needs total="),
        (lambda: fit_sparse([{"N0": 1, "D": 1}]), DataError, "no column loss, N_avg, N_final"),
        (lambda: fit_sparse([row for row in runs() if not row["sparsity"]]), DataError, "both kinds"),
        (lambda: fit_sparse(runs()[5:11:2]), DataError, "leave too few"),
    ],
)
def test_bad_runs_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
