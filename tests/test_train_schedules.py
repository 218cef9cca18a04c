"""Schedules against the numbers of their papers, closed forms and the laws that tie them together."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.errors import OptionError
from pennyweight.laws import lr
from pennyweight.train import schedules
from pennyweight.train.schedules import constant, cosine, cosine_loop, linear, power, wsd


@pytest.mark.parametrize(("done", "rate"), [(0, 0), (50, 0.005), (5000, 0.01), (9200, 0.005), (10_000, 3.125e-4)])
def test_wsd_gives_the_figures_of_minicpm(done, rate):
    assert wsd(10_000, 100, 0.1, "exp", peak=0.01, half_life=200)(done) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [(5e8, 0.0100), (5e9, 0.0200), (1e10, 0.016268), (3e10, 0.0092896), (57.6e9, 0.0066606), (64e9, 0.0)],
)
def test_power_gives_the_figures_of_its_paper(tokens, rate):
    schedule = power(512, total_tokens=64e9)
    assert schedule.unit == "tokens"
    assert schedule(tokens) == pytest.approx(rate, rel=5e-5, abs=1e-15)


def test_power_leaves_its_ceiling_where_the_law_says():
    schedule, switch = power(512), lr.switch(512)
    assert switch == pytest.approx(6.670e9, rel=1e-3)
    assert schedule(0.999 * switch) == 0.02
    assert schedule(1.01 * switch) < 0.02
    assert schedule(1e13) == pytest.approx(lr.power(1e13, 512, a=4.0), rel=1e-12)


def test_power_without_an_end_never_decays_and_may_be_decayed_anywhere():
    whole, open_ended = power(64, total_tokens=20e9, shape="1-sqrt"), power(64)
    branch = open_ended.decayed(18e9, 2e9, "1-sqrt")
    for tokens in (0, 3e8, 1e9, 7e9, 18e9, 18.5e9, 19.99e9, 20e9, 30e9):
        assert branch(tokens) == pytest.approx(whole(tokens), rel=1e-12, abs=1e-18)
    assert open_ended.total == math.inf


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("1-sqrt", 1 - math.sqrt(0.5)), ("exp", 0.5**2.5)])
def test_shapes_half_way_and_at_the_end(shape, half):
    schedule = wsd(1000, 10, 0.2, shape, peak=3.0)
    assert schedule(800) == 3.0
    assert schedule(900) == pytest.approx(3 * half, rel=1e-12)
    assert schedule(1000) == pytest.approx(3 / 32 if shape == "exp" else 0, abs=1e-12)
    assert schedule(5000) == schedule(1000)


def test_a_branch_of_the_stable_run_is_the_wsd_of_that_length():
    stable = constant(20, peak=0.1)
    for total in (100, 200, 400):
        branch, whole = stable.decayed(0.9 * total, 0.1 * total, "linear"), wsd(total, 20, 0.1, "linear", peak=0.1)
        assert [branch(s) for s in range(total + 1)] == [whole(s) for s in range(total + 1)]
        assert branch.total == total


@given(
    total=st.integers(10, 5000),
    warm=st.floats(0, 0.5),
    share=st.floats(0, 0.5),
    shape=st.sampled_from(["exp", "linear", "1-sqrt"]),
    floor=st.floats(0, 1),
)
def test_wsd_rises_rests_and_falls(total, warm, share, shape, floor):
    schedule = wsd(total, warm * total, share, shape, peak=2.0, floor=floor)
    rates = [schedule(done) for done in range(total + 1)]
    for done, (now, after) in enumerate(itertools.pairwise(rates)):
        if done + 1 <= warm * total:
            assert after >= now
        if done >= total - share * total:
            assert after <= now
    assert max(rates) <= 2.0 * (1 + 1e-12)
    assert min(rates[math.ceil(warm * total) :], default=2.0) >= 2.0 * floor * (1 - 1e-12)


def test_cosines_agree_until_the_first_minimum_and_part_there():
    once, again = cosine(110, 10, peak=2.0), cosine_loop(110, 10, peak=2.0)
    for done in range(111):
        assert once(done) == again(done)
    assert once(60) == pytest.approx(2 * 0.55)
    assert once(110) == pytest.approx(0.2)
    assert once(210) == once(110)
    assert again(160) == pytest.approx(2 * 0.55)
    assert again(210) == pytest.approx(2.0)


def test_cosine_is_that_of_torch():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.03)
    ours = cosine(50, peak=0.3, floor=0.1)
    for done in range(51):
        assert ours(done) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_linear_is_a_line():
    schedule = linear(100, 20, peak=4.0, floor=0.25)
    assert [schedule(done) for done in (0, 10, 20, 60, 100, 200)] == pytest.approx([0, 2, 4, 2.5, 1, 1])


def test_a_schedule_is_a_factor_in_anybodys_loop():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    theirs = torch.optim.lr_scheduler.LambdaLR(optimizer, wsd(10, 2, 0.2, "linear"))
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert seen == pytest.approx([0, 0.25, *[0.5] * 7, 0.25])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wsd(100, 95, 0.1), "95 of warm-up and 10 of decay do not fit into 100 steps"),
        (lambda: wsd(100, 0, 1.5), r"decay_frac = 1\.5"),
        (lambda: wsd(100, 0, -0.1), r"decay_frac = -0\.1"),
        (lambda: wsd(0, 0), "a length of 0"),
        (lambda: wsd(100, -1), "do not fit|warm-up"),
        (lambda: wsd(100, 0, shape="sine"), "give one of exp, linear, 1-sqrt"),
        (lambda: wsd(100, 0, shape="linear", half_life=5), "give exp a positive one"),
        (lambda: wsd(100, 0, peak=math.nan), "a positive rate"),
        (lambda: constant(unit="epochs"), "give steps or tokens"),
        (lambda: power(512, b=0.5), "give b < 0"),
        (lambda: power(512, total_tokens=1e9), "do not fit into 1e"),
        (lambda: cosine(10, 10), "leaves nothing of 10"),
        (lambda: linear(10, floor=2), "floor = 2"),
        (lambda: cosine(10).decayed(11, 1), "within 0 to 10"),
        (lambda: cosine(10).decayed(5, 0), "a positive length"),
        (lambda: cosine(10)(-1), "give 0 or more"),
        (lambda: cosine(10)(math.nan), "give 0 or more"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(OptionError, match=words):
        make()


def test_the_room_exports_its_names():
    import pennyweight.train as train

    assert train.schedules is schedules
    for name in train.__all__:
        assert getattr(train, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = train.nothing
