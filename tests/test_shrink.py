"""Width and depth pruning, scores of units, self-data and drafts, against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
import toys
from families import build, inputs, run
from torch import nn

from pennyweight.apply import apply
from pennyweight.errors import DataError, OptionError
from pennyweight.lever import make
from pennyweight.measure import latency
from pennyweight.measure.cost import cost
from pennyweight.measure.drafting import speculate
from pennyweight.model import load, save
from pennyweight.model.loading import of_module
from pennyweight.recipe import Recipe
from pennyweight.solvers.depth import distance, distances, redundant, streams
from pennyweight.solvers.units import unit_scores
from pennyweight.surgery import trace
from pennyweight.surgery.trace import tensors_of
from pennyweight.train.self_data import response_loss, rewrite
from pennyweight.work import Work
from pennyweight.zoo.gpt import GPT, GPTConfig


def shrunk(family: str, name: str, options: dict):
    module = build(family)
    model = of_module(module)
    found = inputs(family)
    windows = found["input_ids"] if "input_ids" in found else found["pixel_values"]
    make(name, options).change(model, Work(model=model, windows=windows, maps=model.anatomy.layers()))
    return module


@pytest.mark.parametrize("score", ["activation", "magnitude", "taylor"])
@pytest.mark.parametrize("kind", ["ffn", "heads", "hidden"])
def test_units_that_do_nothing_go_first_and_nothing_changes(kind, score):
    module = build("gpt2")
    graph = trace(module, inputs("gpt2"))
    dimension = graph.of(kind)[0]
    with torch.no_grad():  # a unit without weights, in and out
        tensors = tensors_of(module)
        for name, dim in dimension.places:
            gone = graph.unit(name, dim, dimension) == 1
            tensors[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    scores = unit_scores(module, graph, [dimension], inputs("gpt2"), score)[dimension]
    assert int(scores.argmin()) == 1
    assert float(scores[1]) == 0
    assert float(scores[2]) > 0


def test_activation_scores_are_what_readers_get():
    module = build("llama")
    graph = trace(module, inputs("llama"))
    units = graph.of("ffn", 1)[0]
    seen = []
    layer = module.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    run(module, "llama")
    handle.remove()
    parts = [(seen[0][..., i : i + 1] * layer.weight[:, i]).pow(2).sum() for i in range(48)]
    expected = torch.stack(parts).detach().double()
    found = unit_scores(module, graph, [units], inputs("llama"), "activation")[units]
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "options", "name"),
    [
        ("llama", {"removed": 0.5, "multiple_of": 8}, "prune.width"),
        ("llama", {"kind": "heads", "removed": 0.5}, "prune.width"),
        ("llama", {"removed": 0.3, "scope": "global"}, "prune.width"),
        ("bert", {"kind": "hidden", "removed": 0.25, "score": "magnitude"}, "prune.width"),
        ("resnet", {"kind": "channels", "removed": 0.5}, "prune.width"),
        ("gpt2", {"blocks": 1}, "prune.depth"),
        ("vit", {"blocks": 1, "metric": "influence", "contiguous": False}, "prune.depth"),
    ],
)
def test_levers_shrink_what_is_counted_and_saved(family, options, name, tmp_path):
    module = shrunk(family, name, options)
    whole, found = cost(of_module(build(family))), cost(of_module(module))
    assert found.params_total < 0.95 * whole.params_total
    assert found.params_total == sum(parameter.numel() for parameter in dict.fromkeys(module.parameters()))
    save(of_module(module), tmp_path)
    assert torch.equal(run(load(tmp_path).module, family), run(module, family))


RECIPE = """
pennyweight: 1
steps:
- prune.width: {removed: 0.25}
  where: "*.layers.0.*"
- prune.depth: {blocks: 1}
- quantize.rtn: {bits: 8}
  where: role:ffn.*
"""


def test_recipes_shrink_and_then_compress_and_what_is_written_is_what_was_made(tmp_path):
    source, text = toys.llama(tmp_path / "llama"), toys.text_file(tmp_path)
    before = load(source)
    found = apply(source, Recipe.parse(RECIPE), data=text, out=tmp_path / "out", settings=toys.QUICK)
    assert len(found.model.module.model.layers) == len(before.module.model.layers) - 1
    back = load(tmp_path / "out")
    assert back.module.config.num_hidden_layers == len(back.module.model.layers)
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(back.module(ids).logits, found.model.module(ids).logits)
    assert cost(back).params_total < cost(before).params_total


def test_a_share_of_nothing_changes_nothing_and_multiples_are_kept():
    for name, options in (("prune.width", {"removed": 0.0}), ("prune.depth", {"blocks": 0})):
        assert torch.equal(run(shrunk("llama", name, options), "llama"), run(build("llama"), "llama"))
    assert shrunk("llama", "prune.width", {"removed": 0.3, "multiple_of": 16}).config.intermediate_size == 32


def test_levers_say_what_is_wrong():
    with pytest.raises(OptionError, match=r"the selected layers have no channels; the model has hidden, heads"):
        shrunk("llama", "prune.width", {"kind": "channels"})
    with pytest.raises(OptionError, match="2 of 2 blocks; leave at least one"):
        shrunk("llama", "prune.depth", {"blocks": 2})
    with pytest.raises(DataError, match="taylor: needs token ids"):
        shrunk("vit", "prune.width", {"score": "taylor"})
    model = of_module(build("llama"))
    nothing = Work(model=model, windows=None, maps=())
    with pytest.raises(DataError, match=r"prune\.depth: needs calibration data"):
        make("prune.depth", {}).change(model, nothing)


def test_half_the_units_take_about_half_the_time():
    """A wide bound: products of this size are what the time goes into, and the machine is shared."""

    def made(expansion: int) -> nn.Module:
        config = GPTConfig(width=256, depth=2, num_heads=4, vocabulary=64, context=128, expansion=expansion)
        return GPT(config, generator=torch.Generator().manual_seed(0)).eval()

    whole, half = made(16), made(16)
    ids = torch.randint(0, 64, (4, 128), generator=torch.Generator().manual_seed(1))
    model = of_module(half)
    lever = make("prune.width", {"removed": 0.75})
    lever.change(model, Work(model=model, windows=ids[:1], maps=model.anatomy.layers()))
    with torch.no_grad():
        found = latency.compare(lambda: whole(ids), lambda: half(ids), repeats=7, warmup=1)
    share = cost(of_module(half)).params_total / cost(of_module(whole)).params_total
    assert share < 0.4
    assert found.ratio.value < 0.8


def test_angles_are_those_of_plane_geometry():
    one = torch.tensor([[[9.0, 9.0], [1.0, 0.0]]])
    for degrees in (0, 30, 90, 180):
        turned = torch.tensor([[[-9.0, 0.0], [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]]])
        assert distance(one, 3 * turned) == pytest.approx(degrees / 180, abs=1e-4)
    assert distance(one[:, 1:], -one[:, 1:], "influence") == pytest.approx(2)


def test_blocks_that_do_nothing_are_found():
    module = build("llama")
    with torch.no_grad():
        for layer in (module.model.layers[1].self_attn.o_proj, module.model.layers[1].mlp.down_proj):
            layer.weight.zero_()
    found = streams(module, inputs("llama"))
    assert len(found) == 3
    assert float(distances(found, 1)[1]) < 1e-6 < float(distances(found, 1)[0])
    for contiguous in (True, False):
        assert redundant(found, 1, contiguous=contiguous) == [1]
    assert redundant(found, 0) == []


def tiny(depth: int, seed: int) -> GPT:
    config = GPTConfig(width=16, depth=depth, num_heads=2, vocabulary=12, context=40)
    return GPT(config, generator=torch.Generator().manual_seed(seed)).eval()


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_a_draft_changes_how_often_the_target_runs_and_nothing_else(ahead):
    target, draft, prompt = tiny(2, 0), tiny(1, 1), torch.tensor([3, 1, 4])
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, target(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    found = speculate(target, draft, prompt, tokens=20, ahead=ahead)
    assert torch.equal(found.ids, ids[0, 3:])
    assert found.passes + found.accepted == 20
    itself = speculate(target, target, prompt, tokens=20, ahead=ahead)
    assert itself.acceptance == 1
    assert itself.passes == math.ceil(20 / (ahead + 1))


def test_answers_are_the_originals_where_they_are_accepted():
    original = tiny(2, 0)
    asks, gold = torch.randint(0, 12, (6, 5)), torch.randint(0, 12, (6, 4))
    greedy = rewrite(original, asks, gold, temperature=0, batch=4)
    assert bool(greedy.accepted.all())
    ids = torch.cat([asks, greedy.responses], 1)
    with torch.no_grad():
        assert torch.equal(original(ids[:, :-1]).argmax(-1)[:, 4:], greedy.responses)
    refused = rewrite(original, asks, gold, accept=lambda one, other: False)
    assert torch.equal(refused.responses, gold)
    assert not refused.accepted.any()
    again = rewrite(original, asks, gold, seed=3)
    assert torch.equal(again.responses, rewrite(original, asks, gold, seed=3).responses)
    with pytest.raises(DataError, match=r"asks \(6, 5\), answers \(5, 4\)"):
        rewrite(original, asks, gold[:5])


def test_the_loss_is_of_the_response_only():
    original, ids = tiny(1, 0), torch.randint(0, 12, (3, 9))
    with torch.no_grad():
        found = response_loss(4)(original, (ids,))
        logs = original(ids).log_softmax(-1)
    expected = -torch.stack([logs[b, t - 1, ids[b, t]] for b in range(3) for t in range(4, 9)]).mean()
    torch.testing.assert_close(found, expected)
