"""quantize.fp against torch's 8-bit floats, brute force, the errors of Gaussian weights, and quantize.gptq."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, sampled_from
from problems import objective, problem

from pennyweight.errors import DataError, OptionError
from pennyweight.lever import candidates_of, find, make, needs_of
from pennyweight.levers.quantize.fp import FloatingPoint, constrained
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.solvers.rounding import GridOptions
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Activation, Dense, Grid, Quantized, Sum, rebuild, structure
from pennyweight.weights.grid import float_levels

NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def one(format: str, bits: int) -> Grid:
    return Grid(bits, None, torch.ones(1, 1), None, "none", format)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_rounding_is_that_of_torch_on_a_hundred_thousand_values(format):
    native = NATIVE[format]
    g = torch.Generator().manual_seed(0)
    spread = torch.randn(90_000, generator=g).sign() * torch.exp2(40 * torch.rand(90_000, generator=g) - 22)
    levels = float_levels(format)
    levels = levels[levels.isfinite()].unique()
    ties = (levels[1:] + levels[:-1]) / 2
    close = torch.cat([ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))])
    x = torch.cat([spread, levels, close, torch.linspace(-(2.0**-6), 2.0**-6, 20_000)])
    assert len(x) >= 100_000
    largest, smallest = torch.finfo(native).max, torch.finfo(native).smallest_normal
    expected = x.clamp(-largest, largest).to(native).float()
    assert (x.abs() > largest).sum() > 1000  # saturated
    assert (expected.abs() < smallest)[expected != 0].sum() > 1000  # subnormal
    grid = one(format, 8)
    assert torch.equal(grid.values(grid.codes(x[None]))[0], expected)
    assert torch.equal(Activation(format=format, granularity="tensor", scale=torch.ones(1))(x), expected)


@pytest.mark.parametrize(
    ("format", "levels"),
    [("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]), ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16])],
)
def test_four_bit_levels_and_their_neighborhoods(format, levels):
    assert float_levels(format)[:8].tolist() == levels
    both = np.array([-level for level in levels] + levels)
    x = 20 * np.random.default_rng(0).random(2000) - 10
    grid = one(format, 4)
    found = grid.values(grid.codes(torch.tensor(x[None], dtype=torch.float32)))[0].numpy()
    np.testing.assert_allclose(found, both[np.abs(x[:, None] - both).argmin(1)])


def drawn(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=g) * torch.exp(1.5 * torch.randn(rows, width, generator=g))


@given(
    rows=integers(1, 6),
    width=integers(1, 40),
    size=integers(1, 8),
    seed=integers(0, 2**31),
    format=sampled_from(["e2m1", "e3m0", "e4m3"]),
)
def test_constrained_scales_are_exact_powers_and_ratios(rows, width, size, seed, format):
    matrix = drawn(rows, width, seed)
    free = GridOptions(8 if format == "e4m3" else 4, size, "none", format).fit(matrix)
    scale = free.scale.float()
    power = constrained(free, "power").scale
    assert bool((power.log2() == power.log2().round()).all())
    assert bool(((power >= scale) & (power < 2 * scale)).all())
    top = scale.amax(1, keepdim=True)
    for shift in ("floor", "ceil"):
        ratio = constrained(free, "ratio", shift).scale
        steps = (top / ratio).log2()
        assert bool((steps == steps.round()).all())
        assert torch.equal(ratio.amax(1, keepdim=True), top)
        inside = (ratio >= scale) & (ratio < 2 * scale) if shift == "floor" else (ratio <= scale) & (2 * ratio > scale)
        assert bool(inside.all())
    for constraint in ("power", "ratio"):
        again = constrained(constrained(free, constraint), constraint)
        assert torch.equal(again.scale, constrained(free, constraint).scale)
    assert constrained(free, "free") is free


def test_constrained_scales_take_the_bits_of_an_exponent():
    matrix = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    free, power, ratio = (
        FloatingPoint(method="rtn", group_size=32, scales=scales).solve(Dense(matrix), NO_STATISTICS).cost().bytes
        for scales in ("free", "power", "ratio")
    )
    codes = 8 * 256 // 2
    assert free == codes + 8 * 8 * 2
    assert power == codes + 8 * 8 // 2 + 2
    assert ratio == codes + 8 * 8 // 2 + 8 * 2
    wide = matrix * torch.exp2(-4.0 * torch.arange(8).repeat_interleave(32))  # more than 4 bits can tell apart
    found = FloatingPoint(method="rtn", group_size=32).solve(Dense(wide), NO_STATISTICS)
    assert found.scale.bits == 8
    assert found.error(wide) < 0.2


@pytest.mark.parametrize("scales", ["power", "ratio"])
def test_a_four_bit_weight_is_an_eight_bit_one_after_a_shift(scales):
    """What the constraints are for: over the scale of its row, every weight is an E5M2 number exactly."""
    matrix = torch.randn(16, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    found = FloatingPoint(method="rtn", group_size=16, scales=scales).solve(Dense(matrix), NO_STATISTICS)
    over = found.dense().detach() / found.grid.scale.detach().amax(1, keepdim=True)
    assert torch.equal(over.to(torch.float8_e5m2).float(), over)
    free = FloatingPoint(method="rtn", group_size=16, scales="free").solve(Dense(matrix), NO_STATISTICS)
    over = free.dense().detach() / free.grid.scale.detach().amax(1, keepdim=True)
    assert not torch.equal(over.to(torch.float8_e5m2).float(), over)


@pytest.mark.parametrize(
    ("options", "gaussian", "laplacian"),
    [
        ({"scales": "free"}, 0.0119, 0.0147),
        ({"scales": "free", "format": "e3m0"}, 0.037, 0.034),
        ({"scales": "power"}, 0.0156, 0.0236),
        ({"scales": "ratio"}, 0.0137, 0.0216),
    ],
)
def test_errors_on_gaussian_and_laplacian_weights(options, gaussian, laplacian):
    """Squared error over power in groups of 128, rows of 16 groups, from a simulation that shares no code."""
    g = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(256, 2048, generator=g), torch.rand(256, 2048, generator=g) - 0.5
    for matrix, expected in ((normal, gaussian), (-uniform.sign() * torch.log1p(-2 * uniform.abs()), laplacian)):
        found = FloatingPoint(method="rtn", group_size=128, **options).solve(Dense(matrix), NO_STATISTICS)
        assert found.error(matrix) ** 2 == pytest.approx(expected, rel=0.03)


def test_the_ceiling_of_ratios_clips():
    matrix = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    floor, ceil = (
        FloatingPoint(method="rtn", group_size=128, shift=shift).solve(Dense(matrix), NO_STATISTICS).error(matrix) ** 2
        for shift in ("floor", "ceil")
    )
    assert floor == pytest.approx(0.0133, rel=0.03)
    assert ceil == pytest.approx(0.029, rel=0.03)


def test_outliers_cost_integers_more_than_floats():
    x = torch.randn(512, 384, generator=torch.Generator().manual_seed(0))
    x[:, :4] *= 30
    for format, expected in (("integer", 0.0058), ("e4m3", 0.0007), ("e5m2", 0.0028)):
        error = (Activation(format=format)(x) - x)[:, 4:].square().mean() / x[:, 4:].square().mean()
        assert float(error) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("act_order", [True, False])
def test_free_scales_with_feedback_are_those_of_gptq(act_order):
    matrix, statistics = problem(24, 96, dead=3)
    found = FloatingPoint(scales="free", group_size=32, act_order=act_order).solve(Dense(matrix), statistics)
    expected = GPTQ(bits=4, format="e2m1", zero="none", group_size=32, act_order=act_order)
    assert torch.equal(found.dense(), expected.solve(Dense(matrix), statistics).dense())


@pytest.mark.parametrize("scales", ["free", "power", "ratio"])
def test_feedback_lowers_the_outputs_error_on_every_grid(scales):
    matrix, statistics = problem(24, 96)
    plain, fed = (
        FloatingPoint(scales=scales, group_size=32, method=method).solve(Dense(matrix), statistics).dense()
        for method in ("rtn", "gptq")
    )
    moment = statistics.second_moment
    assert objective(fed, matrix, moment) < 0.8 * objective(plain, matrix, moment)


def test_weights_solved_together_are_those_solved_alone():
    _, statistics = problem(1, 64)
    matrices = [drawn(rows, 64, seed=rows) for rows in (8, 24)]
    lever = FloatingPoint(group_size=16, rank=3)
    both = lever.solve_group([Dense(m) for m in matrices], statistics)
    for matrix, found in zip(matrices, both, strict=True):
        torch.testing.assert_close(found.dense(), lever.solve(Dense(matrix), statistics).dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_rank_gives_back_the_largest_part_of_the_error(weighted):
    matrix, statistics = problem(24, 96)
    errors = []
    for rank in (0, 4, 24):
        lever = FloatingPoint(method="rtn", group_size=32, rank=rank, weighted=weighted)
        found = lever.solve(Dense(matrix), statistics)
        errors.append(found.error(matrix, statistics.second_moment if weighted else None))
        assert isinstance(found, Sum) == bool(rank)
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 1e-2 * errors[0]
    base = RTN(bits=4, format="e2m1", zero="none", group_size=32).solve(Dense(matrix), statistics)
    free = FloatingPoint(method="rtn", scales="free", group_size=32, rank=4, weighted=False).solve(
        Dense(matrix), NO_STATISTICS
    )
    singular = torch.linalg.svdvals(matrix - base.dense().detach())
    assert free.error(matrix) * float(matrix.norm()) == pytest.approx(float(singular[4:].norm()), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"scales": "power", "rank": 2, "factor_bits": 8}, {"format": "e5m2"}], ids=str)
def test_it_comes_back_from_its_structure(options):
    matrix, statistics = problem(12, 64)
    found = make("quantize.fp", {"group_size": 16, **options}).solve(Dense(matrix), statistics)
    again = rebuild(json.loads(json.dumps(structure(found))), found.state_dict())
    assert torch.equal(again.dense(), found.dense())
    assert again.cost() == found.cost()


def test_groups_of_zeros_and_tiny_weights():
    matrix = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    matrix[:, :16] = 0
    matrix[1] = 0
    matrix[2] *= 1e-6
    for scales in ("power", "ratio"):
        found = FloatingPoint(method="rtn", scales=scales, group_size=16).solve(Dense(matrix), NO_STATISTICS)
        assert bool((found.dense()[:, :16] == 0).all())
        assert found.error(matrix) < 0.2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shift": "ceil", "scales": "power"}, "shift has no effect on scales = 'power'"),
        ({"group_size": None}, "scales = 'ratio' with one group a row leaves nothing to constrain"),
        ({"format": "e1m2"}, "format = 'e1m2'"),
        ({"group_size": 0}, "group_size = 0 is out of range"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        make("quantize.fp", options)


def test_what_it_needs_and_offers():
    assert needs_of(FloatingPoint()) == {"second_moment"}
    assert needs_of(FloatingPoint(method="rtn")) == frozenset()
    assert needs_of(FloatingPoint(method="rtn", rank=2)) == {"second_moment"}
    assert needs_of(FloatingPoint(method="rtn", rank=2, weighted=False)) == frozenset()
    matrix, statistics = problem(40, 512)
    offers = [lever.solve(Dense(matrix), statistics) for lever in candidates_of(find("quantize.fp"), (40, 512))]
    assert len(offers) == 3
    assert list(candidates_of(find("quantize.fp"), (40, 16))) == []
    with pytest.raises(DataError, match=r"quantize\.fp: needs calibration data"):
        FloatingPoint().solve(Dense(matrix), NO_STATISTICS)
    with pytest.raises(OptionError, match="rank = 41 for a 40x512 matrix; give at most 40"):
        FloatingPoint(rank=41).solve(Dense(matrix), statistics)
    whole = FloatingPoint(method="rtn", scales="free", group_size=None).solve(Dense(matrix), NO_STATISTICS)
    assert isinstance(whole, Quantized)
