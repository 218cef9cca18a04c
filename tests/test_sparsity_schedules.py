"""Sparsity schedules against their closed forms, and scores and selections against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, sampled_from
from problems import problem

from pennyweight.errors import DataError, OptionError
from pennyweight.solvers import scores
from pennyweight.solvers.masks import Selection
from pennyweight.statistics import NO_STATISTICS
from pennyweight.train.sparsity_schedules import (
    Constant,
    CubicSchedule,
    Frames,
    LinearSchedule,
    average_params,
    between_plateaus,
    geometric,
    halving,
    mean_sparsity,
)

RAMPS = (CubicSchedule, LinearSchedule)


@given(
    ramp=sampled_from(RAMPS), final=floats(0, 1), share=floats(0, 1), start=integers(0, 300), length=integers(1, 300),
    rest=integers(0, 300),
)  # fmt: skip
def test_the_mean_is_the_integral(ramp, final, share, start, length, rest):
    schedule = ramp(final=final, initial=share * final, start=start, end=start + length, every=1)
    total = start + length + rest
    found = mean_sparsity(schedule, total)
    # each step of the way lags the smooth ramp by less than the rise over that step
    assert found <= schedule.mean(total) + 1e-9
    assert found >= schedule.mean(total) - (final - share * final) / total - 1e-9


@pytest.mark.parametrize(("ramp", "share"), [(CubicSchedule, 0.625), (LinearSchedule, 0.5)])
def test_from_a_quarter_to_three_quarters_the_average_is_the_closed_form(ramp, share):
    schedule = between_plateaus(400_000, 0.8, ramp=ramp, intervals=200_000)
    assert (schedule.start, schedule.end, schedule.every) == (100_000, 300_000, 1)
    assert schedule.mean(400_000) == pytest.approx(share * 0.8, abs=1e-12)
    assert average_params(schedule, 1e6, 400_000) == pytest.approx(1e6 * (1 - share * 0.8), rel=5e-6)


@given(total=integers(2, 5000), before=floats(0, 0.5), after=floats(0, 0.49), intervals=integers(1, 60))
def test_plateaus_are_as_long_as_asked(total, before, after, intervals):
    if total - round(before * total) - round(after * total) < 1:
        return
    schedule = between_plateaus(total, 0.9, before=before, after=after, intervals=intervals)
    assert schedule.end == total - round(after * total)
    assert round(before * total) <= schedule.start < round(before * total) + max(1, schedule.every)
    assert (schedule.sparsity(schedule.start), schedule.sparsity(total)) == (0.0, 0.9)


def test_a_constant_is_one():
    once, often = Constant(final=0.5, start=3), Constant(final=0.5, start=3, every=4)
    assert [once.sparsity(step) for step in (0, 2, 3, 99)] == [0, 0, 0.5, 0.5]
    assert [step for step in range(20) if once.chooses(step)] == [3]
    assert [step for step in range(20) if often.chooses(step)] == [3, 7, 11, 15, 19]
    assert mean_sparsity(once, 10) == pytest.approx(0.35) == once.mean(10)
    for wrong in ({"final": 1.5}, {"final": 0.5, "start": -1}, {"final": 0.5, "every": 0}):
        with pytest.raises(OptionError, match="give a share of zeros"):
            Constant(**wrong)


def test_frames_are_the_documented_sequences():
    assert halving(1, 8) == [(7, 8), (4, 8), (2, 8), (1, 8)]
    assert halving(1, 16) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert halving(2, 4) == [(3, 4), (2, 4)]
    assert geometric(1, 8) == [(8, 64), (4, 32), (2, 16), (1, 8)]
    for wrong in ((3, 8), (8, 8), (0, 8)):
        with pytest.raises(OptionError, match="times a power of two"):
            halving(*wrong)


def test_frames_share_the_steps():
    frames = Frames(patterns=halving(1, 8), start=10, end=50)
    assert [frames.pattern(step) for step in (9, 10, 19, 20, 30, 40, 49, 50, 1000)] == [
        None, (7, 8), (7, 8), (4, 8), (2, 8), (1, 8), (1, 8), (1, 8), (1, 8),
    ]  # fmt: skip
    assert frames.sparsity(9) == 0
    assert frames.sparsity(35) == 0.75
    assert not frames.chooses(9)
    assert frames.chooses(10)
    with pytest.raises(OptionError, match="a step for each of 4 patterns"):
        Frames(patterns=halving(1, 8), start=0, end=3)
    with pytest.raises(OptionError, match="0 < kept < of"):
        Frames(patterns=[(4, 4)], start=0, end=3)


def test_schedules_without_room_are_refused():
    with pytest.raises(OptionError, match="60% before and 50% after leave -10 of 100 steps"):
        between_plateaus(100, 0.9, before=0.6, after=0.5)
    with pytest.raises(OptionError, match="0 steps; give 1 or more"):
        mean_sparsity(Constant(final=0.5), 0)
    with pytest.raises(OptionError, match="a run of 5 steps, and the ramp ends at 9"):
        CubicSchedule(final=0.5, start=0, end=9, every=1).mean(5)


# ---- scores


def test_obs_score_is_the_error_of_the_best_repair():
    matrix, statistics = problem(5, 12)
    moment = statistics.second_moment.double() + 0.01 * statistics.second_moment.diagonal().mean() * torch.eye(12)
    found = scores.sparsegpt(matrix, statistics)
    for column in (0, 5, 11):
        others = [c for c in range(12) if c != column]
        # min over changes d of the others of (d - w e_c) H (d - w e_c)^T
        w = matrix[:, column].double()
        d = torch.linalg.solve(moment[others][:, others], moment[others, column][:, None] * w)
        left = torch.zeros(12, 5).double()
        left[others], left[column] = d, -w
        expected = (left * (moment @ left)).sum(0)
        torch.testing.assert_close(found[:, column].double(), expected, rtol=1e-4, atol=0)


def test_with_uncorrelated_inputs_obs_is_wanda_squared():
    matrix, statistics = problem(5, 12)
    alone = scores.Gradients(second_moment=statistics.second_moment.diagonal().diag())
    torch.testing.assert_close(
        scores.sparsegpt(matrix, alone, damping=0.0), scores.wanda(matrix, alone).square(), rtol=1e-5, atol=0
    )


def test_nowag_does_not_see_the_scale_of_rows_or_columns():
    matrix, statistics = problem(6, 12)
    matrix[2], matrix[:, 3] = 0, 0
    normed, rows, columns = scores.normalized(matrix)
    torch.testing.assert_close(normed * rows * columns, matrix)
    torch.testing.assert_close(normed.norm(dim=1)[[0, 1, 3, 4, 5]], torch.ones(5))
    scaled = matrix * torch.tensor([1, 5, 1, 9, 1, 0.1])[:, None]
    assert not torch.allclose(scores.nowag(scaled, statistics), scores.nowag(matrix, statistics))  # columns come first
    by_columns = matrix * torch.linspace(0.1, 5, 12)
    torch.testing.assert_close(scores.nowag(by_columns, statistics), scores.nowag(matrix, statistics))


def test_fisher_and_taylor_are_losses_of_a_quadratic():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gradient, curvature = torch.full((3, 4), 2.0), torch.linspace(0.1, 1, 12).view(3, 4)
    known = scores.Gradients(weight_gradient=gradient, weight_fisher=curvature)
    assert torch.equal(scores.score("taylor", weight, known), 2 * weight.abs())
    torch.testing.assert_close(scores.score("fisher", weight, known), 0.5 * curvature * weight**2)


def test_scores_say_what_they_need():
    matrix, _ = problem(5, 12)
    assert torch.equal(scores.score("magnitude", matrix), matrix.abs())
    with pytest.raises(OptionError, match="score 'size'; give one of magnitude, wanda"):
        scores.score("size", matrix)
    for name in ("wanda", "sparsegpt", "nowag"):
        with pytest.raises(DataError, match="step 2: needs calibration data for its second moment"):
            scores.score(name, matrix, NO_STATISTICS, where="step 2")
    with pytest.raises(DataError, match="step 2: needs weight fishers of the loss"):
        scores.score("fisher", matrix, NO_STATISTICS, where="step 2")


# ---- selections


@given(
    share=floats(0, 1), block=sampled_from([1, 2, 4]), scope=sampled_from(["matrix", "row", "global"]),
    seed=integers(0, 2**31),
)  # fmt: skip
def test_selections_keep_the_largest_sums(share, block, scope, seed):
    g = torch.Generator().manual_seed(seed)
    given_scores = [torch.randint(0, 9, shape, generator=g).float() for shape in ((3, 8), (2, 12))]
    masks = Selection(sparsity=share, scope=scope, block=block).kept(given_scores)
    summed = [one.view(len(one), -1, block).sum(-1) for one in given_scores]
    blocks = [mask.view(len(mask), -1, block) for mask in masks]
    assert all((one.all(-1) | ~one.any(-1)).all() for one in blocks)
    kept = [one[..., 0] for one in blocks]
    if scope == "row":
        parts = [(s[i], k[i]) for s, k in zip(summed, kept, strict=True) for i in range(len(s))]
    elif scope == "matrix":
        parts = [(s.flatten(), k.flatten()) for s, k in zip(summed, kept, strict=True)]
    else:
        parts = [(torch.cat([s.flatten() for s in summed]), torch.cat([k.flatten() for k in kept]))]
    for sums, keeps in parts:
        assert int((~keeps).sum()) == int(share * len(sums) + 1e-9)
        if keeps.any() and not keeps.all():
            assert sums[keeps].min() >= sums[~keeps].max()


def test_a_selection_that_cannot_be_is_refused():
    with pytest.raises(OptionError, match="nothing to prune"):
        Selection()
    with pytest.raises(OptionError, match="have no effect with pattern 2:4"):
        Selection(pattern="2:4", block=4)
    with pytest.raises(OptionError, match=r"sparsity = 1.5; give a share"):
        Selection(sparsity=1.5)
    with pytest.raises(OptionError, match="scope 'layer'"):
        Selection(sparsity=0.5, scope="layer")
    with pytest.raises(OptionError, match="blocks of 4 do not divide the 6 inputs"):
        Selection(sparsity=0.5, block=4).kept([torch.ones(2, 6)])
    assert not any(mask.any() for mask in Selection(sparsity=1.0).kept([torch.ones(2, 6)]))
