"""factorize.svd against closed forms, through SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis.strategies import integers
from problems import objective, problem

from pennyweight.errors import DataError, OptionError
from pennyweight.lever import make, needs_of
from pennyweight.levers.factorize.svd import SVD
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.weights import Dense

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 5), (5, 1)]


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("dead", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape, dead, whiten):
    matrix, statistics = problem(*shape, dead=min(dead, shape[1] - 1))
    found = SVD(rank=min(shape), whiten=whiten, dtype="float32").solve(Dense(matrix), statistics)
    assert found.error(matrix) < 1e-6


@given(rows=integers(2, 12), width=integers(2, 12), rank=integers(1, 11), seed=integers(0, 2**31))
def test_the_error_seen_by_the_inputs_is_exactly_the_discarded_singular_values(rows, width, rank, seed):
    rank = min(rank, rows, width)
    matrix, statistics = problem(rows, width, seed=seed, tokens=60)
    found = SVD(rank=rank, damping=0.0, dtype="float32").solve(Dense(matrix), statistics)
    # the oracle's root is the symmetric one, not a Cholesky factor: any S with S S^T = H has these singular values
    root = scipy.linalg.sqrtm(statistics.second_moment.double().numpy()).real
    singular = scipy.linalg.svdvals(matrix.double().numpy() @ root)
    error = objective(found.dense(), matrix, statistics.second_moment)
    np.testing.assert_allclose(error, (singular[rank:] ** 2).sum(), rtol=1e-3, atol=1e-9 * (singular**2).sum())


def test_plain_is_the_truncated_singular_value_decomposition():
    matrix, _ = problem(20, 14)
    found = SVD(rank=5, whiten=False, dtype="float32").solve(Dense(matrix), NO_STATISTICS)
    left, singular, right = scipy.linalg.svd(matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose(found.dense().detach().numpy(), (left[:, :5] * singular[:5]) @ right[:5], atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 48), (48, 24)])
def test_whitening_trades_the_matrix_for_the_outputs(shape):
    matrix, statistics = problem(*shape)
    moment = statistics.second_moment
    seen, plain = (SVD(rank=8, whiten=w).solve(Dense(matrix), statistics) for w in (True, False))
    assert objective(seen.dense().float(), matrix, moment) < 0.95 * objective(plain.dense().float(), matrix, moment)
    assert seen.error(matrix) > plain.error(matrix)


@pytest.mark.parametrize("shape", [(120, 40), (40, 120)])
def test_predictions_are_those_of_the_solved_matrix(shape):
    matrix, statistics = problem(*shape)  # 120 rows: more than the planner would sample
    settings = [*SVD.candidates(shape), SVD(rank=3), SVD(density=0.5, whiten=False)]
    found = SVD.predict(settings, Dense(matrix), statistics)
    for setting, prediction in zip(settings, found, strict=True):
        solved = setting.solve(Dense(matrix), statistics)
        assert prediction.lever is setting
        assert prediction.cost == solved.cost()
        error = (solved.dense().detach() - matrix).double()
        wanted = 0.5 * ((error @ statistics.second_moment.double() * error).sum(1) @ statistics.gradient.double())
        # the directions are solved in two sizes and rounded to 16 bits after that
        assert prediction.damage == pytest.approx(float(wanted), rel=2e-2)


def test_density_counts_parameters():
    matrix, statistics = problem(40, 60)
    for density in (0.1, 0.5, 1.0):
        found = SVD(density=density).solve(Dense(matrix), statistics)
        assert density * 2400 - 100 < found.cost().params <= density * 2400


def test_factors_are_balanced():
    matrix, statistics = problem(30, 20)
    found = SVD(rank=6, dtype="float32").solve(Dense(1e-6 * matrix), statistics)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))


def test_needs_data_only_where_it_looks_at_it():
    assert needs_of(SVD(rank=1)) == {"second_moment"}
    assert needs_of(SVD(rank=1, whiten=False)) == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "factorize.svd: neither rank nor density; give one"),
        ({"rank": 3, "density": 0.5}, "factorize.svd: rank = 3 and density = 0.5; give one of the two"),
        ({"rank": 0}, "rank = 0 is out of range; give at least 1"),
        ({"density": 1.5}, "density = 1.5 is out of range"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(options, words):
    with pytest.raises(OptionError, match=words):
        make("factorize.svd", options)


def test_ranks_that_do_not_fit_are_refused_with_the_remedy():
    matrix, statistics = problem(6, 9)
    with pytest.raises(OptionError, match="rank = 7 for a 6x9 matrix; give at most 6"):
        SVD(rank=7).solve(Dense(matrix), statistics)
    with pytest.raises(OptionError, match=r"density = 0.1 leaves a 6x9 matrix no rank; give at least 0.2778"):
        SVD(density=0.1).solve(Dense(matrix), statistics)
    with pytest.raises(DataError, match=r"factorize.svd: the second moment of 3 inputs is not positive definite"):
        SVD(rank=1, damping=0.0).solve(
            Dense(torch.ones(4, 3)), Statistics(second_moment=torch.eye(3) - torch.ones(3, 3))
        )
