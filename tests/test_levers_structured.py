"""factorize.monarch, factorize.roast and factorize.auto against closed forms, brute force and what papers promise."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
import toys
from families import build
from problems import objective, problem

from pennyweight.apply import apply
from pennyweight.claims.factorize.r125_monarch import fourier
from pennyweight.errors import DataError, OptionError
from pennyweight.lever import candidates_of, find, make, needs_of
from pennyweight.levers.factorize import auto
from pennyweight.levers.factorize.auto import Auto
from pennyweight.levers.factorize.monarch import MonarchProjection, drawn, multiply_out, nearest_outputs
from pennyweight.levers.factorize.roast import Roast, scaling, share
from pennyweight.levers.factorize.roast import load as load_of
from pennyweight.measure.cost import cost as measure_cost
from pennyweight.model import anatomy, load
from pennyweight.model.model import Model
from pennyweight.plan.offers import predict
from pennyweight.solvers.low_rank import low_rank
from pennyweight.solvers.semi_nmf import semi_nmf
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.weights import Dense, Hashed, LowRank, Monarch
from pennyweight.work import Work

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


def test_drawn_monarch_weights_have_the_size_asked_for_and_multiply_out_to_the_same_function():
    g, module = torch.Generator().manual_seed(0), llama().module
    weight = drawn((96, 64), blocks=4, rank=3, size=0.05, generator=g)
    assert weight.cost().params == 4 * 3 * (96 + 64)
    assert float(weight.dense().detach().square().mean().sqrt()) == pytest.approx(0.05, rel=0.1)
    paths = [one.path for one in anatomy.of(module).layers() if one.shape == (48, 32)]
    for path in paths:
        anatomy.replace(module, path, drawn((48, 32), blocks=4, rank=2, size=0.2, generator=g))
    windows = ids(2)
    with torch.no_grad():
        before = module(input_ids=windows).logits
        assert multiply_out(module) == paths
        torch.testing.assert_close(module(input_ids=windows).logits, before)
    assert all(isinstance(module.get_submodule(path).weight, Dense) for path in paths)
    assert all(module.get_submodule(path).weight.matrix.requires_grad for path in paths)
    with pytest.raises(OptionError, match="no layer holds a Monarch weight"):
        multiply_out(module)


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


def llama():
    return Model(build("llama"), None, "llama", "causal-lm")


def work_on(model, windows=None, seed=0):
    return Work(model=model, windows=windows, maps=model.anatomy.maps(), seed=seed)


def ids(count, seed=1):
    return torch.randint(3, 64, (count, 24), generator=torch.Generator().manual_seed(seed))


class Two(torch.nn.Module):
    """Two layers of very different size."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.a, self.b = torch.nn.Linear(6, 10), torch.nn.Linear(10, 4)
        for layer, size in ((self.a, 0.5), (self.b, 0.02)):
            layer.weight.data = size * torch.randn(layer.weight.shape, generator=g)
            layer.bias.data.zero_()

    def forward(self, x):
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("size", [None, 1.0, 1e-4])
def test_as_many_values_as_weights_are_the_model_to_the_bit_and_so_is_a_step_of_descent(size):
    plain, shared = Two(), Two()
    held = share(shared, ["a", "b"], density=1.0, seed=5, size=size)
    assert held[0].values is held[1].values
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain(x), shared(x))
    gamma = scaling(held)
    held[0].values.register_hook(lambda gradient: gradient * gamma)
    for model in (plain, shared):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(plain.a.weight, Two().a.weight)
    for layer, weight in ((plain.a, held[0]), (plain.b, held[1])):
        torch.testing.assert_close(weight.dense(), layer.weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("density", [0.9, 0.5, 0.13, 1 / 100])
def test_every_value_bears_the_same_load(density):
    model = Two()
    held = share(model, ["a", "b"], density=density, seed=2)
    count, uses = len(held[0].values), load_of(held)
    assert count == int(density * 100)
    assert uses.sum() == 100
    assert set(uses.tolist()) <= {100 // count, -(-100 // count)}


def test_starting_values_are_the_least_squares_ones():
    model, matrices = Two(), [Two().a.weight.detach(), Two().b.weight.detach()]
    held = share(model, ["a", "b"], density=0.3, seed=9)
    count = len(held[0].values)
    # the oracle: the map as a matrix, column by column, and NumPy's solver
    basis = np.zeros((100, count))
    for at in range(count):
        unit = torch.nn.Parameter(torch.eye(count)[at])
        parts = [Hashed(unit, rows=w.shape[0], columns=w.shape[1], **rest(w)).dense().flatten() for w in held]
        basis[:, at] = torch.cat(parts).detach().double().numpy()
    wanted = torch.cat([matrix.flatten() for matrix in matrices]).double().numpy()
    expected = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    np.testing.assert_allclose(held[0].values.detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def rest(weight):
    return {"seed": weight.seed, "offset": weight.offset, "scale": weight.scale}


@pytest.mark.parametrize("scaled", [True, False])
def test_steps_do_not_depend_on_the_size_of_the_store_once_gradients_are_scaled(scaled):
    x, found = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), []
    for size in (2.0**-6, 1.0):
        model = Two()
        held = share(model, ["a", "b"], density=0.5, seed=4, size=size)
        gamma = scaling(held) if scaled else torch.ones(50)
        held[0].values.register_hook(lambda gradient, gamma=gamma: gradient * gamma)
        optimizer = torch.optim.SGD([held[0].values], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        found.append(model(x).detach())
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6) == scaled


def test_drawn_values_start_each_layer_as_large_as_it_was():
    model = llama()
    before = {
        one.path: float(anatomy.matrix(model.module, one).std()) for one in model.anatomy.maps() if one.block == 0
    }
    Roast(density=0.5, start="random", dtype="float32").change(model, work_on(model))
    for path, size in before.items():
        assert 0.6 < float(model.module.get_submodule(path).weight.dense().detach().std()) / size < 1.6


def test_roast_is_exact_at_density_one_trains_and_stores_its_values_once(tmp_path):
    model, whole = llama(), llama()
    windows = ids(8)
    expected = model.module(input_ids=windows).logits
    Roast(density=1.0, dtype="float32").change(whole, work_on(whole))
    assert torch.equal(whole.module(input_ids=windows).logits, expected)
    total = sum(math.prod(one.shape) for one in model.anatomy.layers() if one.block is not None)
    losses = []
    for steps in (0, 30):
        shared = llama()
        lever = Roast(density=0.125, steps=steps, rate=0.02, start="random", dtype="float16")
        lever.change(shared, work_on(shared, windows))
        logits = shared.module(input_ids=windows).logits
        losses.append(
            float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).detach())
        )
    assert losses[1] < 0.98 * losses[0]
    cost, dense = (
        measure_cost(shared.module, inputs={"input_ids": windows[:1]}),
        measure_cost(model.module, inputs={"input_ids": windows[:1]}),
    )
    assert dense.params_total - cost.params_total == total - int(0.125 * total)
    assert dense.bytes - cost.bytes == 4 * total - 2 * int(0.125 * total)


def test_a_recipe_runs_roast_and_the_file_brings_it_back_holding_each_value_once(tmp_path):
    model, text, recipe = toys.llama(tmp_path / "model"), toys.text_file(tmp_path), tmp_path / "recipe.yaml"
    recipe.write_text("pennyweight: 1\nsteps:\n- factorize.roast: {density: 0.25}\n")
    fitted = apply(model, recipe, data=text, out=tmp_path / "out", settings=toys.QUICK)
    again = load(tmp_path / "out")
    probe = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(fitted.model.module(probe).logits, again.module(probe).logits)
    weights = [part for part in again.module.modules() if isinstance(part, Hashed)]
    assert len(weights) == 14
    total = sum(math.prod(weight.shape) for weight in weights)
    assert {len(weight.values) for weight in weights} == {total // 4}
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    # the embedding, five norms, and the values once, in 16 bits (the rest is the header)
    assert size < 4 * (256 * 64 + 5 * 64) + 2 * (total // 4) + 8192
    assert len({weight.values.data_ptr() for weight in weights}) == 1


@pytest.mark.parametrize(
    ("lever", "kind", "windows", "error", "words"),
    [
        (Roast(density=0.0), "causal-lm", None, OptionError, "density = 0.0 leaves .* weights no value; give at least"),
        (Roast(steps=1), "encoder", ids(2), OptionError, "factorize.roast: trains causal language models end to end"),
        (Roast(steps=1), "causal-lm", None, DataError, "needs calibration data"),
    ],
)
def test_what_roast_cannot_do_is_refused_and_nothing_is_half_done(lever, kind, windows, error, words):
    model = replace(llama(), kind=kind)
    with pytest.raises(error, match=words):
        lever.change(model, work_on(model, windows))
    assert not any(isinstance(part, Hashed) for part in model.module.modules())


def test_a_layer_cannot_be_shared_twice():
    model = Two()
    with pytest.raises(OptionError, match="2 layers, 1 different ones; give each once"):
        share(model, ["a", "a"], density=0.5)
    share(model, ["a"], density=0.5)
    with pytest.raises(OptionError, match=r"factorize.roast: a is hashed already; put this step first"):
        share(model, ["a", "b"], density=0.5)
    with pytest.raises(OptionError, match=r"factorize.roast: c is no layer"):
        share(model, ["c"], density=0.5)
    whole = llama()
    with pytest.raises(OptionError, match="selects no linear layer of a block"):
        Roast().change(whole, replace(work_on(whole), maps=()))


def test_semi_nonnegative_factors_follow_the_papers_rule_and_the_error_never_rises():
    matrix, _ = problem(20, 14, seed=3)
    errors = []
    for iterations in range(1, 12):
        up, down = semi_nmf(matrix, 5, iterations=iterations)
        assert (down >= 0).all()
        errors.append(float((up @ down - matrix).norm()))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]
    tail = scipy.linalg.svdvals(matrix.double().numpy())[5:]
    assert errors[-1] > math.sqrt((tail**2).sum())  # Eckart and Young: none below
    # the oracle: the rule written out entry by entry
    x, start = matrix.double().numpy(), low_rank(matrix, 5, None, "here")[1].T.abs().numpy()
    free = x @ start @ np.linalg.inv(start.T @ start)
    a, b, codes = x.T @ free, free.T @ free, np.zeros_like(start)
    for j in range(14):
        for k in range(5):
            top = max(a[j, k], 0) + sum(start[j, i] * max(-b[i, k], 0) for i in range(5))
            low = max(-a[j, k], 0) + sum(start[j, i] * max(b[i, k], 0) for i in range(5))
            codes[j, k] = start[j, k] * math.sqrt(top / low)
    product = x @ codes @ np.linalg.inv(codes.T @ codes) @ codes.T
    up, down = semi_nmf(matrix, 5, iterations=1)
    np.testing.assert_allclose((up @ down).numpy(), product, atol=1e-12)


def test_a_semi_nonnegative_matrix_of_rank_one_comes_back():
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(9, 1, generator=g) @ torch.rand(1, 7, generator=g)
    up, down = semi_nmf(matrix, 1)
    torch.testing.assert_close((up @ down).float(), matrix)


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (7, 90)])
def test_auto_ranks_are_shares_of_the_break_even_rank(shape):
    params = shape[0] * shape[1]
    rank = Auto(rank=0.5).rank_for(shape)
    assert 0.5 * params - sum(shape) * 1.5 < rank * sum(shape) <= 0.5 * params
    assert Auto(rank=3.0).rank_for(shape) == 3


def test_auto_leaves_what_does_not_get_smaller_or_faster(monkeypatch):
    model = llama()
    timed = []

    def ratio(matrix, factors, tokens):
        timed.append(tuple(matrix.shape))
        assert (factors.shape, tokens) == (matrix.shape, 64)
        return 0.5 if matrix.shape == (48, 32) else 0.96

    monkeypatch.setattr(auto, "time_ratio", ratio)
    lever = Auto(rank=9.0, tokens=64)
    layers = [one for one in model.anatomy.layers() if one.block is not None]
    choices = lever.choose(model.module, layers)
    assert sorted(timed) == [(16, 32), (32, 32), (32, 48), (48, 32)]  # each shape once
    assert {choice.shape for choice in choices if not choice.why} == {(48, 32)}
    assert "factors of rank 9 take 0.96 of its time" in {choice.why for choice in choices}
    lever.change(model, work_on(model))
    assert all((one.shape == (48, 32)) == isinstance(held(model, one), LowRank) for one in layers)
    assert {choice.why for choice in Auto(rank=11.0, tokens=0).choose(llama().module, layers) if choice.why} == {
        "rank 11 saves nothing from 10.67 on"  # 16 x 32
    }
    with pytest.raises(OptionError, match=r"factorize.auto: none of 14 layers pays .* rank 30 saves nothing"):
        Auto(rank=30.0, tokens=0).change(llama(), work_on(llama()))


def held(model, one):
    return model.module.get_submodule(one.path).weight


@pytest.mark.parametrize("solver", ["svd", "weighted", "snmf", "random"])
def test_every_solver_shrinks_the_model_by_the_ranks_it_says(solver):
    model, dense, windows = llama(), llama(), ids(6)
    lever = Auto(solver=solver, tokens=0, dtype="float32")
    assert needs_of(lever) == ({"second_moment"} if solver == "weighted" else set())
    lever.change(model, work_on(model, windows))
    layers = [one for one in dense.anatomy.layers() if one.block is not None]
    saved = sum(math.prod(one.shape) - lever.rank_for(one.shape) * sum(one.shape) for one in layers)
    costs = [measure_cost(one.module, inputs={"input_ids": windows[:1]}) for one in (dense, model)]
    assert costs[0].params_total - costs[1].params_total == saved > 0
    assert costs[0].bytes - costs[1].bytes == 4 * saved
    for one in layers:
        matrix, found = anatomy.matrix(dense.module, one), held(model, one)
        rank = lever.rank_for(one.shape)
        tail = math.sqrt((scipy.linalg.svdvals(matrix.double().numpy())[rank:] ** 2).sum())
        error = float((found.dense().detach() - matrix).norm())
        assert error == pytest.approx(tail, rel=1e-4) if solver == "svd" else error > tail * (1 + 1e-6)
        if solver == "snmf":
            assert (found.down >= 0).all()
        if solver == "random":
            assert 0.7 < float(found.dense().detach().std() / matrix.std()) < 1.4


def test_weighted_factors_keep_the_outputs_and_plain_ones_the_matrices():
    windows, errors = ids(16), {}
    dense = llama()
    for solver in ("svd", "weighted"):
        model = llama()
        Auto(solver=solver, tokens=0, dtype="float32").change(model, work_on(model, windows))
        first = next(one for one in dense.anatomy.layers() if one.block == 0)
        moment = work_on(dense, windows).statistics({"second_moment"})[first.name].second_moment
        matrix = anatomy.matrix(dense.module, first)
        errors[solver] = objective(held(model, first).dense(), matrix, moment)
    assert errors["weighted"] < 0.98 * errors["svd"]


def test_thin_factors_are_timed_faster_and_thick_ones_slower():
    matrix = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    thin, thick = (LowRank.nearest(matrix, rank) for rank in (8, 512))
    # a sixtieth of the work against twice of it: told apart on a busy machine, too, where absolute bounds are not
    assert auto.time_ratio(matrix, thin, 256, repeats=5) < 0.7 * auto.time_ratio(matrix, thick, 256, repeats=5)


def test_convolutions_are_factorized_and_grouped_ones_left():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Conv2d(16, 16, 3, groups=4))
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        thin = LowRank.nearest(module[0].weight.flatten(1), 5).dense().view_as(module[0].weight)
        expected = module[1](torch.nn.functional.conv2d(x, thin, module[0].bias))
    model = Model(module, None, "convolutions", "module")
    choices = Auto(rank=5.0, dtype="float32").choose(module, model.anatomy.layers())
    assert [choice.why for choice in choices] == ["", "is a grouped convolution"]
    Auto(rank=5.0, dtype="float32").change(model, work_on(model))
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_a_recipe_runs_auto_and_the_file_brings_it_back(tmp_path):
    model, text, recipe = toys.llama(tmp_path / "model"), toys.text_file(tmp_path), tmp_path / "recipe.yaml"
    recipe.write_text("pennyweight: 1\nsteps:\n- factorize.auto: {rank: 0.5, solver: weighted, tokens: 0}\n")
    fitted = apply(model, recipe, data=text, out=tmp_path / "out", settings=toys.QUICK)
    again = load(tmp_path / "out")
    probe = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(fitted.model.module(probe).logits, again.module(probe).logits)
    assert sum(isinstance(part, LowRank) for part in again.module.modules()) == 14
