"""Runtime dissection (row 230): a clock that only known work moves, exact bytes, and equal gradients."""

import copy

import pytest
import torch
from families import build
from torch import nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from pennyweight.cli import main
from pennyweight.errors import ModelError, OptionError
from pennyweight.measure import dissect

IDS = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))
NOW = [0.0]


class _Takes(torch.autograd.Function):
    """The identity, 3 seconds on the way in and 5 on the way back."""

    @staticmethod
    def forward(ctx, x):
        NOW[0] += 3
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        NOW[0] += 5
        return gradient


class _Slow(nn.Linear):
    def forward(self, x):
        return _Takes.apply(super().forward(x))


@pytest.fixture
def slow(monkeypatch):
    """A decoder in which only the first ``up`` takes time."""
    monkeypatch.setattr(dissect, "perf_counter", lambda: NOW[0])
    module = build("llama")
    layer = module.model.layers[0].mlp
    made = _Slow(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    made.weight = layer.up_proj.weight
    layer.up_proj = made
    return module


def spent(found):
    return {key: seconds for key, seconds in found.seconds.items() if seconds}


def test_time_goes_to_the_part_and_phase_it_was_spent_in(slow):
    found = dissect.training(slow, IDS, repeats=2)
    assert spent(found) == {("forward", "ffn.up"): 3, ("backward", "ffn.up"): 5}
    assert found.plain_seconds == 8
    assert found.overhead == 0


def test_what_runs_again_is_told_from_the_backward_pass(slow):
    found = dissect.training(slow, IDS, technique="recompute", repeats=2)
    assert spent(found) == {("forward", "ffn.up"): 3, ("recompute", "ffn.up"): 3, ("backward", "ffn.up"): 5}


def test_sequences_one_after_the_other_take_as_often(slow):
    found = dissect.training(slow, IDS, technique="accumulate", repeats=2)
    assert spent(found) == {("forward", "ffn.up"): 9, ("backward", "ffn.up"): 15}


def test_a_prompt_and_the_tokens_after_it_are_told_apart(slow):
    found = dissect.generation(slow, IDS[0], tokens=5, repeats=2)
    assert spent(found) == {("prefill", "ffn.up"): 3, ("decode", "ffn.up"): 12}
    assert Cache.update.__name__ == "update"


def test_every_moment_is_charged_once():
    module = build("llama")
    ledger = dissect._Ledger()
    begun = ledger.last
    with dissect._watching(module, dissect.parts_of(module), ledger), torch.no_grad():
        module(IDS)
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.last - begun, rel=1e-9)
    roles = {"attention.query", "attention.core", "ffn.gating", "norm", "residual", "embedding", "head"}
    assert roles <= {part for _, part in ledger.seconds}


@pytest.mark.parametrize("technique", dissect.TECHNIQUES)
def test_memory_is_what_the_structure_says(technique):
    module = build("llama")
    found = dissect.training(module, IDS, technique=technique, repeats=1).memory
    trained = dissect._prepared(copy.deepcopy(module), technique)
    foreseen = dissect.predicted_memory(trained)
    assert (found.weights, found.gradients) == (foreseen.weights, foreseen.gradients)
    steps = 4 * sum(weight.requires_grad for weight in trained.parameters())  # a count of steps beside each state
    assert found.optimizer == 2 * foreseen.gradients + steps
    if technique == "lora":
        assert found.gradients < 0.5 * found.weights
    elif technique == "plain":
        numbers = sum(weight.numel() for weight in module.parameters())
        buffers = sum(buffer.nbytes for buffer in module.buffers())
        assert found.weights + found.gradients + 2 * foreseen.gradients == 16 * numbers + buffers


def test_recomputing_holds_less_and_gives_the_same_gradients():
    module = build("llama")
    plain, again, pieces = (
        dissect.training(module, IDS, technique=technique, repeats=1).memory.activations
        for technique in ("plain", "recompute", "accumulate")
    )
    assert again < 0.5 * plain
    assert pieces < 0.5 * plain
    gradients = []
    for technique in ("plain", "recompute"):
        made = dissect._prepared(copy.deepcopy(module), technique)
        dissect.next_token(made, IDS).backward()
        gradients.append([weight.grad for weight in made.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_lora_starts_as_the_same_function():
    module = build("llama")
    made = dissect._prepared(copy.deepcopy(module), "lora")
    torch.testing.assert_close(made(IDS).logits, module(IDS).logits)


def test_live_bytes_are_those_of_storages_that_live():
    with dissect._Live() as live:
        x = torch.ones(10)
        y = x * 2
        view = y[2:]
        assert live.bytes == 80
        del x, y
        assert live.bytes == 40  # the view keeps all of it
        view.add_(1)
        del view
        assert (live.bytes, live.peak) == (0, 80)


def test_generation_weighs_its_cache():
    module = build("llama")
    found = dissect.generation(module, IDS[0], tokens=4, repeats=1).memory
    c = module.config
    kv = c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    assert found.cache == 4 * 2 * kv * c.num_hidden_layers * (20 + 4 - 1)  # the last token is written, not read
    assert found.weights == sum(one.nbytes for one in (*module.parameters(), *module.buffers()))
    assert found.peak >= found.weights + found.cache


def test_bad_settings_are_said():
    module = build("llama")
    with pytest.raises(OptionError, match="plain, recompute, lora, accumulate"):
        dissect.training(module, IDS, technique="magic")
    with pytest.raises(OptionError, match="at least 1"):
        dissect.generation(module, IDS[0], repeats=0)
    with pytest.raises(OptionError, match="does not know how to recompute"):
        dissect.training(nn.Linear(3, 3), IDS, technique="recompute")
    with pytest.raises(ModelError, match="nothing to train"):
        dissect.training(copy.deepcopy(module).requires_grad_(False), IDS)
    with pytest.raises(ModelError, match="depends on no weight"):
        dissect.training(module, IDS, loss=lambda _module, ids: ids.float().mean())


def test_the_command_prints_both_tables(tmp_path, capsys):
    module = build("llama")
    assert isinstance(module, LlamaForCausalLM)
    module.save_pretrained(tmp_path)
    assert main(["measure", str(tmp_path), "--breakdown", "--batch", "2", "--context", "8"]) == 0
    said = capsys.readouterr().out
    for words in (
        "plain, batch 2, 8 tokens",
        "generation, batch 1, 8 tokens",
        "recompute",
        "memory: optimizer",
        "ffn.up",
    ):
        assert words in said
    assert main(["measure", str(tmp_path), "--idealized", "--context", "16", "--json", str(tmp_path / "f.json")]) == 0
    assert "each token after it" in capsys.readouterr().out
    assert main(["measure", str(tmp_path), "--idealized", "--breakdown"]) == 2
