"""Pruning-aware training: least squares against NumPy, saliency by hand, exact cuts, moments cut with weights."""

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis.strategies import integers

from pennyweight.data import windows
from pennyweight.errors import DataError, OptionError
from pennyweight.lever import make
from pennyweight.levers.prune.aware import PruningAware, compensated
from pennyweight.model import load, save
from pennyweight.surgery import trace
from pennyweight.train import Samples, Trainer, next_token_loss
from pennyweight.work import Work
from pennyweight.zoo.gpt import GPT, GPTConfig


@given(rows=integers(1, 5), width=integers(2, 9), seed=integers(0, 2**32 - 1))
def test_what_is_left_makes_good_what_went(rows, width, seed):
    g = np.random.default_rng(seed)
    inputs = g.standard_normal((40, width)) @ g.standard_normal((width, width))
    matrix, kept = g.standard_normal((rows, width)), g.random(width) < 0.6
    kept[0] = True
    moment = torch.from_numpy(inputs.T @ inputs / 40)
    found = compensated(torch.from_numpy(matrix), moment, torch.from_numpy(kept), damping=0.0).numpy()
    oracle = np.linalg.lstsq(inputs[:, kept], inputs @ matrix.T, rcond=None)[0].T
    np.testing.assert_allclose(
        inputs @ found.T, inputs[:, kept] @ oracle.T, rtol=1e-5, atol=1e-5 * np.abs(inputs).max()
    )
    assert not found[:, ~kept].any()
    plain = np.linalg.norm(inputs @ (matrix * kept - matrix).T)
    assert np.linalg.norm(inputs @ (found - matrix).T) <= plain * (1 + 1e-9) + 1e-12 * np.linalg.norm(inputs @ matrix.T)


def ids(count=64, seed=0):
    return torch.randint(32, (count, 9), generator=torch.Generator().manual_seed(seed))


def started(**options):
    config = GPTConfig(width=16, depth=2, num_heads=2, vocabulary=32, context=9)
    module = GPT(config, generator=torch.Generator().manual_seed(0))
    adam = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.0)
    settings = {"params": params(module) // 2, "start": 3, "end": 9, "every": 3} | options
    pruning = PruningAware(module, adam, ids(8), **settings)
    return module, pruning, Trainer(module, adam, Samples(ids(), seed=0), batch=8, callbacks=[pruning])


def params(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("options", [{}, {"saliency": "taylor", "shape": "uniform"}, {"update": "obs"}], ids=str)
def test_every_cut_is_exact_and_the_size_is_met(options):
    module, pruning, trainer = started(**options)
    first = params(module)
    trainer.run(14)
    assert [event.step for event in pruning.events] == [3, 6, 9]
    aims = [round(first + (first // 2 - first) * done) for done in (1 / 3, 2 / 3, 1)]
    for event, aim in zip(pruning.events, aims, strict=True):
        assert event.params <= aim
        assert event.difference < 1e-5
        assert sum(event.removed.values()) > 0
        assert all(after <= before + 1e-9 for before, after in event.errors)
        assert bool(event.errors) == (
            options.get("update") == "obs" and event.removed["ffn"] + event.removed["heads"] > 0
        )
    assert params(module) == pruning.events[-1].params > 0.4 * first
    assert torch.isfinite(module(ids(2))).all()


def test_groups_are_scored_by_their_weights_and_gradients():
    module, pruning, trainer = started(memory=0.0, per_param=False)
    weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    twin = GPT(module.config, generator=torch.Generator().manual_seed(0))
    next_token_loss(twin, Samples(ids(), seed=0).take(0, 8)).backward()
    trainer.run(1)
    each = {name: (weights[name] * weight.grad).double().square() / 2 for name, weight in twin.named_parameters()}
    module.eval()
    graph = trace(module, (ids(2),))
    (units,) = graph.of("ffn", block=1)
    up, down = each["blocks.1.mlp.up_proj.weight"], each["blocks.1.mlp.down_proj.weight"]
    assert torch.allclose(pruning._scored(graph, units), up.sum(1) + down.sum(0), rtol=1e-4)
    (heads,) = graph.of("heads", block=0)
    rows = sum(each[f"blocks.0.attention.{name}_proj.weight"].view(2, 8, 16).sum((1, 2)) for name in "qkv")
    rows = rows + each["blocks.0.attention.o_proj.weight"].view(16, 2, 8).sum((0, 2))
    assert torch.allclose(pruning._scored(graph, heads), rows, rtol=1e-4)
    pruning.per_param = True
    assert torch.allclose(pruning._scored(graph, heads), rows / (4 * 8 * 16), rtol=1e-4)


def test_the_optimizers_memory_is_cut_with_the_weights():
    module, pruning, trainer = started(start=4, end=4, every=1)
    trainer.run(3)
    before = {
        name: (weight.detach().clone(), trainer.optimizer.state[weight]["exp_avg"].clone())
        for name, weight in module.named_parameters()
    }
    rate = trainer.optimizer.param_groups[0]["lr"]
    trainer.optimizer.param_groups[0]["lr"] = 0.0  # the fourth step moves nothing
    trainer.run(4)
    trainer.optimizer.param_groups[0]["lr"] = rate
    cut = 0
    for name, weight in module.named_parameters():
        state = trainer.optimizer.state[weight]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape
        assert pruning._scores[name].shape == weight.shape
        if name.endswith("up_proj.weight"):
            # every row left is a row of before, at the same place among those that are left
            old, now = before[name][0], weight.detach()
            cut += old.numel() - now.numel()
    assert cut > 0
    trainer.run(6)


def test_a_lower_target_than_groups_can_meet_is_refused():
    _, _, trainer = started(kinds=("ffn",), params=700, start=2, end=2, every=1)
    with pytest.raises(OptionError, match="700 parameters cannot be met by ffn"):
        trainer.run(3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"params": 10**9}, "give fewer than there are"),
        ({"start": 5, "end": 3}, "1 <= start <= end"),
        ({"every": 4}, "whole number of intervals"),
        ({"kinds": ("neurons",)}, "groups of 'neurons'"),
        ({"kinds": ()}, "groups of 'none'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        started(**options)


def test_the_lever_shrinks_a_decoder_that_saves_and_loads(tmp_path):
    folder = toys.llama(tmp_path / "model")
    model = load(folder)
    text = windows(toys.text_file(tmp_path), model.tokenizer, part="calibration", length=24, count=16, seed=0)
    first = params(model.module)
    lever = make("prune.aware", {"kept": 0.6, "steps": 12, "cuts": 3, "batch": 4, "rate": 1e-3, "update": "obs"})
    lever.change(model, Work(model=model, windows=text, maps=model.anatomy.layers()))
    assert 0.5 * first < params(model.module) <= 0.6 * first + 1
    assert not model.module.training
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(again.module(text[:2]).logits, model.module(text[:2]).logits)
    with pytest.raises(DataError, match=r"prune\.aware: needs calibration data"):
        lever.change(again, Work(model=again, windows=None, maps=()))
    with pytest.raises(OptionError, match=r"the last cut \(end = 0\.1\) before the first"):
        make("prune.aware", {"start": 0.5, "end": 0.1}).change(again, Work(model=again, windows=text, maps=()))
