"""The Hessian's traces and interactions against a known one; scores, and the lever that spends them."""

import math
from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import toys
from torch import nn

from pennyweight.apply import apply
from pennyweight.errors import BudgetError, DataError, ModelError, OptionError
from pennyweight.levers.quantize.mixed import Mixed
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import load
from pennyweight.model.model import Model
from pennyweight.plan.allocation import bits
from pennyweight.plan.harm import Harm
from pennyweight.plan.sensitivity import curvature, measured_pairs, traces
from pennyweight.plan.widths import SCORES, Widths, bits_per_weight
from pennyweight.recipe import Recipe
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights.layers import CompactLinear
from pennyweight.work import Work

SIZES = {"a": (3, 2), "b": (4,), "c": (2, 2)}


def quadratic(seed: int = 0) -> tuple[list, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Losses of two batches whose mean is ``g w + w H w / 2`` with H, g known, and the tensors that make up w."""
    g = torch.Generator().manual_seed(seed)
    total = sum(math.prod(size) for size in SIZES.values())
    parts = torch.randn(2, total, total, generator=g, dtype=torch.float64)
    parts = (parts + parts.mT) / 2
    slope = torch.randn(total, generator=g, dtype=torch.float64)
    tensors = {n: torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for n, s in SIZES.items()}

    def loss(part: torch.Tensor) -> torch.Tensor:
        w = torch.cat([tensor.flatten() for tensor in tensors.values()])
        return slope @ w + w @ part @ w / 2

    return [lambda p=p: loss(p) for p in parts], tensors, parts.mean(0), slope


def placed(changes: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """Every change as a vector over all of w, zero elsewhere: (F, total)."""
    rows, start = [], 0
    total = sum(math.prod(size) for size in SIZES.values())
    for name, size in SIZES.items():
        for change in changes[name]:
            row = torch.zeros(total, dtype=torch.float64)
            row[start : start + math.prod(size)] = change.flatten()
            rows.append(row)
        start += math.prod(size)
    return torch.stack(rows)


def test_interactions_of_a_quadratic_are_its_blocks_and_what_measuring_finds():
    losses, tensors, hessian, slope = quadratic()
    g = torch.Generator().manual_seed(1)
    changes = {n: [torch.randn(s, generator=g, dtype=torch.float64) for _ in range(2)] for n, s in SIZES.items()}
    d = placed(changes)
    gradient = slope + hessian @ torch.cat([t.detach().flatten() for t in tensors.values()])
    found = curvature(losses, tensors, changes)
    np.testing.assert_allclose(found.second, d @ hessian @ d.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.first, d @ gradient, rtol=1e-10)
    assert found.names == ("a", "a", "b", "b", "c", "c")

    def evaluate(pick: dict[str, int]) -> float:
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for name, index in pick.items():
            tensors[name].data += changes[name][index]
        value = float(sum(loss().item() for loss in losses)) / len(losses)
        for name, tensor in tensors.items():
            tensor.data = before[name]
        return value

    alone, pairs, evaluations = measured_pairs(evaluate, dict.fromkeys(SIZES, 2))
    np.testing.assert_allclose(found.alone(), alone, rtol=1e-9)
    np.testing.assert_allclose(found.pairs(), pairs, rtol=1e-4, atol=1e-10)
    assert evaluations == 1 + 6 + 12  # every two changes of two tensors
    assert np.abs(pairs).max() > 1


def test_traces_lie_within_three_errors_and_the_error_is_the_known_one():
    losses, tensors, hessian, _ = quadratic(3)
    probes = 400
    found = traces(losses, tensors, probes=probes)
    start = 0
    for name, size in SIZES.items():
        n = math.prod(size)
        rows = hessian[start : start + n]
        block = rows[:, start : start + n]
        assert abs(found[name].value - float(block.trace())) < 3 * found[name].standard_error
        # signs: 2 sum of squares off the diagonal within the block, once those outside of it
        inside = block.square().sum() - block.diagonal().square().sum()
        variance = 2 * inside + rows.square().sum() - block.square().sum()
        assert found[name].standard_error == pytest.approx(float(variance / probes) ** 0.5, rel=0.15)
        assert found[name].mean == found[name].value / n
        start += n
    assert traces(losses, tensors, probes=5, seed=1) == traces(losses, tensors, probes=5, seed=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_interactions_of_a_network_are_those_that_small_changes_have(family):
    kind = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "masked-lm", "vit": "image-classifier"}[family]
    model = Model(families.build(family).double(), None, family, kind)
    given = {n: t.double() if t.is_floating_point() else t for n, t in families.inputs(family).items()}
    harm = Harm(model, given, batch=1)
    assert harm.samples().abs().max() == 0
    maps = [one for one in model.anatomy.layers() if one.block == 0][:4]
    g = torch.Generator().manual_seed(2)
    held = {one.name: getattr(model.module.get_submodule(one.path), one.parameter) for one in maps}
    changes = {n: [1e-3 * torch.randn(t.shape, generator=g, dtype=torch.float64)] for n, t in held.items()}
    found = curvature([lambda n=n: harm(n).mean() for n in range(2)], held, changes)

    def evaluate(pick: dict[str, int]) -> float:
        for name in pick:
            held[name].data += changes[name][0]
        value = float(harm.samples().double().mean())
        for name in pick:
            held[name].data -= changes[name][0]
        return value

    alone, pairs, _ = measured_pairs(evaluate, dict.fromkeys(held, 1))
    scale = np.abs(found.second).max()  # third order is a thousandth
    np.testing.assert_allclose(found.alone(), alone, atol=0.02 * scale)
    np.testing.assert_allclose(found.pairs(), pairs, atol=0.02 * scale)
    if kind != "causal-lm":  # the original is where the divergence is least
        assert np.abs(found.first).max() < 1e-9
        assert np.linalg.eigvalsh(found.second).min() > -1e-12


def encoder(tmp_path: Path) -> Model:
    return load(toys.bert(tmp_path / "bert"))


def windows(count: int = 12, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(5))


def work_of(model: Model, given: torch.Tensor | None) -> Work:
    return Work(model=model, windows=given, maps=tuple(m for m in model.anatomy.layers() if m.block is not None))


@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_nothing_for_what_is_left_alone_and_more_for_fewer_bits(score, tmp_path):
    model = encoder(tmp_path)
    maps = [one for one in model.anatomy.layers() if one.block is not None][:4]
    work = replace(work_of(model, windows()), maps=tuple(maps))
    statistics = work.statistics({"second_moment", "gradient"})
    levers = [None, RTN(bits=6, group_size=None), RTN(bits=2, group_size=None)]
    widths = Widths.solve(model, maps, levers, statistics)
    alone, pairs = widths.scores(score, harm=Harm(model, windows(4)), statistics=statistics, probes=8)
    table = alone.reshape(4, 3)
    assert (np.abs(table[:, 0]) < 1e-7).all()
    assert (table[:, 2] > table[:, 1]).all()
    assert (pairs is not None) == score.endswith("+pairs")
    if pairs is not None:
        assert not pairs.reshape(4, 3, 4, 3)[range(4), :, range(4)].any()
        assert np.abs(pairs).max() > 1e-6
    layers = widths.layers(alone, pairs)
    offers = layers.offers[maps[0].name]
    assert [o.cost["bytes"] for o in offers] == [
        2 * 64 * 64,
        *(w.cost().bytes for w in widths.weights[maps[0].name][1:]),
    ]
    assert offers[1].label == "6.38 bits a weight"  # 16 of scale and 8 of zero for a row of 64


def test_what_stands_in_is_taken_out_again(tmp_path):
    model = encoder(tmp_path)
    before = model.fingerprint
    maps = [one for one in model.anatomy.layers() if one.block is not None]
    widths = Widths.solve(model, maps, [None, RTN(bits=2)], {one.name: NO_STATISTICS for one in maps})
    measure = widths.measure(Harm(model, windows(3)))
    worse = measure({one.name: 1 for one in maps})
    assert float(worse.min()) > 1e-3
    assert float(measure({}).abs().max()) < 1e-6
    with pytest.raises(RuntimeError, match="on the way"), widths.standing({maps[0].name: 1}):
        raise RuntimeError("on the way")
    assert model.fingerprint == before
    widths.put({one.name: n % 2 for n, one in enumerate(maps)})
    held = [model.module.get_submodule(one.path) for one in maps]
    assert [isinstance(layer, CompactLinear) for layer in held] == [bool(n % 2) for n in range(len(maps))]
    with pytest.raises(ModelError, match="is compact already"):
        Widths(model, maps, {})


@pytest.mark.parametrize(
    "options",
    [
        {"average_bits": 6.0},
        {"average_bits": 5.5, "score": "curvature+pairs", "search": "exact", "windows": 2},
        {"average_bits": 6.0, "score": "kfac", "search": "milp", "method": "gptq"},
        {"average_bits": 6.0, "score": "error", "search": "milp", "widths": (16, 8, 4, 2)},
        {"most_harm": 0.003, "score": "curvature+pairs", "search": "bisect", "widths": (8, 4, 2)},
    ],
)
def test_the_lever_keeps_to_its_bits_or_to_its_harm(options, tmp_path):
    model = encoder(tmp_path)
    lever, work = Mixed(group_size=32, probes=4, **options), work_of(model, windows())
    harm = Harm(model, windows(24, 20))
    _, found = lever.choose(model, work)
    lever.change(model, work)
    stored = [model.module.get_submodule(one.path).weight for one in work.maps]
    used = sum(w.cost().bytes if hasattr(w, "cost") else 2 * w.numel() for w in stored)
    assert used == found.cost["bytes"]
    assert len(set(found.pick.values())) > 1, "one width for all is no choice"
    if "average_bits" in options:
        assert 0.8 * options["average_bits"] < bits_per_weight(found, work.maps) <= options["average_bits"]
    else:
        assert found.verdict.holds
        assert float(harm.samples().mean()) < 1.5 * options["most_harm"]  # windows nobody has looked at
        assert found.evaluations <= 2 * math.ceil(math.log2(len(work.maps) + 1))


def test_a_recipe_writes_what_it_chose_and_loads_it_again(tmp_path):
    source, text = toys.llama(tmp_path / "llama"), toys.text_file(tmp_path)
    recipe = Recipe.parse(
        "pennyweight: 1\nsteps:\n- quantize.mixed: {average_bits: 5.5, widths: [8, 4], group_size: 32, probes: 4, "
        "windows: 2, length: 16}\n  where: '*_proj'\n"
    )
    found = apply(source, recipe, data=text, out=tmp_path / "out", settings=toys.QUICK)
    again = load(tmp_path / "out")
    ids = windows(2)
    assert torch.equal(found.model.module(ids).logits, again.module(ids).logits)
    chosen = {layer.weight.grid.bits for layer in again.module.modules() if isinstance(layer, CompactLinear)}
    assert chosen == {4, 8}


def test_scores_spend_bits_better_than_their_reverse(tmp_path):
    model = encoder(tmp_path)
    with torch.no_grad():  # half of the layers matter thirty times as much as the others
        for one in model.anatomy.layers():
            if one.block == 0:
                model.module.get_submodule(one.path).weight.mul_(0.2)
    maps = [one for one in model.anatomy.layers() if one.block is not None]
    levers = [RTN(bits=b, group_size=32) for b in (8, 3)]
    widths = Widths.solve(model, maps, levers, {one.name: NO_STATISTICS for one in maps})
    scores, _ = widths.scores("curvature", harm=Harm(model, windows(4)))
    budget = {"bits": int(6 * sum(one.shape[0] * one.shape[1] for one in maps))}
    measure = widths.measure(Harm(model, windows(8, 20)))
    good, bad = (float(measure(bits(widths.layers(s), budget).pick).mean()) for s in (scores, -scores))
    assert good < 0.7 * bad


def test_bad_input_is_said():
    losses, tensors, _, _ = quadratic()
    with pytest.raises(OptionError, match="at least 2"):
        traces(losses, tensors, probes=1)
    with pytest.raises(DataError, match="takes no gradients"):
        traces(losses, {"a": torch.zeros(3)})
    with pytest.raises(DataError, match="no data"):
        traces([], tensors)
    with pytest.raises(DataError, match=r"a change \(2,\) of a"):
        curvature(losses, tensors, {"a": [torch.zeros(2)], "b": [], "c": []})
    with pytest.raises(DataError, match="the loss is nan"):
        curvature([lambda: tensors["b"].sum() * math.nan], tensors, {n: [] for n in SIZES})
    for options, words in (
        ({}, "average_bits"),
        ({"search": "bisect"}, "most_harm"),
        ({"search": "milp", "average_bits": 4.0}, "cannot see the pairs"),
        ({"widths": (4, 8), "average_bits": 4.0}, "falling"),
        ({"widths": (8,), "average_bits": 4.0}, "at least two"),
        ({"score": "loud", "average_bits": 4.0}, "hessian"),
    ):
        with pytest.raises(OptionError, match=words):
            Mixed(**options)


def test_what_data_and_budgets_do_not_allow_is_said(tmp_path):
    model = encoder(tmp_path)
    with pytest.raises(DataError, match=r"quantize\.mixed: needs calibration data"):
        Mixed(average_bits=6.0).change(model, work_of(model, None))
    with pytest.raises(DataError, match="give four or more"):
        Mixed(most_harm=0.1, search="bisect").change(model, work_of(model, windows(2)))
    with pytest.raises(BudgetError, match=r"4 bits with their scales are 4.\d+ bits a weight"):
        Mixed(average_bits=4.0, score="error", group_size=32).change(model, work_of(model, None))
    assert isinstance(model.module.get_submodule(work_of(model, None).maps[0].path), nn.Linear)
