"""factorize.monarch against closed forms, brute force and what its papers promise."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from problems import objective, problem

from pennyweight.claims.factorize.r125_monarch import fourier
from pennyweight.errors import DataError, OptionError
from pennyweight.lever import candidates_of, find, make, needs_of
from pennyweight.levers.factorize.monarch import MonarchProjection, nearest_outputs
from pennyweight.plan.offers import predict
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.weights import Dense, LowRank, Monarch

SHAPES = [(12, 30, 3), (30, 12, 2), (16, 16, 4), (8, 24, 1), (20, 10, 5)]


def monarch(rows, columns, blocks, rank, seed=0):
    """A Monarch matrix from the entry formula of the paper, by loops."""
    g = np.random.default_rng(seed)
    height, width = rows // blocks, columns // blocks
    matrix = np.zeros((rows, columns))
    for out in range(blocks):
        for into in range(blocks):
            up, down = g.standard_normal((height, rank)), g.standard_normal((rank, width))
            matrix[out::blocks, into * width : (into + 1) * width] = up @ down
    return torch.from_numpy(matrix).float()


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(("rows", "columns", "blocks"), SHAPES)
def test_a_monarch_matrix_comes_back(rows, columns, blocks, whiten):
    _, statistics = problem(rows, columns)
    matrix = monarch(rows, columns, blocks, 2)
    lever = MonarchProjection(blocks=blocks, rank=2, whiten=whiten, dtype="float32")
    assert lever.solve(Dense(matrix), statistics).error(matrix) < 1e-6


def test_sub_blocks_of_less_rank_come_back_too():
    _, statistics = problem(16, 24)
    matrix = monarch(16, 24, 4, 1)
    lever = MonarchProjection(blocks=4, rank=3, dtype="float32")
    assert lever.solve(Dense(matrix), statistics).error(matrix) < 1e-6


@pytest.mark.parametrize(("rows", "columns", "blocks"), SHAPES)
def test_what_is_left_is_exactly_the_tails_of_all_sub_blocks(rows, columns, blocks):
    matrix, _ = problem(rows, columns)
    found = MonarchProjection(blocks=blocks, rank=1, whiten=False, dtype="float32").solve(Dense(matrix), NO_STATISTICS)
    width = columns // blocks
    tail = sum(
        (scipy.linalg.svdvals(matrix[out::blocks, at * width : (at + 1) * width].double().numpy())[1:] ** 2).sum()
        for out in range(blocks)
        for at in range(blocks)
    )
    np.testing.assert_allclose(found.error(matrix) * matrix.double().norm(), math.sqrt(tail), rtol=1e-5)


def test_one_block_weighted_by_its_inputs_is_the_whitened_low_rank():
    matrix, statistics = problem(14, 20, tokens=100)
    moment = statistics.second_moment.double()
    found = Monarch(*nearest_outputs(matrix, moment, blocks=1, rank=4)).dense()
    singular = scipy.linalg.svdvals(matrix.double().numpy() @ scipy.linalg.sqrtm(moment.numpy()).real)
    np.testing.assert_allclose(objective(found, matrix, moment), (singular[4:] ** 2).sum(), rtol=1e-8)


def test_no_gradient_is_left_on_the_second_factor_and_weighting_pays():
    matrix, statistics = problem(24, 36, tokens=200)
    moment = statistics.second_moment.double()
    first, second = nearest_outputs(matrix, moment, blocks=3, rank=3)
    weight = Monarch(first, second)
    difference = weight.dense() - matrix.double()
    loss = (difference @ moment * difference).sum()
    loss.backward()
    scale = (matrix.double() @ moment * matrix.double()).sum()
    assert weight.second.grad.norm() * weight.second.detach().norm() < 1e-9 * scale
    assert weight.first.grad.norm() > 0
    plain = Monarch.nearest(matrix, blocks=3, rank=3).dense()
    assert loss.item() < 0.9 * objective(plain, matrix, moment)


def test_the_fourier_transform_is_a_monarch_matrix_and_no_low_rank():
    matrix = fourier(8)
    # the oracle: NumPy's transform of random points, laid out as the matrix says
    x = np.random.default_rng(0).standard_normal((2, 64))
    points = np.stack([x[0], x[1]], axis=-1).reshape(8, 8, 2).transpose(1, 0, 2).reshape(-1)
    y = np.fft.fft(x[0] + 1j * x[1])
    np.testing.assert_allclose(matrix.numpy() @ points, np.concatenate([y.real, y.imag]), atol=1e-12)
    found = Monarch.nearest(matrix, blocks=8, rank=2)
    plain = LowRank.nearest(matrix, found.cost().params // sum(matrix.shape))
    assert found.cost().params == plain.cost().params
    assert found.error(matrix) < 1e-10 * plain.error(matrix)
    assert plain.error(matrix) == pytest.approx(math.sqrt(1 - 16 / 128))  # all singular values are equal


def test_density_counts_parameters():
    matrix, statistics = problem(48, 96)
    for density in (0.3, 0.5, 1.0):
        found = MonarchProjection(density=density).solve(Dense(matrix), statistics)
        assert density * matrix.numel() - 4 * (48 + 96) < found.cost().params <= density * matrix.numel()


def test_predictions_are_what_solving_gives_where_a_sample_of_rows_would_not():
    matrix, statistics = problem(400, 32)
    (told,) = predict([MonarchProjection(rank=2)], Dense(matrix), statistics)
    solved = MonarchProjection(rank=2).solve(Dense(matrix), statistics)
    assert told.cost == solved.cost()
    difference = (solved.dense().detach() - matrix).double()
    harm = ((difference @ statistics.second_moment.double()) * difference).sum(1) @ statistics.gradient.double()
    assert told.damage == pytest.approx(0.5 * float(harm), rel=1e-3)


def test_offers_only_what_divides_and_saves():
    assert not list(candidates_of(find("factorize.monarch"), (30, 60)))
    assert {lever.blocks for lever in candidates_of(find("factorize.monarch"), (384, 1536))} == {4, 8}
    assert needs_of(MonarchProjection(rank=1)) == {"second_moment"}
    assert needs_of(MonarchProjection(rank=1, whiten=False)) == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "factorize.monarch: neither rank nor density; give one of the two"),
        ({"rank": 3, "density": 0.5}, "factorize.monarch: rank = 3 and density = 0.5; give one of the two"),
        ({"blocks": 0, "rank": 1}, "blocks = 0 is out of range; give at least 1"),
    ],
)
def test_bad_monarch_options_are_refused_with_the_remedy(options, words):
    with pytest.raises(OptionError, match=words):
        make("factorize.monarch", options)


def test_monarch_settings_that_do_not_fit_are_refused_with_the_remedy():
    matrix, statistics = problem(8, 12)
    with pytest.raises(OptionError, match="blocks = 3 does not divide a 8x12 matrix; give a divisor of both sides"):
        MonarchProjection(blocks=3, rank=1).solve(Dense(matrix), statistics)
    with pytest.raises(OptionError, match="rank = 3 for 4 blocks of a 8x12 matrix; give at most 2"):
        MonarchProjection(rank=3).solve(Dense(matrix), statistics)
    with pytest.raises(
        OptionError, match=r"density = 0.5 leaves 4 blocks of a 8x12 matrix no rank; give at least 0.83"
    ):
        MonarchProjection(density=0.5).solve(Dense(matrix), statistics)
    with pytest.raises(DataError, match=r"factorize.monarch: the second moment of 12 inputs is not positive definite"):
        MonarchProjection(rank=1, damping=0.0).solve(
            Dense(matrix), Statistics(second_moment=torch.eye(12) - torch.ones(12, 12))
        )
