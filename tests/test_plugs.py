"""Probes, alignment and plugs against closed forms and networks that are linear by construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build, inputs, run
from torch import Tensor, nn

from pennyweight.errors import DataError, OptionError
from pennyweight.lever import make
from pennyweight.model import load, save
from pennyweight.model.loading import of_module
from pennyweight.model.resized import resized_of
from pennyweight.solvers.depth import streams
from pennyweight.solvers.probes import Interval, alignment, chained, intervals, probes, turning
from pennyweight.solvers.projections import feed_forwards, fitted, projections
from pennyweight.train.plugs import Plugs, unit_error
from pennyweight.work import Work
from pennyweight.zoo.dit import DiT, DiTConfig


class Step(nn.Module):
    """A residual block: linear, or not."""

    def __init__(self, linear: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(12, 6, bias=False)
        with torch.no_grad():
            for layer in (self.up, self.down):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 2)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        return x + self.down(inner if self.linear else torch.sin(3 * inner))


class Stack(nn.Module):
    def __init__(self, linear: list[bool]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(Step(one, generator) for one in linear)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def rows(count: int = 200, seed: int = 1) -> Tensor:
    return torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(seed))


def test_alignment_is_blind_to_turns_and_scales_and_is_the_squared_correlation_of_single_columns():
    x = rows().flatten(0, 1).double()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).double()).Q
    assert alignment(x, 3 * x @ turn + 7) == pytest.approx(1, abs=1e-12)
    one, other = x[:, 0], x[:, 0] + x[:, 1]
    expected = torch.corrcoef(torch.stack([one, other]))[0, 1] ** 2
    assert alignment(one[:, None], other[:, None]) == pytest.approx(float(expected), rel=1e-10)
    with pytest.raises(DataError, match="5 rows and 6"):
        alignment(torch.ones(5, 2), torch.ones(6, 2))


def test_a_linear_run_is_followed_exactly_and_another_block_is_not():
    module = Stack([True, True, True, False, False]).eval().double()
    found = streams(module, (rows().double(),))
    maps = probes(found)
    layer = module.blocks[0]
    torch.testing.assert_close(maps[0], layer.down.weight @ layer.up.weight, rtol=1e-4, atol=1e-4)
    values = chained(found, maps, 0)
    assert values[:3] == pytest.approx([1, 1, 1], abs=1e-8)
    assert values[3] < 0.999


def test_the_turning_point_is_where_the_first_difference_stops_falling():
    assert turning([1.0, 0.9, 0.85, 0.83, 0.70]) == 3  # drops 0.1, 0.05, 0.02, then 0.13
    assert turning([1.0, 0.99, 0.8]) == 1
    assert turning([1.0, 0.9, 0.85]) == 2  # falls to the end
    assert turning([1.0]) == 0


def test_intervals_share_no_block_and_hold_two_or_more():
    module = Stack([True, True, False, False, True, True]).eval()
    found = intervals(streams(module, (rows(),)), held_out=streams(module, (rows(seed=3),)))
    taken = [block for one in found for block in one.blocks]
    assert len(taken) == len(set(taken))
    assert all(one.last > one.first for one in found)
    assert max(taken) < 6


def test_plugs_that_are_off_change_nothing_and_each_choice_is_its_own():
    module, x = Stack([False] * 6).eval(), rows(20)
    plugs = Plugs(module, [Interval(0, 1, 0.0), Interval(3, 5, 0.0)])
    before = module(x)
    for which in ((), (0,), (1,), (0, 1)):
        y = x
        for start, blocks, student in ((0, 2, 0), (2, 1, None), (3, 3, 1)):
            if student in which:
                y = plugs.students[student](y)
            else:
                for block in range(start, start + blocks):
                    y = module.blocks[block](y)
        with plugs.on(which) as switched:
            assert torch.equal(switched(x), y)
    assert torch.equal(module(x), before)
    with pytest.raises(OptionError, match=r"plugs: runs 0-1, 1-2 of 6 blocks; give some that share none"):
        Plugs(module, [Interval(0, 1, 0.0), Interval(1, 2, 0.0)])


def test_students_learn_alone_what_their_runs_do():
    module = Stack([True] * 4).eval()
    for parameter in module.parameters():
        parameter.data *= 0.3
    one, both = (Plugs(module, [Interval(0, 1, 0.0), Interval(2, 3, 0.0)]) for _ in range(2))
    losses = both.train(lambda step: (rows(32, step),), steps=150, rate=5e-3)
    assert losses[-1] < 0.05 * losses[0]
    for index in (0, 1):  # one after the other comes to the same, since each sees the teacher only
        one.train(lambda step: (rows(32, step),), steps=150, rate=5e-3, only=[index])
    for mine, other in zip(one.students.parameters(), both.students.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_error_at_unit_length_does_not_see_length():
    x = rows(3)
    assert float(unit_error(4 * x, x)) == pytest.approx(0, abs=1e-6)
    assert float(unit_error(-x, x)) == pytest.approx(4, rel=1e-5)
    assert float(unit_error(2 * x, x, length=1.0)) == pytest.approx(float(x.square().mean()), rel=1e-4)


def test_kept_plugs_are_what_they_were_when_switched_in():
    module, found = build("llama"), inputs("llama")
    model = of_module(module)
    plugs = Plugs(module, [Interval(0, 1, 0.0)])
    with torch.no_grad():
        for parameter in plugs.students.parameters():
            parameter.mul_(1.1)
    with plugs.on([0]):
        wanted = run(module, "llama")
    plugs.keep([0], found)
    assert torch.equal(run(module, "llama"), wanted)
    assert module.config.num_hidden_layers == 1
    again = of_module(build("llama"))
    work = Work(model=again, windows=found["input_ids"], maps=again.anatomy.layers())
    make("prune.ppcl", {"steps": 2}).change(again, work)
    assert len(again.module.model.layers) == 1
    assert model.kind == again.kind


def test_a_linear_part_is_found_exactly_and_another_as_least_squares_have_it():
    x = rows(40).flatten(0, 1).double()
    g = torch.Generator().manual_seed(4)
    matrix, bias = (torch.randn(shape, generator=g).double() for shape in ((3, 6), (3,)))
    found = fitted(x, x @ matrix.mT + bias)
    torch.testing.assert_close(found[0], matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], bias, rtol=1e-5, atol=1e-5)
    y = torch.sin(x @ matrix.mT)
    wanted = np.linalg.lstsq(np.hstack([x.numpy(), np.ones((len(x), 1))]), y.numpy(), rcond=None)[0]
    matrix, bias = fitted(x, y)
    np.testing.assert_allclose(matrix.numpy().T, wanted[:-1], atol=1e-5)
    np.testing.assert_allclose(bias.numpy(), wanted[-1], atol=1e-5)


def test_feed_forwards_are_the_smallest_modules_that_hold_them():
    assert feed_forwards(build("llama")) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert feed_forwards(build("gpt2")) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert feed_forwards(build("bert")) == []  # a block's own forward adds and norms between their two layers
    assert feed_forwards(DiT(DiTConfig(depth=2, width=8, num_heads=2))) == ["blocks.0.ffn", "blocks.1.ffn"]


def test_a_linear_layer_for_a_part_switches_in_and_out_and_survives_a_file(tmp_path):
    module, found = build("llama"), inputs("llama")
    before = run(module, "llama")
    part = projections(module, found)[1]
    assert 0 < part.alignment < 1
    plugs = Plugs(module, [], [part])
    with plugs.on([0]):
        wanted = run(module, "llama")
    assert torch.equal(run(module, "llama"), before)
    mlp = module.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda _, x, out: (x[0].double() @ part.matrix.mT + part.bias).to(out))
    torch.testing.assert_close(run(module, "llama"), wanted, rtol=1e-4, atol=1e-5)
    handle.remove()
    size = sum(one.numel() for one in module.parameters())
    plugs.keep([0], found)
    assert torch.equal(run(module, "llama"), wanted)
    width = module.config.hidden_size
    gone = sum(one.numel() for one in mlp.parameters()) - width * (width + 1)
    assert sum(one.numel() for one in module.parameters()) == size - gone
    save(of_module(module), tmp_path / "saved")
    assert torch.equal(run(load(tmp_path / "saved").module, "llama"), wanted)


def test_runs_and_parts_go_together_and_overlap_is_refused(tmp_path):
    module = build("llama", num_hidden_layers=4)
    found = inputs("llama")
    parts = projections(module, found)
    with pytest.raises(OptionError, match=r"model\.layers\.1\.mlp goes with another plug already"):
        Plugs(module, [Interval(0, 1, 0.0)], parts[1:2])
    plugs = Plugs(module, [Interval(0, 1, 0.0)], parts[3:])
    losses = plugs.train(lambda step: found, steps=30, rate=1e-2)
    assert losses[-1] < losses[0]
    with plugs.on([0, 1]):
        wanted = run(module, "llama")
    plugs.keep([0, 1], found)
    assert torch.equal(run(module, "llama"), wanted)
    assert resized_of(module).linear == {"model.layers.2.mlp": (module.config.hidden_size,) * 2}
    save(of_module(module), tmp_path / "saved")
    assert torch.equal(run(load(tmp_path / "saved").module, "llama"), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_students_of_a_model_with_a_cache_attend_to_their_own_keys(family):
    depth = {"llama": {"num_hidden_layers": 5}, "gpt2": {"n_layer": 5}}[family]
    module, found = build(family, **depth), inputs(family)
    plugs = Plugs(module, [Interval(0, 2, 0.0), Interval(3, 4, 0.0)])
    args, kwargs, _ = plugs._watched(found)[0]
    alone = {**kwargs, **dict.fromkeys((name for name in kwargs if "past" in name or "cache" in name), None)}
    with torch.no_grad():
        assert torch.equal(_first(plugs.students[0](*args, **kwargs)), _first(plugs.students[0](*args, **alone)))
    before = {name: value.clone() for name, value in plugs.students.named_parameters()}
    plugs.train(lambda step: found, steps=1, rate=1e-2)
    still = [name for name, value in plugs.students.named_parameters() if torch.equal(value, before[name])]
    assert still == []  # keys and values learn, too
    plugs.keep([0, 1], found)
    ids = found["input_ids"][:1, :5]
    with torch.no_grad():  # every block has a place of its own in the cache
        whole = module(ids).logits
        kept = module(ids[:, :3], use_cache=True).past_key_values
        stepped = [module(ids[:, at : at + 1], past_key_values=kept).logits for at in (3, 4)]
    torch.testing.assert_close(torch.cat(stepped, 1), whole[:, 3:], rtol=1e-4, atol=1e-5)


def _first(found):
    return found[0] if isinstance(found, tuple) else found


def test_the_lever_takes_width_beside_depth():
    module, found = build("llama", num_hidden_layers=4), inputs("llama")
    model = of_module(module)
    work = Work(model=model, windows=found["input_ids"], maps=model.anatomy.layers())
    make("prune.ppcl", {"runs": 0, "projections": 2, "steps": 2}).change(model, work)
    assert len(resized_of(module).linear) == 2
    bert = of_module(build("bert"))
    work = Work(model=bert, windows=inputs("bert")["input_ids"], maps=bert.anatomy.layers())
    with pytest.raises(OptionError, match="feed-forwards that are modules of their own"):
        make("prune.ppcl", {"runs": 0, "projections": 1}).change(bert, work)
