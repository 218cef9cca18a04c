"""prune.armor against brute force over patterns, least squares, torch's Adam, NoWag, and the course of its loss."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers
from problems import problem

from pennyweight.errors import DataError, FormError, OptionError
from pennyweight.lever import make
from pennyweight.levers.prune.armor import ARMOR
from pennyweight.solvers.armor import Fit, _Adam, _solved
from pennyweight.solvers.masks import patterned
from pennyweight.solvers.scores import normalized, nowag
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import BlockDiagonal, Dense, LowRank, NofM, Product, rebuild, structure


def fit(rows=8, width=8, block=8, seed=0, moved=True):
    """A fit somewhere on its way: sides and core off their start."""
    matrix, statistics = problem(rows, width, seed=seed)
    found = Fit(matrix.double(), statistics.second_moment.diagonal().double(), kept=2, of=4, block=block)
    if moved:
        g = torch.Generator().manual_seed(seed)
        for side in (found.left, found.right):
            side += 0.2 * torch.randn(side.shape, generator=g, dtype=torch.float64)
        found.core += 0.2 * torch.randn(found.core.shape, generator=g, dtype=torch.float64) * found.mask
    return found


def loss_of(one, core):
    """By whole matrices."""
    left, right = torch.block_diag(*one.left), torch.block_diag(*one.right)
    gap = left @ core @ right - one.target
    return float((gap.square() * one.h.reshape(-1)).sum()) / one.whole


@pytest.mark.parametrize("seed", range(4))
def test_a_run_solved_anew_is_the_best_of_all_patterns(seed):
    one = fit(seed=seed)
    before = one.core.clone()
    one.solve_runs(torch.Generator().manual_seed(seed))
    after = one.core
    changed = (after != before).view(8, 2, 4).any(-1).nonzero()
    assert len(changed) == 1, "one run a pair of blocks"
    row, run = (int(k) for k in changed[0])
    left, right = torch.block_diag(*one.left), torch.block_diag(*one.right)
    root = one.h.reshape(-1).sqrt()
    empty = before.clone()
    empty[row, 4 * run : 4 * run + 4] = 0
    rest = ((one.target - left @ empty @ right) * root).flatten()
    best = None
    for pair in combinations(range(4), 2):
        columns = torch.stack([(left[:, row, None] * right[4 * run + p] * root).flatten() for p in pair], 1)
        values = torch.linalg.lstsq(columns, rest).solution
        left_over = float((columns @ values - rest).square().sum())
        if best is None or left_over < best[0]:
            best = left_over, pair, values
    found = after[row, 4 * run : 4 * run + 4]
    assert tuple(found.nonzero()[:, 0].tolist()) == best[1]
    torch.testing.assert_close(found[list(best[1])], best[2], rtol=1e-6, atol=1e-9)
    assert one.loss() == pytest.approx(best[0] / one.whole, rel=1e-6)
    assert torch.equal(one.mask, after != 0)


@given(seed=integers(0, 2**20), rows=integers(1, 3), columns=integers(1, 3))
def test_no_step_raises_the_loss(seed, rows, columns):
    one = fit(8 * rows, 8 * columns, seed=seed)
    g = torch.Generator().manual_seed(seed)
    assert one.loss() == pytest.approx(loss_of(one, one.core), rel=1e-9)
    for step in (one.solve_sides, lambda: one.solve_runs(g), one.solve_sides, lambda: one.solve_runs(g)):
        before = one.loss()
        step()
        assert one.loss() <= before * (1 + 1e-9) + 1e-12
        assert bool((one.mask.view(-1, 4).sum(1) == 2).all())


def test_the_loss_is_that_of_the_state_after_a_run():
    one, g = fit(16, 24, seed=5), torch.Generator().manual_seed(5)
    for _ in range(20):
        assert one.solve_runs(g) == pytest.approx(one.loss(), rel=1e-9)


def test_two_by_two_systems_are_solved_as_larger_ones_are():
    g = torch.Generator().manual_seed(0)
    half = torch.randn(50, 2, 2, generator=g, dtype=torch.float64)
    gram, right = half @ half.mT, torch.randn(50, 2, 3, generator=g, dtype=torch.float64)
    ridge = 1e-3 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(_solved(gram, right, 1e-3), torch.linalg.solve(gram + ridge, right))


def test_sides_are_solved_to_their_least_squares():
    one = fit(16, 24, seed=3)
    one.solve_sides()
    one.left.requires_grad_()
    (one.residual().square() * one.h).sum().div(one.whole).backward()
    assert float(one.left.grad.abs().max()) < 1e-5  # A is solved last; a ridge holds it back a little


def test_adam_takes_the_steps_of_torch():
    one, rate = fit(16, 16, seed=1), 1e-2
    left, right, core = (t.clone().requires_grad_() for t in (one.left, one.right, one.core))
    adam = torch.optim.Adam([left, right, core], lr=rate)
    ours = _Adam(rate)
    for _ in range(5):
        adam.zero_grad()
        gap = torch.block_diag(*left) @ (core * one.mask) @ torch.block_diag(*right) - one.target
        (gap.square() * one.h).sum().div(one.whole).backward()
        adam.step()
        one._adam(ours)
    for mine, theirs in ((one.left, left), (one.right, right), (one.core, core * one.mask)):
        torch.testing.assert_close(mine, theirs.detach())


@pytest.mark.parametrize("solver", ["exact", "adam"])
def test_no_iterations_are_nowag(solver):
    matrix, statistics = problem(16, 32)
    found = ARMOR(iterations=0, block=8, dtype="float32", solver=solver).solve(Dense(matrix), statistics)
    kept = ~patterned(nowag(matrix, statistics), 2, 4)
    torch.testing.assert_close(found.dense(), matrix * kept, rtol=1e-5, atol=1e-8)


def test_the_proxy_falls_and_the_best_state_is_kept():
    matrix, statistics = problem(32, 64)
    energy = statistics.second_moment.diagonal()
    for rate in (None, 0.5):  # a rate far too high: Adam overshoots
        one = Fit(matrix, energy, kept=2, of=4, block=16)
        made = one.run(40, rate=rate, generator=torch.Generator().manual_seed(0))
        whole = torch.block_diag(*made.left) @ made.core @ torch.block_diag(*made.right)
        target, rows, columns = normalized(matrix)
        gap = whole / rows / columns - target
        proxy = float((gap.square() * energy).sum() / (target.square() * energy).sum())
        assert proxy == pytest.approx(min(made.losses), rel=1e-3)
        assert proxy <= made.losses[0] * (1 + 1e-5)
        if rate is None:
            assert proxy < 0.8 * made.losses[0]
            assert all(b <= a * (1 + 1e-5) for a, b in zip(made.losses, made.losses[1:], strict=False))


def test_it_is_a_product_of_forms_that_survives_a_file():
    matrix, statistics = problem(16, 64)
    found = ARMOR(iterations=5, block=8).solve(Dense(matrix), statistics)
    assert isinstance(found, Product)
    assert [type(term) for term in found.terms] == [BlockDiagonal, NofM, BlockDiagonal]
    core = 16 * 64 // 2 * 2 + 16 * 64 // 4 * 3 // 8
    assert found.cost().bytes == core + 2 * 8 * (16 + 64)
    again = rebuild(structure(found), found.state_dict())
    assert torch.equal(again.dense(), found.dense())
    assert torch.equal(ARMOR(iterations=5, block=8).solve(Dense(matrix), statistics).dense(), found.dense())


def test_the_block_fits_the_overhead():
    assert ARMOR().block_of((3584, 18944)) == 128
    assert ARMOR().block_of((576, 1536)) == 16
    assert ARMOR().block_of((192, 576)) == 4
    assert ARMOR(overhead=0.5).block_of((576, 576)) == 96
    assert ARMOR(pattern="4:8").block_of((64, 64)) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "4:2"}, "KEPT:OF"),
        ({"block": 8, "overhead": 0.1}, "overhead has no effect"),
        ({"rate": 0.1}, "rate has no effect"),
        ({"solver": "lbfgs"}, "exact, adam"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(OptionError, match=words):
        make("prune.armor", options)


def test_what_does_not_fit_is_named():
    matrix, statistics = problem(16, 32)
    with pytest.raises(OptionError, match="block 12 does not fit a 16x32 matrix at 2:4; choose 4, 8, 16"):
        ARMOR(block=12).solve(Dense(matrix), statistics)
    with pytest.raises(OptionError, match="no block fits a 15x32"):
        ARMOR().solve(Dense(matrix[:15]), statistics)
    with pytest.raises(DataError, match="second moment"):
        ARMOR().solve(Dense(matrix), NO_STATISTICS)
    with pytest.raises(FormError, match="low_rank already"):
        ARMOR().solve(LowRank(torch.ones(16, 1), torch.ones(1, 32)), statistics)
