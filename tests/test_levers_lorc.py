"""quantize.lorc against Eckart and Young, through SciPy, and against what it must leave alone."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, sampled_from
from problems import objective, problem

from pennyweight.errors import DataError, OptionError
from pennyweight.lever import candidates_of, find, make, needs_of
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.levers.quantize.lorc import LoRC, compensation
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.plan.offers import predict
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.weights import Dense, LowRank, Product, Quantized

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 5), (5, 1)]


@given(
    m=integers(1, 12), n=integers(1, 12), rank=integers(1, 12), seed=integers(0, 2**31), bits=sampled_from([2, 3, 4])
)
def test_what_is_left_is_exactly_the_tail_of_the_singular_values(m, n, rank, seed, bits):
    rank = min(rank, m, n)
    matrix, _ = problem(m, n, seed=seed)
    base = RTN(bits=bits, group_size=4).solve(Dense(matrix), NO_STATISTICS)
    lost = (matrix - base.dense().detach()).double().numpy()
    part = compensation(torch.from_numpy(lost), rank, moment=None, factor_bits=16, where="here")
    given_back = (part.up.double() @ part.down.double()).detach().numpy()
    singular = scipy.linalg.svdvals(lost)
    tail, whole = (singular[rank:] ** 2).sum(), (singular**2).sum()
    # float16 factors are off by 2^-11 at most each, and the error is orthogonal to what is kept
    assert abs(((lost - given_back) ** 2).sum() - tail) <= 1e-6 * whole + 1e-12


@given(m=integers(2, 12), n=integers(2, 12), rank=integers(1, 11), seed=integers(0, 2**31))
def test_weighted_what_the_outputs_miss_is_the_tail_of_the_whitened_error(m, n, rank, seed):
    rank = min(rank, m, n)
    matrix, statistics = problem(m, n, seed=seed, tokens=60)
    moment = statistics.second_moment.double()
    found = compensation(matrix, rank, moment=moment, factor_bits=16, where="here").dense()
    # the oracle's root is the symmetric one: any S with S S^T = H has these singular values
    singular = scipy.linalg.svdvals(matrix.double().numpy() @ scipy.linalg.sqrtm(moment.numpy()).real)
    np.testing.assert_allclose(
        objective(found.float(), matrix, moment),
        (singular[rank:] ** 2).sum(),
        rtol=1e-2,
        atol=1e-5 * (singular**2).sum(),
    )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape, method, weighted):
    matrix, statistics = problem(*shape)
    lorc = LoRC(method=method, bits=2, group_size=4, rank=min(shape), weighted=weighted)
    assert (
        lorc.solve(Dense(matrix), statistics).error(matrix) < 1e-3
    )  # two float16 factors of an error of half the size


@pytest.mark.parametrize("factor_bits", [8, 16])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_each_part_is_what_its_own_solver_gives(method, factor_bits):
    matrix, statistics = problem(20, 32)
    plain = {"rtn": RTN, "gptq": GPTQ}[method](bits=3, group_size=16).solve(Dense(matrix), statistics)
    found = LoRC(method=method, bits=3, group_size=16, rank=4, factor_bits=factor_bits).solve(Dense(matrix), statistics)
    base, part = found.terms
    assert torch.equal(base.dense(), plain.dense())
    assert isinstance(part, LowRank if factor_bits == 16 else Product)
    assert torch.linalg.matrix_rank(part.dense().detach().double(), rtol=2e-3) == 4
    factors = {16: 2 * 4 * (20 + 32), 8: 4 * (20 + 32) + 2 * 4 * 2}[factor_bits]  # 8 bits: two scales a direction
    assert found.cost().bytes == plain.cost().bytes + factors


@given(seed=integers(0, 2**31), weighted=booleans())
def test_compensation_lowers_what_it_is_asked_to_and_weighting_lowers_the_outputs_error_most(seed, weighted):
    matrix, statistics = problem(24, 40, seed=seed)
    plain = GPTQ(bits=2, group_size=40).solve(Dense(matrix), statistics)
    found = {w: LoRC(bits=2, group_size=40, rank=4, weighted=w).solve(Dense(matrix), statistics) for w in (True, False)}
    assert found[False].error(matrix) < plain.error(matrix)
    moment = statistics.second_moment
    errors = [objective(one.dense(), matrix, moment) for one in (found[True], found[False], plain)]
    assert errors[0] < 0.99 * errors[1]
    assert errors[0] < 0.95 * errors[2]


def test_eight_bit_factors_give_nearly_what_sixteen_give():
    matrix, statistics = problem(40, 64)
    exact, rounded = (
        LoRC(bits=2, rank=8, factor_bits=bits).solve(Dense(matrix), statistics).error(matrix) for bits in (16, 8)
    )
    assert exact < rounded < 1.01 * exact


def test_nothing_lost_is_nothing_given_back():
    grid_point, statistics = problem(6, 16)
    matrix = Quantized.nearest(grid_point, bits=3).dense().detach()
    for factor_bits in (8, 16):
        part = compensation(torch.zeros(6, 16), 2, moment=None, factor_bits=factor_bits, where="here")
        assert not part.dense().any()
        found = LoRC(method="rtn", bits=3, rank=2, factor_bits=factor_bits).solve(Dense(matrix), statistics)
        assert found.error(matrix) < 1e-6


def test_inputs_that_are_always_zero_take_no_rank():
    matrix, statistics = problem(10, 20, dead=4)
    matrix[:, statistics.second_moment.diagonal() == 0] *= 1000  # would take every direction if it counted
    found = LoRC(bits=3, rank=2, weighted=False).solve(Dense(matrix), statistics)
    assert not found.dense()[:, statistics.second_moment.diagonal() == 0].any()


def test_predictions_are_what_solving_gives_where_a_sample_of_rows_would_not():
    matrix, statistics = problem(400, 32)
    settings = [LoRC(bits=2, group_size=32, rank=8, factor_bits=8)]
    (told,) = predict(settings, Dense(matrix), statistics)
    solved = settings[0].solve(Dense(matrix), statistics)
    assert told.cost == solved.cost()
    difference = (solved.dense().detach() - matrix).double()
    damage = 0.5 * float(
        ((difference @ statistics.second_moment.double()) * difference).sum(1) @ statistics.gradient.double()
    )
    assert told.damage == pytest.approx(damage, rel=1e-3)


def test_needs_data_only_where_it_looks_at_it():
    assert needs_of(LoRC()) == needs_of(LoRC(weighted=False)) == needs_of(LoRC(method="rtn")) == {"second_moment"}
    assert needs_of(LoRC(method="rtn", weighted=False)) == set()
    with pytest.raises(DataError, match=r"quantize.lorc: needs calibration data for its second moment"):
        LoRC(method="rtn").solve(Dense(torch.ones(8, 8)), NO_STATISTICS)


def test_offers_only_ranks_that_pay():
    assert not list(candidates_of(find("quantize.lorc"), (8, 4096)))
    assert {lever.rank for lever in candidates_of(find("quantize.lorc"), (384, 1536))} == {8, 16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank = 0 is out of range; give at least 1"),
        ({"factor_bits": 4}, "factor_bits = 4 is out of range; give one of 8, 16"),
        ({"format": "e2m1", "bits": 3}, "quantize.lorc: bits = 3 for format e2m1; give bits = 4"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(options, words):
    with pytest.raises(OptionError, match=words):
        make("quantize.lorc", options)


def test_a_rank_that_does_not_fit_is_refused_with_the_remedy():
    matrix, statistics = problem(6, 9)
    with pytest.raises(OptionError, match=r"quantize.lorc: rank = 7 for a 6x9 matrix; give at most 6"):
        LoRC(rank=7).solve(Dense(matrix), statistics)
    with pytest.raises(DataError, match="not positive definite"):
        LoRC(method="rtn", rank=1, damping=0.0).solve(
            Dense(torch.randn(4, 3)), Statistics(second_moment=torch.eye(3) - torch.ones(3, 3))
        )
