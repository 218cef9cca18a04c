"""The knee against curves made of two lines, masks against torch's own pruning, and the curve from model to page."""

import json
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import torch
import toys
from hypothesis import given
from hypothesis.strategies import floats, integers
from torch import nn
from torch.nn.utils import prune
from typer.testing import CliRunner

from pennyweight.cli.app import app
from pennyweight.data import windows
from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.essential import Tune, essential, layers_of, masks_for
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.lever import make
from pennyweight.measure.knee import breaks, knee
from pennyweight.model import anatomy, load, save
from pennyweight.solvers.spread import erk, spread
from pennyweight.weights import Dense
from pennyweight.work import Work

POINTS = [i / 10 for i in range(10)]


def two_lines(x, at, first, second):
    return first * x + (second - first) * np.maximum(0, x - at)


@given(at=floats(0.1, 0.8), first=floats(0, 0.2), turn=floats(0.5, 5))
def test_the_breakpoint_of_two_lines_is_found_within_a_step(at, first, turn):
    x = np.array(POINTS)
    found = breaks(x, two_lines(x, at, first, first + turn)[None])[0]
    assert abs(found - at) <= 0.1 / 20 + 1e-9


@given(seed=integers(0, 2**32 - 1))
def test_no_other_breakpoint_fits_better(seed):
    x, g = np.array(POINTS), np.random.default_rng(seed)
    # convex, so that no point is left out
    curve = np.cumsum(np.cumsum(g.random(10) ** 3))

    def left(at):
        design = np.stack([np.ones(10), x, np.maximum(0, x - at)], 1)
        _, residual, *_ = np.linalg.lstsq(design, curve, rcond=None)
        return float(residual[0])

    best = min(scipy.optimize.minimize_scalar(left, bounds=(a, b), method="bounded").fun for a, b in pairwise(x[1:-1]))
    found = breaks(x, curve[None])[0]
    near = [left(found - 0.0025), left(found + 0.0025), left(found)]  # half the fineness to either side
    assert min(near) <= best * 1.05 + 1e-9


def test_where_a_collapse_levels_off_is_not_the_knee():
    x = np.array(POINTS)
    curve = np.minimum(two_lines(x, 0.3, 0.05, 4.0), 1.0)
    assert breaks(x, curve[None])[0] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("curve", [np.zeros(10), np.full(10, 0.3), -np.array(POINTS), -np.square(POINTS)])
def test_a_curve_that_never_rises_has_its_knee_at_the_end(curve):
    assert breaks(np.array(POINTS), curve[None])[0] == 0.9
    found = knee(POINTS, np.tile(curve, (4, 1)), resamples=99)
    assert not found.turns
    assert (found.at, found.low, found.high) == (0.9, 0.9, 0.9)


@pytest.mark.parametrize("curve", [np.array(POINTS), 0.2 + np.sqrt(POINTS)], ids=["line", "concave"])
def test_a_curve_that_costs_from_the_first_has_its_knee_there(curve):
    found = knee(POINTS, np.tile(curve, (4, 1)), resamples=99)
    assert (found.at, found.low, found.high, found.before) == (0, 0, 0, 0)
    assert found.turns


def test_the_interval_covers_the_truth_as_often_as_it_says():
    g, x = np.random.default_rng(0), np.array(POINTS)
    hits, widths = 0, []
    for trial in range(40):
        each = g.uniform(0.4, 0.6, 32)  # the windows' own knees
        harm = np.stack([two_lines(x, 0.5, 0.1, 3.0) * (1 + at) for at in each]) + 0.1 * g.standard_normal((32, 10))
        found = knee(POINTS, harm, resamples=199, seed=trial)
        hits += found.low <= 0.5 <= found.high
        widths.append(found.high - found.low)
    assert hits >= 33  # 95 % of 40 is 38; fewer than 33 happens once in 1,000
    assert 0 < np.mean(widths) < 0.15


def test_slopes_are_those_of_the_lines():
    found = knee(POINTS, np.tile(two_lines(np.array(POINTS), 0.5, 0.2, 3.0), (3, 1)), resamples=99)
    assert (found.at, found.before, found.after) == pytest.approx((0.5, 0.2, 3.0))
    assert found.turns
    assert found.words == "0.50 [0.50, 0.50]"


@pytest.mark.parametrize(
    ("points", "harm", "words"),
    [
        ([0, 0.1, 0.2], np.zeros((2, 3)), "at least four"),
        ([0, 0.2, 0.1, 0.3], np.zeros((2, 4)), "that rise"),
        ([0, 0.1, 0.2, 0.3], np.zeros((2, 3)), "samples, points"),
        ([0, 0.1, 0.2, 0.3], np.full((2, 4), np.nan), "NaN"),
    ],
)
def test_bad_curves_are_refused(points, harm, words):
    with pytest.raises(DataError, match=words):
        knee(points, harm)


def test_the_mask_is_that_of_torchs_global_pruning():
    g = torch.Generator().manual_seed(0)
    layers = [nn.Linear(12, 9), nn.Linear(30, 4), nn.Linear(5, 5)]
    matrices = [
        torch.randn(layer.weight.shape, generator=g) * scale for layer, scale in zip(layers, (1, 0.3, 3), strict=True)
    ]
    for sparsity in (0, 0.1, 0.5, 0.9, 1):
        for layer, matrix in zip(layers, matrices, strict=True):
            layer.weight = nn.Parameter(matrix.clone())
        found = masks_for(matrices, sparsity, criterion="magnitude", scope="global")
        amount = int(sparsity * sum(matrix.numel() for matrix in matrices))  # a count: shares it rounds its own way
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=amount)
        for mask, layer in zip(found, layers, strict=True):
            assert torch.equal(mask, layer.weight_mask.bool())
            prune.remove(layer, "weight")


def test_patterns_keep_the_largest_of_every_group():
    matrix = torch.tensor([[1.0, -4, 2, 3, 0, 0, 5, -6]])
    (found,) = masks_for([matrix], 0.5, criterion="magnitude", scope="", of=4)
    assert found.tolist() == [[False, True, False, True, False, False, True, True]]
    with pytest.raises(OptionError, match="2:6 does not divide the 8 inputs"):
        masks_for([matrix], 4 / 6, criterion="random", scope="", of=6)


@given(sparsity=floats(0, 1), shapes=integers(1, 6), seed=integers(0, 2**32 - 1))
def test_erk_shares_add_up_and_follow_the_rule(sparsity, shapes, seed):
    g = np.random.default_rng(seed)
    sizes = [tuple(int(side) for side in g.integers(1, 60, 2)) for _ in range(shapes)]
    found = erk(sizes, sparsity)
    counts = [m * n for m, n in sizes]
    assert sum(s * c for s, c in zip(found, counts, strict=True)) == pytest.approx(sparsity * sum(counts), abs=1e-6)
    assert all(0 <= one <= 1 for one in found)
    thin = [(1 - s) / ((m + n) / (m * n)) for s, (m, n) in zip(found, sizes, strict=True) if s > 0]
    assert max(thin, default=0) <= min(thin, default=0) * (1 + 1e-6) + 1e-9  # one factor for all that are not full


def test_zeros_are_spread_as_asked():
    scores = [torch.arange(20.0).view(4, 5), torch.arange(100.0, 120.0).view(2, 10)]
    assert [int(mask.sum()) for mask in spread(scores, 0.5, "global")] == [0, 20]
    assert [int(mask.sum()) for mask in spread(scores, 0.5, "layer")] == [10, 10]
    assert [int(mask.sum()) for mask in spread(scores, 0.5, "erk")] == [9, 12]  # as out + in
    with pytest.raises(OptionError, match="scope 'row'"):
        spread(scores, 0.5, "row")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return toys.llama(folder / "model"), toys.text_file(folder)


@pytest.fixture(scope="module")
def found(toy):
    model, text = toy
    shares = (0, 0.25, 0.5, 0.75, 0.95)
    return essential(
        model, scopes=("global", "layer"), groups=(4,), sparsities=shares, floor="perplexity<=1.5x", data=text,
        settings=toys.QUICK,
    )  # fmt: skip


def test_a_point_is_what_the_lever_does_alone(found, toy):
    model, text = toy
    (curve,) = (one for one in found.curves if (one.criterion, one.scope) == ("magnitude", "layer"))
    changed = load(model)
    held = windows(text, changed.tokenizer, part="heldout", length=48, count=6, seed=0)
    before = token_losses(changed.module, held).mean(1)
    for one in layers_of(changed.module, "toy"):
        dense = Dense(anatomy.matrix(changed.module, one).contiguous())
        lever = make("prune.magnitude", {"sparsity": 0.5, "dtype": "float32"})
        anatomy.replace(changed.module, one.path, lever.solve(dense, None))
    after = token_losses(changed.module, held).mean(1)
    assert curve.points[2].effect == pytest.approx(float((after - before).double().mean().exp()), rel=1e-5)


def test_every_curve_is_there_and_starts_at_the_dense_model(found, toy):
    assert [curve.name for curve in found.curves] == [
        "magnitude, global", "magnitude, layer", "magnitude, N:4", "random, global", "random, layer", "random, N:4",
    ]  # fmt: skip
    for curve in found.curves:
        assert (curve.points[0].sparsity, curve.points[0].effect) == (0, 1)
        assert [p.sparsity for p in curve.points] == pytest.approx(
            [0, 0.25, 0.5, 0.75] if curve.pattern == "N:4" else [0, 0.25, 0.5, 0.75, 0.95], abs=1e-3
        )
        held = [point.holds for point in curve.points]
        assert curve.free == max(
            p.sparsity for p, ok in zip(curve.points, held, strict=True) if ok and all(held[: curve.points.index(p)])
        )


def test_the_table_and_the_file_say_it_all(found, toy, tmp_path):
    model, text = toy
    text_of = found.table()
    assert text_of.count("knee at") == 6
    assert "holds the floor up to" in text_of
    done = CliRunner().invoke(
        app,
        ["essential", str(model), "--data", str(text), "--windows", "4", "--length", "48", "--criteria", "magnitude",
         "--sparsities", "0,0.3,0.6,0.9", "--groups", "8", "--json", str(tmp_path / "e.json")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    read = json.loads((tmp_path / "e.json").read_text())
    assert [curve["pattern"] for curve in read["curves"]] == ["unstructured", "N:8"]
    assert len(read["curves"][1]["points"]) == 8


def test_training_after_pruning_keeps_the_zeros_and_helps(toy):
    model, text = toy
    options = {"criteria": ("magnitude",), "sparsities": (0, 0.3, 0.6, 0.9), "data": text, "settings": toys.QUICK}
    plain = essential(model, **options).curves[0]
    tuned = essential(model, tune=Tune(steps=20, rate=3e-3, windows=32), **options)
    assert tuned.steps == 20
    assert "20 steps of training" in tuned.table()
    # against the dense model trained as long: on made-up text all of them learn, and the pruned ones nearly as much
    assert tuned.curves[0].points[0].effect == 1
    assert tuned.curves[0].points[3].effect != plain.points[3].effect


def test_checkpoints_get_curves_and_small_weights_are_tracked(toy, tmp_path):
    model, text = toy
    early = load(model)
    late = load(model)
    with torch.no_grad():
        for one in layers_of(late.module, "late"):
            weight = anatomy.matrix(late.module, one)
            weight[:, ::2] *= 1e-6
    save(late, tmp_path / "late")
    found = essential(
        tmp_path / "late", checkpoints=[early], criteria=("magnitude",), sparsities=(0, 0.25, 0.5, 0.75), data=text,
        settings=toys.QUICK,
    )  # fmt: skip
    assert [curve.model for curve in found.curves] == list(found.small)
    assert list(found.small.values()) == pytest.approx([0.1, 0.55], abs=0.002)
    assert found.jump[2] == pytest.approx(0.45, abs=0.003)
    # what is as good as zero already costs nothing
    assert found.curves[1].points[2].effect == pytest.approx(1, abs=0.01)
    assert found.curves[0].points[2].effect != pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"criteria": ("taste",)}, "criteria 'taste'; give magnitude, random"),
        ({"scopes": ("block",)}, "scopes 'block'; give global, layer, erk"),
        ({"scopes": ()}, "nothing to run"),
        ({"sparsities": (0, 0.5, 0.9)}, "at least four"),
        ({"sparsities": (0.1, 0.2, 0.3, 0.4)}, "rise from 0"),
        ({"groups": (2,)}, "4 to 256"),
        ({"groups": (5,)}, "4:5 does not divide the 64 inputs"),
        ({"floor": "cosine>=0.9"}, "perplexity"),
    ],
)
def test_bad_options_are_refused(toy, options, words):
    with pytest.raises(OptionError, match=words):
        essential(toy[0], data=toy[1], settings=toys.QUICK, **options)


def test_a_compact_model_is_refused(toy):
    model = load(toy[0])
    one = layers_of(model.module, "toy")[0]
    anatomy.replace(model.module, one.path, Dense(anatomy.matrix(model.module, one).contiguous()))
    with pytest.raises(ModelError, match="compact already"):
        essential(model, data=toy[1], settings=toys.QUICK)


def test_the_lever_prunes_to_the_knee_over_all_layers_and_saves(toy, tmp_path):
    model, text = toy
    changed = load(model)
    ids = windows(text, changed.tokenizer, part="calibration", length=48, count=6, seed=0)
    make("prune.essential", {"dtype": "float32"}).change(
        changed, Work(model=changed, windows=ids, maps=changed.anatomy.layers())
    )
    pruned = [changed.module.get_submodule(one.path).weight for one in layers_dense(model)]
    zeros = [1 - one.kept / (one.shape[0] * one.shape[1]) for one in pruned]
    at = sum(z * w.shape[0] * w.shape[1] for z, w in zip(zeros, pruned, strict=True)) / sum(
        w.shape[0] * w.shape[1] for w in pruned
    )
    assert 0.1 <= at <= 0.9
    assert max(zeros) - min(zeros) > 0.001  # all layers compared at once
    save(changed, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(again.module(ids).logits, changed.module(ids).logits)


def layers_dense(model):
    return layers_of(load(model).module, "toy")


def test_the_lever_needs_windows_only_to_find_the_knee(toy):
    changed = load(toy[0])
    work = Work(model=changed, windows=None, maps=changed.anatomy.layers())
    with pytest.raises(DataError, match=r"prune\.essential: needs calibration data"):
        make("prune.essential").change(changed, work)
    make("prune.essential", {"sparsity": 0.5, "scope": "erk"}).change(changed, work)
    with pytest.raises(OptionError, match="one of global, layer, erk"):
        make("prune.essential", {"scope": "row"})
