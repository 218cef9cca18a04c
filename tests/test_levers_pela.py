"""factorize.pela: the regularizer and the sizes by hand, exactness at full rank, and that teaching pays."""

import copy

import pytest
import torch
from families import build
from test_levers_structured import ids, llama, work_on

from pennyweight.errors import OptionError
from pennyweight.lever import make
from pennyweight.levers.factorize.pela import Factored, Intermediate, Pela, factorize, perturbation
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.weights import LowRank
from pennyweight.work import Work


def blocks_of(model):
    return [one for one in model.anatomy.layers() if one.block is not None]


def logits(model, windows):
    with torch.no_grad():
        return model.module(input_ids=windows).logits


def factored(original, change):
    up, down = torch.eye(3), original + change
    return Factored("layer", LowRank(up, down), original)


def test_the_regularizer_is_the_squared_distance_of_the_largest_change_from_the_bound():
    g = torch.Generator().manual_seed(0)
    original, change = torch.randn(3, 4, generator=g), torch.zeros(3, 4)
    change[1, 2], change[0, 0] = -0.3, 0.2
    one = factored(original, change)
    assert perturbation([one], 0.3).item() == pytest.approx(0, abs=1e-12)
    assert perturbation([one], 0.1).item() == pytest.approx(0.04, rel=1e-4)
    other = factored(original, torch.full((3, 4), 0.0))
    assert perturbation([one, other], 0.1).item() == pytest.approx((0.04 + 0.01) / 2, rel=1e-4)
    perturbation([one], 0.1).backward()
    # up is the identity: the gradient of down is that of the product, and only its largest change moves it
    wanted = torch.zeros(3, 4)
    wanted[1, 2] = -0.4
    torch.testing.assert_close(one.weight.down.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compression", [2, 3])
def test_layers_hold_the_share_of_the_paper(compression):
    model = llama()
    found = factorize(model.module, blocks_of(model), density=1 / compression)
    assert len(found) == 14
    for one in found:
        rows, columns = one.original.shape
        rank = rows * columns // (compression * (rows + columns))
        assert one.weight.cost().params == rank * (rows + columns)


def test_all_of_the_rank_is_the_model_itself():
    model, windows = llama(), ids(2)
    layers = [one for one in blocks_of(model) if one.shape == (32, 32)]
    for one in layers:
        layer = model.module.get_submodule(one.path)
        left, right = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(1)) / 6
        layer.weight.data = left @ right.T
    before = logits(model, windows)
    maps = tuple(layers)
    Pela(density=1.0, steps=0, dtype="float32").change(model, Work(model=model, windows=None, maps=maps))
    assert all(model.module.get_submodule(one.path).weight.form == "low_rank" for one in layers)
    torch.testing.assert_close(logits(model, windows), before, rtol=1e-4, atol=1e-4)


def test_the_stage_brings_blocks_nearer_to_the_original_and_trains_no_table():
    windows, fresh = ids(16), ids(8, seed=9)
    errors = {}
    for steps in (0, 30):
        model = llama()
        original = logits(model, fresh)
        table = model.module.get_input_embeddings().weight.detach().clone()
        Pela(steps=steps, task="none", features=1.0, rate=5e-3).change(model, work_on(model, windows))
        errors[steps] = float((logits(model, fresh) - original).square().mean())
        assert torch.equal(model.module.get_input_embeddings().weight, table)
    assert errors[30] < 0.8 * errors[0]


def test_the_loss_is_its_parts():
    model, windows = llama(), ids(4)
    teacher = copy.deepcopy(model.module).eval()
    found = factorize(model.module, blocks_of(model), density=0.5)
    paths = [block.path for block in model.anatomy.blocks]

    def task(module, batch):
        return module(input_ids=batch[0]).logits.square().mean()

    def total(**options):
        return Intermediate(model.module, teacher, paths, found, **options)(model.module, (windows,))

    hidden = [m(input_ids=windows, output_hidden_states=True).hidden_states for m in (model.module, teacher)]
    # the library norms the last state, and gives that of a block before it as it is
    relative = (hidden[0][1] - hidden[1][1]).square().mean() / hidden[1][1].square().mean()
    one = Intermediate(model.module, teacher, paths[:1], found, features=2.0, box=0.0)(model.module, (windows,))
    torch.testing.assert_close(one, 2 * relative)
    torch.testing.assert_close(total(features=0.0, box=3.0, bound=0.01), 3 * perturbation(found, 0.01))
    torch.testing.assert_close(
        total(task=task, features=0.5, box=1.0),
        task(model.module, (windows,)) + total(features=0.5, box=0.0) + total(features=0.0, box=1.0),
    )


def test_images_are_taught_by_features():
    model = Model(build("vit"), None, "vit", "image-classifier")
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    Pela(steps=2, task="none").change(model, work_on(model, images))
    assert any(layer.weight.form == "low_rank" for layer in map(model.module.get_submodule, compact_paths(model)))
    with pytest.raises(OptionError, match=r"factorize.pela: trains causal language models end to end"):
        Pela(steps=2).change(model, work_on(model, images))


def compact_paths(model):
    return [one.path for one in anatomy.of(model.module).layers() if one.block is not None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.01, "steps": 0}, r"density = 0.01 leaves .*q_proj \(32x32\) no rank; give at least 0.0625"),
        ({"smallest": 999}, "selects no linear layer of a block with 999 outputs"),
        ({"task": "none", "features": 0.0, "box": 0.0}, "nothing to learn in 200 steps; give features, box or a task"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(options, words):
    model = llama()
    with pytest.raises(OptionError, match=words):
        make("factorize.pela", options).change(model, work_on(model, ids(2)))


def test_compact_layers_are_refused():
    model = llama()
    Pela(steps=0).change(model, work_on(model))
    with pytest.raises(OptionError, match="is low_rank already; put this step first"):
        Pela(steps=0).change(model, work_on(model))
