"""prune.magnitude, prune.wanda, prune.sparsegpt and gradual pruning against plain references and counts."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers
from problems import objective, problem
from reference.sparsegpt import sparsegpt
from reference.wanda import wanda
from torch import nn

from pennyweight.errors import OptionError, ShapeError
from pennyweight.lever import make
from pennyweight.levers.prune.gradual import GradualPruning
from pennyweight.levers.prune.magnitude import Magnitude
from pennyweight.levers.prune.sparsegpt import SparseGPT
from pennyweight.levers.prune.wanda import Wanda
from pennyweight.solvers.masks import patterned, smallest
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.train.sparsity_schedules import CubicSchedule
from pennyweight.weights import Dense, NofM, Quantized, Sparse

PATTERNS = [("2:4", (2, 4)), ("1:4", (1, 4)), ("4:8", (4, 8))]


def shared(left, right):
    """Share of entries that are zero in both or in neither."""
    return ((left == 0) == (right == 0)).float().mean()


@given(
    rows=integers(1, 5), width=integers(1, 30), count=integers(-1, 31), levels=integers(1, 40), seed=integers(0, 2**31)
)
def test_smallest_is_a_stable_sort_cut_off(rows, width, count, levels, seed):
    scores = torch.randint(0, levels, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected.scatter_(1, scores.sort(dim=1, stable=True).indices[:, : max(0, count)], True)
    assert torch.equal(smallest(scores, count), expected)


@given(groups=integers(1, 6), of=integers(2, 9), kept=integers(1, 8), levels=integers(1, 9), seed=integers(0, 2**31))
def test_patterned_is_a_stable_sort_of_every_run(groups, of, kept, levels, seed):
    kept = min(kept, of - 1)
    scores = torch.randint(0, levels, (3, groups * of), generator=torch.Generator().manual_seed(seed)).float()
    runs = scores.view(3, groups, of)
    expected = torch.zeros_like(runs, dtype=torch.bool)
    expected.scatter_(2, runs.sort(dim=2, stable=True).indices[..., : of - kept], True)
    assert torch.equal(patterned(scores, kept, of), expected.view_as(scores))


# ---- magnitude


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9, 1.0])
def test_magnitude_zeroes_exactly_the_smallest(sparsity):
    matrix, _ = problem(10, 10)
    found = Magnitude(sparsity=sparsity, dtype="float32").solve(Dense(matrix), NO_STATISTICS)
    count = round(sparsity * 100)
    threshold = matrix.abs().flatten().sort().values[count - 1] if count else -1.0
    assert isinstance(found, Sparse)
    assert torch.equal(found.dense(), torch.where(matrix.abs() > threshold, matrix, 0.0))


def test_magnitude_of_equal_weights_still_counts():
    found = Magnitude(sparsity=0.3).solve(Dense(torch.ones(4, 5)), NO_STATISTICS)
    assert int((found.dense() == 0).sum()) == 6


def test_pruning_again_goes_on_from_the_zeros():
    matrix, statistics = problem(16, 32)
    once = Magnitude(sparsity=0.5).solve(Dense(matrix), NO_STATISTICS)
    for lever in (Magnitude(sparsity=0.75), Wanda(sparsity=0.75), SparseGPT(sparsity=0.75)):
        twice = lever.solve(once, statistics).dense()
        assert int((twice == 0).sum()) == 0.75 * matrix.numel()
    assert torch.equal(
        Magnitude(sparsity=0.75).solve(once, NO_STATISTICS).dense() != 0,
        Magnitude(sparsity=0.75).solve(Dense(matrix), NO_STATISTICS).dense() != 0,
    )


def test_patterns_are_stored_as_patterns():
    matrix, statistics = problem(16, 32)
    for lever in (Magnitude(pattern="2:4"), Wanda(pattern="2:4"), SparseGPT(pattern="2:4")):
        found = lever.solve(Dense(matrix), statistics)
        assert isinstance(found, NofM)
        assert found.cost().bytes == 16 * 32 // 2 * 2 + 16 * 32 // 4 * 3 // 8  # float16, and 3 bits a run


# ---- Wanda


@pytest.mark.parametrize("dead", [0, 7])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_wanda_agrees_with_the_official_algorithm(sparsity, dead):
    matrix, statistics = problem(12, 50, dead=dead)
    found = Wanda(sparsity=sparsity, dtype="float32").solve(Dense(matrix), statistics)
    assert torch.equal(found.dense(), wanda(matrix, statistics.second_moment, sparsity=sparsity))


@pytest.mark.parametrize(("pattern", "parsed"), PATTERNS)
def test_wanda_agrees_with_the_official_algorithm_on_patterns(pattern, parsed):
    matrix, statistics = problem(12, 48, dead=7)
    found = Wanda(pattern=pattern, dtype="float32").solve(Dense(matrix), statistics)
    assert torch.equal(found.dense(), wanda(matrix, statistics.second_moment, pattern=parsed))


def test_wanda_with_equal_norms_is_magnitude():
    matrix, _ = problem(6, 32)
    equal = Statistics(second_moment=torch.ones(32, 32) + torch.eye(32))
    by_pattern = [lever(pattern="2:4").solve(Dense(matrix), equal).dense() for lever in (Wanda, Magnitude)]
    assert torch.equal(*by_pattern)
    rows = [Magnitude(sparsity=0.5).solve(Dense(row[None]), equal).dense() for row in matrix]  # compared within a row
    assert torch.equal(Wanda(sparsity=0.5).solve(Dense(matrix), equal).dense(), torch.cat(rows))


# ---- SparseGPT


@pytest.mark.parametrize("dead", [0, 9])
@pytest.mark.parametrize(
    ("ours", "official"),
    [
        ({"sparsity": 0.5}, {"sparsity": 0.5}),
        ({"sparsity": 0.8}, {"sparsity": 0.8}),
        ({"sparsity": 0.5, "block": 40}, {"sparsity": 0.5, "block": 40}),
        ({"sparsity": 0.5, "damping": 0.1}, {"sparsity": 0.5, "damping": 0.1}),
        *(({"pattern": pattern}, {"pattern": parsed}) for pattern, parsed in PATTERNS),
        ({"pattern": "2:4", "bits": 4}, {"pattern": (2, 4), "bits": 4}),
        ({"pattern": "4:8", "bits": 3}, {"pattern": (4, 8), "bits": 3}),
    ],
)
def test_sparsegpt_agrees_with_the_official_algorithm(ours, official, dead):
    matrix, statistics = problem(48, 256, dead=dead)
    moment = statistics.second_moment
    # without bits, kept in full so that storage adds nothing
    lever = SparseGPT(**ours) if "bits" in ours else SparseGPT(**ours, dtype="float32")
    found = lever.solve(Dense(matrix), statistics).dense()
    expected = sparsegpt(matrix, moment, **official)
    assert objective(found, matrix, moment) == pytest.approx(objective(expected, matrix, moment), rel=1e-3)
    assert shared(found, expected) > 0.999


def test_sparsegpt_is_within_a_weight_a_block_of_the_official_count():
    # one weight more moves every later choice a little: 1e-3 of the objective of 100 rows, 1e-4 of 600
    matrix, statistics = problem(600, 256)
    moment = statistics.second_moment
    found = SparseGPT(sparsity=0.5, dtype="float32").solve(Dense(matrix), statistics).dense()
    official = sparsegpt(matrix, moment, inclusive=True)
    assert int((found == 0).sum()) == 600 * 128
    assert int((official == 0).sum()) == 600 * 128 + 2
    assert objective(found, matrix, moment) == pytest.approx(objective(official, matrix, moment), rel=1e-3)


@pytest.mark.parametrize("width", [1, 5, 64, 130])
def test_sparsegpt_at_no_sparsity_is_the_identity(width):
    matrix, statistics = problem(7, width)
    assert torch.equal(SparseGPT(sparsity=0.0, dtype="float32").solve(Dense(matrix), statistics).dense(), matrix)


def test_sparsegpt_at_full_sparsity_keeps_nothing():
    matrix, statistics = problem(7, 64)
    for options in ({}, {"bits": 4, "block": 32}):
        assert not SparseGPT(sparsity=1.0, **options).solve(Dense(matrix), statistics).dense().any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_sparsegpt_beats_wanda_beats_magnitude_on_correlated_inputs(options, seed):
    matrix, statistics = problem(64, 128, seed=seed)
    errors = [
        objective(lever(**options).solve(Dense(matrix), statistics).dense().float(), matrix, statistics.second_moment)
        for lever in (SparseGPT, Wanda, Magnitude)
    ]
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < errors[2]


@pytest.mark.parametrize("options", [{"sparsity": 0.5, "block": 32}, {"pattern": "2:4", "group_size": 32}])
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_sparsegpt_with_bits_beats_rounding_what_it_keeps_afterwards(options, zero):
    matrix, statistics = problem(64, 128)
    moment = statistics.second_moment
    joint = SparseGPT(**options, bits=3, zero=zero).solve(Dense(matrix), statistics)
    assert isinstance(joint.values, Quantized)
    assert int((joint.mask()).sum()) == matrix.numel() // 2
    group = joint.values.group_size
    plain = SparseGPT(**{k: v for k, v in options.items() if k != "group_size"}).solve(Dense(matrix), statistics)
    after = make("quantize.rtn", {"bits": 3, "group_size": group, "zero": zero}).solve(plain, NO_STATISTICS)
    assert joint.cost().bytes <= after.cost().bytes
    assert objective(joint.dense(), matrix, moment) < objective(after.dense(), matrix, moment)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("prune.magnitude", {}, "prune.magnitude: nothing to prune; give sparsity"),
        ("prune.magnitude", {"sparsity": 1.5}, "sparsity = 1.5 is out of range; give between 0 and 1"),
        ("prune.wanda", {"pattern": "2-4"}, "prune.wanda: pattern = '2-4' is not KEPT:OF"),
        ("prune.wanda", {"pattern": "4:4"}, "pattern = '4:4' is not KEPT:OF with fewer kept"),
        ("prune.sparsegpt", {"pattern": "2:4", "sparsity": 0.6}, "sparsity = 0.6 with pattern 2:4, which has 0.5"),
        ("prune.sparsegpt", {"sparsity": 0.5, "zero": "float"}, "zero has no effect without bits"),
        ("prune.sparsegpt", {"sparsity": 0.5, "bits": 4, "dtype": "float32"}, "dtype has no effect with bits = 4"),
        ("prune.sparsegpt", {"sparsity": 0.5, "bits": 4, "group_size": 64}, "group_size = 64 with block = 128"),
        ("prune.sparsegpt", {"pattern": "2:4", "bits": 4, "group_size": 30}, "cuts the runs of 4 of pattern 2:4"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(name, options, words):
    with pytest.raises(OptionError, match=words):
        make(name, options)


def test_widths_that_do_not_fit_are_refused_with_the_remedy():
    matrix, statistics = problem(4, 42)
    for lever in (Magnitude(pattern="2:4"), Wanda(pattern="2:4"), SparseGPT(pattern="2:4")):
        with pytest.raises(
            OptionError, match=rf"{lever.lever_name}: pattern 2:4 does not divide the 42 inputs; choose 1:2"
        ):
            lever.solve(Dense(matrix), statistics)
    with pytest.raises(OptionError, match=r"block 40 does not divide the 42 inputs, .* choose 42"):
        SparseGPT(sparsity=0.5, bits=4, block=40).solve(Dense(matrix), statistics)


# ---- the gradual schedule


@given(
    initial=floats(0, 1), rise=floats(0, 1), start=integers(0, 1000), every=integers(1, 200), intervals=integers(1, 40)
)
def test_schedule_is_the_formula_at_the_knots_and_never_falls(initial, rise, start, every, intervals):
    final = initial + rise * (1 - initial)
    schedule = CubicSchedule(final=final, start=start, end=start + every * intervals, every=every, initial=initial)
    for k in range(intervals + 1):
        expected = final + (initial - final) * (1 - (start + k * every - start) / (intervals * every)) ** 3
        assert schedule.sparsity(start + k * every) == pytest.approx(expected, abs=1e-12)
        assert schedule.sparsity(start + k * every + every - 1) == pytest.approx(schedule.sparsity(start + k * every))
    values = [schedule.sparsity(step) for step in range(start, schedule.end + 2)]
    assert all(a <= b + 1e-12 for a, b in pairwise(values))
    assert schedule.sparsity(start - 1) == 0
    assert schedule.sparsity(schedule.end + 10**6) == final


@pytest.mark.parametrize("options", [
    {"final": 1.2, "start": 0, "end": 10, "every": 5},
    {"final": 0.5, "start": 0, "end": 10, "every": 5, "initial": 0.6},
    {"final": 0.5, "start": 0, "end": 10, "every": 3},
    {"final": 0.5, "start": 5, "end": 5, "every": 1},
])  # fmt: skip
def test_schedules_that_cannot_be_are_refused(options):
    with pytest.raises(OptionError, match="gradual pruning from"):
        CubicSchedule(**options)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_pruning_masks_forward_and_gradient_and_ends_exact(scope):
    net, g = network(), torch.Generator().manual_seed(1)
    layers = [net[0], net[2]]
    # both move parameters that have no gradient: masked ones must stay all the same
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    schedule = CubicSchedule(final=0.8, start=3, end=19, every=4)
    pruning = GradualPruning(layers, schedule, scope=scope)
    masks = []
    for step in range(25):
        assert pruning.sparsity == pytest.approx(schedule.sparsity(step), abs=0.51 / 63)
        before = [layer.parametrizations.weight.original.detach().clone() for layer in layers]
        pruned = [layer.weight == 0 for layer in layers]
        masks.append(torch.cat([mask.flatten() for mask in pruned]))
        loss = (net(torch.randn(32, 12, generator=g)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for layer, mask in zip(layers, pruned, strict=True):
            assert not layer.parametrizations.weight.original.grad[mask].any()
        optimizer.step()
        pruning.step()
        for layer, mask, old in zip(layers, pruned, before, strict=True):
            new = layer.parametrizations.weight.original
            assert torch.equal(new[mask], old[mask])
            assert (new[~mask] != old[~mask]).all()
    assert any((early & ~late).any() for early, late in pairwise(masks))  # taken up again
    pruning.finish()
    zeros = [int((layer.weight == 0).sum()) for layer in layers]
    assert zeros == [round(0.8 * 108), round(0.8 * 63)] if scope == "layer" else sum(zeros) == round(0.8 * 171)
    assert sorted(net.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert type(net[0]) is nn.Linear


def test_gradual_pruning_picks_the_smallest_weights():
    net = network()
    weight = net[0].weight.detach().clone()
    pruning = GradualPruning([net[0]], CubicSchedule(final=0.5, start=0, end=1, every=1))
    pruning.step()
    expected = Magnitude(sparsity=0.5, dtype="float32").solve(Dense(weight), NO_STATISTICS).dense()
    assert torch.equal(net[0].weight, expected)


def test_gradual_pruning_refuses_layers_it_cannot_mask():
    schedule = CubicSchedule(final=0.5, start=0, end=10, every=5)
    net = network()
    with pytest.raises(ShapeError, match="give at least one layer"):
        GradualPruning([], schedule)
    with pytest.raises(ShapeError, match="each with a weight of its own"):
        GradualPruning([net[1]], schedule)
    with pytest.raises(ShapeError, match="share a weight"):
        GradualPruning([net[0], net[0]], schedule)
