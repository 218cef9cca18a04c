"""prune.obert and the block Fisher matrix: explicit inverses, constrained minima of quadratics, counts, files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import VISION, build, inputs
from hypothesis import given
from hypothesis.strategies import integers
from reference import obert

from pennyweight.errors import DataError, FormError, OptionError
from pennyweight.lever import make
from pennyweight.levers.prune.obert import OBERT
from pennyweight.model import anatomy
from pennyweight.model.model import Model, kind_of
from pennyweight.plan.harm import Harm
from pennyweight.solvers.fisher import BlockFisher
from pennyweight.weights import BlockSparse, LowRank, NofM, Sparse
from pennyweight.work import Work

DAMPING = 1e-3


def drawn(size, samples, seed=0):
    g = np.random.default_rng(seed)
    mix = g.standard_normal((size, size)) / size**0.5 + np.eye(size)
    return g.standard_normal(size), g.standard_normal((samples, size)) @ mix


def fisher_of(gradients, block, *, at_once=7, damping=DAMPING):
    found = BlockFisher(gradients.shape[1], block=block, samples=len(gradients), damping=damping, dtype=torch.float64)
    for rows in torch.from_numpy(gradients).split(at_once):
        found.add(rows)
    return found


@given(
    size=integers(1, 40), block=integers(1, 24), samples=integers(1, 60), at_once=integers(1, 30),
    seed=integers(0, 2**31),
)  # fmt: skip
def test_the_inverse_is_that_of_the_explicit_matrix(size, block, samples, at_once, seed):
    _, gradients = drawn(size, samples, seed)
    found, block = fisher_of(gradients, block, at_once=at_once), min(block, size)
    for at, expected in enumerate(obert.explicit(gradients, DAMPING, block)):
        inside = found.inverse[at, : len(expected), : len(expected)].numpy()
        np.testing.assert_allclose(inside, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("run", [1, 4])
def test_saliency_is_that_of_the_explicit_matrix(run):
    weights, gradients = drawn(40, 64)
    found = fisher_of(gradients, 16).saliency(torch.from_numpy(weights), run)
    expected = obert.saliency(weights, obert.explicit(gradients, DAMPING, 16), run)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)


def test_corrections_added_up_are_those_of_the_source():
    weights, gradients = drawn(45, 64)
    pruned = np.random.default_rng(1).random(45) < 0.4
    found = fisher_of(gradients, 20).without(torch.from_numpy(weights), torch.from_numpy(pruned), joint=False)
    expected = obert.added_up(weights, pruned, obert.explicit(gradients, DAMPING, 20))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("joint", [True, False])
def test_one_weight_taken_out_costs_what_was_said_and_leaves_the_constrained_minimum(joint):
    weights, gradients = drawn(12, 48)
    fisher = fisher_of(gradients, 12)
    hessian = DAMPING * np.eye(12) + gradients.T @ gradients / 48
    costs = fisher.saliency(torch.from_numpy(weights)).numpy()
    for q in range(12):
        pruned = torch.arange(12) == q
        found = fisher.without(torch.from_numpy(weights), pruned, joint=joint).numpy()
        moved = found - weights
        assert 0.5 * moved @ hessian @ moved == pytest.approx(costs[q], rel=1e-8)
        assert found[q] == 0
        # at the minimum under the constraint the slope by every other weight is zero
        np.testing.assert_allclose(np.delete(hessian @ moved, q), 0, atol=1e-10)


def test_several_taken_out_together_leave_the_constrained_minimum():
    weights, gradients = drawn(24, 100)
    pruned = torch.tensor([0, 1, 5, 6, 7, 13, 20, 23])
    mask = torch.zeros(24, dtype=torch.bool)
    mask[pruned] = True
    fisher = fisher_of(gradients, 24)
    hessian = DAMPING * np.eye(24) + gradients.T @ gradients / 100
    costs = {}
    for joint in (True, False):
        found = fisher.without(torch.from_numpy(weights), mask, joint=joint).numpy()
        moved = found - weights
        costs[joint] = moved @ hessian @ moved
        if joint:
            np.testing.assert_allclose((hessian @ moved)[~mask.numpy()], 0, atol=1e-10)
    assert costs[True] < 0.9 * costs[False]


def test_runs_added_up_are_the_joint_solution_where_a_block_loses_one_run():
    weights, gradients = drawn(32, 100)
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[4, 5, 6, 7, 24, 25, 26, 27]] = True
    fisher = fisher_of(gradients, 16)
    both = [fisher.without(torch.from_numpy(weights), mask, joint=joint, run=4) for joint in (True, False)]
    torch.testing.assert_close(*both)


def test_blocks_of_one_are_the_diagonal_and_move_nothing():
    weights, gradients = drawn(30, 50)
    fisher = fisher_of(gradients, 1)
    expected = 0.5 * weights**2 * (DAMPING + (gradients**2).mean(0))
    np.testing.assert_allclose(fisher.saliency(torch.from_numpy(weights)).numpy(), expected, rtol=1e-10)
    mask = torch.arange(30) % 3 == 0
    found = fisher.without(torch.from_numpy(weights), mask)
    assert torch.equal(found, torch.from_numpy(weights).masked_fill(mask, 0))


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"block": 0}, {"samples": 0}])
def test_a_fisher_matrix_of_nothing_is_refused(options):
    with pytest.raises(OptionError, match="give positive numbers"):
        BlockFisher(10, **{"block": 5, "samples": 3, "damping": 0.1} | options)
    with pytest.raises(OptionError, match="runs of 4 in blocks of 6"):
        BlockFisher(24, block=6, samples=3, damping=0.1).saliency(torch.ones(24), 4)


# ---- the lever


def work_on(family="llama", count=6):
    module = build(family).eval()
    model = Model(module, None, family, kind_of(type(module).__name__))
    windows = torch.randint(5, 60, (count, 12), generator=torch.Generator().manual_seed(3))
    given = inputs(family)["pixel_values"] if family in VISION else windows
    maps = tuple(one for one in model.anatomy.layers() if one.block is not None or family == "plain-mlp")
    return model, Work(model=model, windows=given, maps=maps)


def matrices(model, work):
    return [anatomy.matrix(model.module, one).clone() for one in work.maps]


def weights(model, work):
    return [model.module.get_submodule(one.path).weight for one in work.maps]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_share_of_zeros_is_met_over_all_layers(family, steps):
    model, work = work_on(family)
    OBERT(sparsity=0.6, gradients=8, steps=steps).change(model, work)
    found = matrices(model, work)
    total = sum(each.numel() for each in found)
    assert sum(int((each == 0).sum()) for each in found) == int(0.6 * total)
    shares = [float((each == 0).float().mean()) for each in found]
    assert max(shares) - min(shares) > 0.02, "a global threshold does not prune all layers alike"
    assert all(isinstance(weight, Sparse) for weight in weights(model, work))


def test_in_each_layer_where_asked():
    model, work = work_on()
    OBERT(sparsity=0.5, gradients=4, scope="layer").change(model, work)
    assert all(int((each == 0).sum()) == each.numel() // 2 for each in matrices(model, work))


def test_nothing_pruned_is_the_model_itself():
    model, work = work_on()
    before = matrices(model, work)
    OBERT(sparsity=0.0, gradients=2, dtype="float32").change(model, work)
    assert all(torch.equal(*pair) for pair in zip(before, matrices(model, work), strict=True))


def test_patterns_and_runs_are_kept():
    model, work = work_on()
    OBERT(pattern="2:4", gradients=4).change(model, work)
    for each, weight in zip(matrices(model, work), weights(model, work), strict=True):
        assert isinstance(weight, NofM)
        assert bool(((each.view(-1, 4) == 0).sum(1) == 2).all())
    model, work = work_on()
    OBERT(pattern="block4", sparsity=0.5, gradients=4).change(model, work)
    zeros = [(each.view(-1, 4) == 0).sum(1) for each in matrices(model, work)]
    assert set(torch.cat(zeros).tolist()) == {0, 4}
    assert sum(int((each == 4).sum()) for each in zeros) == sum(each.numel() for each in zeros) // 2
    assert all(isinstance(weight, BlockSparse) for weight in weights(model, work))


def test_pruning_goes_on_from_the_zeros():
    model, work = work_on()
    OBERT(sparsity=0.3, gradients=4).change(model, work)
    before = [each == 0 for each in matrices(model, work)]
    OBERT(sparsity=0.5, gradients=4).change(model, replace(work))
    after = [each == 0 for each in matrices(model, work)]
    assert all(bool((new | ~old).all()) for old, new in zip(before, after, strict=True))
    assert sum(int(each.sum()) for each in after) == sum(each.numel() for each in after) // 2


def test_what_is_kept_moves_and_the_model_departs_less():
    harms = {}
    for block in (1, 48):
        model, work = work_on("bert", count=48)
        harm = Harm(model, work.windows)
        OBERT(sparsity=0.5, gradients=192, block=block, dtype="float32").change(model, work)
        harms[block] = float(harm.samples().mean())
    assert harms[48] < 0.9 * harms[1]


@pytest.mark.parametrize("family", ["vit", "plain-mlp"])
def test_classifiers_and_plain_modules_need_no_labels(family):
    model, work = work_on(family)
    OBERT(sparsity=0.5, gradients=3).change(model, work)
    found = matrices(model, work)
    assert sum(int((each == 0).sum()) for each in found) == sum(each.numel() for each in found) // 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to prune"),
        ({"pattern": "block4"}, "nothing to prune"),
        ({"pattern": "2:4", "steps": 2}, "give steps = 1"),
        ({"pattern": "2:4", "scope": "layer"}, "scope has no effect"),
        ({"pattern": "4:2"}, "KEPT:OF"),
        ({"sparsity": 0.5, "damping": 0.0}, "above 0"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(OptionError, match=words):
        make("prune.obert", options)


def test_what_it_cannot_prune_is_named():
    model, work = work_on()
    with pytest.raises(OptionError, match="selects no linear map"):
        OBERT(sparsity=0.5).change(model, replace(work, maps=()))
    with pytest.raises(DataError, match="6 windows of data, 9 a gradient"):
        OBERT(sparsity=0.5, batch=9).change(model, work)
    with pytest.raises(OptionError, match=r"pattern 3:7 does not divide.*\(model"):
        OBERT(pattern="3:7").change(model, work)
    m, n = work.maps[0].shape
    anatomy.replace(model.module, work.maps[0].path, LowRank(torch.ones(m, 1), torch.ones(1, n)))
    with pytest.raises(FormError, match="low_rank already"):
        OBERT(sparsity=0.5).change(model, work)
