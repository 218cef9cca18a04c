"""factorize.structured_ffn, infer.premerge and self-guided training against closed forms and the paper's sizes."""

import copy
import math

import pytest
import scipy.linalg
import torch
import toys
from problems import problem
from test_levers_structured import ids, llama, work_on
from torch import nn

from pennyweight.apply import apply
from pennyweight.errors import OptionError
from pennyweight.lever import make
from pennyweight.levers.factorize.structured_ffn import StructuredFFN, block_dense
from pennyweight.levers.infer import premerge
from pennyweight.levers.infer.premerge import Premerge, faster_up_to
from pennyweight.model import anatomy, load
from pennyweight.train.guided import Guided, SelfGuided
from pennyweight.weights import CompactLinear, Dense, LowRank, Premerged

KINDS = [
    {"kind": "low_rank", "rank": 8},
    {"kind": "block_shuffle", "blocks": 2},
    {"kind": "block_dense", "blocks": 4, "rank": 12},
]


def made(matrix, seed=0, **options):
    return StructuredFFN(**options).structured(matrix, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "up", "down"),
    [
        ({"kind": "low_rank", "rank": 24}, 0.625, 0.625),
        ({"kind": "low_rank", "rank": 12}, 0.3125, 0.3125),
        ({"kind": "block_shuffle", "blocks": 2}, 0.625, 0.625),
        ({"kind": "block_shuffle", "blocks": 4}, 0.3125, 0.3125),
        ({"kind": "block_dense", "blocks": 2, "rank": 32}, 0.75, 0.5),
        ({"kind": "block_dense", "blocks": 2, "rank": 16}, 0.375, 0.25),
    ],
)
@pytest.mark.parametrize("start", ["weights", "random"])
def test_layers_have_the_sizes_of_the_paper(options, up, down, start):
    g = torch.Generator().manual_seed(0)
    for shape, share in (((192, 48), up), ((48, 192), down)):  # 1/16 of the width of 768
        matrix = torch.randn(shape, generator=g)
        weight = made(matrix, start=start, **options)
        assert weight.cost().params == share * matrix.numel()
        assert weight.cost().flops == 2 * weight.cost().params


@pytest.mark.parametrize("shape", [(24, 32), (32, 16)])
def test_a_block_dense_matrix_comes_back_and_others_lose_exactly_their_tails(shape):
    matrix, _ = problem(*shape)
    up, blocks = block_dense(matrix, 4, 8)
    lost = sum((scipy.linalg.svdvals(part.double().numpy())[2:] ** 2).sum() for part in matrix.chunk(4, dim=1))
    own = up @ torch.block_diag(*blocks)
    assert float((own - matrix).double().norm()) == pytest.approx(math.sqrt(lost), rel=1e-5)
    again = block_dense(own, 4, 8)
    torch.testing.assert_close(again[0] @ torch.block_diag(*again[1]), own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", KINDS)
def test_random_layers_are_as_large_as_what_they_replace(options):
    g = torch.Generator().manual_seed(0)
    matrix = 0.02 * torch.randn(64, 32, generator=g)
    one, same, other = (made(matrix, seed, start="random", **options).dense().detach() for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert float(one.square().mean().sqrt()) == pytest.approx(0.02, rel=0.15 if options["kind"] != "low_rank" else 0.5)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.one = CompactLinear(LowRank(torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)))
        self.two = CompactLinear(LowRank(torch.randn(4, 3, generator=g), torch.randn(3, 6, generator=g)))

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_a_guide_changes_nothing_at_first_and_leaves_nothing_behind():
    module, x = Pair(), torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    before = module(x)
    state = copy.deepcopy(module.state_dict())
    guided = SelfGuided(module, ["one", "two"], steps=8, part=0.5)
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-6)
    for step, share in enumerate([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0]):
        assert guided.share == pytest.approx(share)
        assert module.one.weight.share == guided.share
        if step < 4:
            with pytest.raises(OptionError, match=f"after {step} steps; go on to step 4"):
                guided.finish()
        guided.step()
    with torch.no_grad():
        for layer in (module.one, module.two):
            layer.weight.guide.normal_()  # whatever it learned
    last = module(x)
    guided.finish()
    assert torch.equal(module(x), last)
    assert list(module.state_dict()) == list(state)
    assert torch.equal(last, before)


def test_halfway_outputs_and_gradients_are_mixed():
    g = torch.Generator().manual_seed(2)
    weight = Guided(LowRank(torch.randn(4, 2, generator=g), torch.randn(2, 3, generator=g)), torch.randn(4, 3))
    weight.share = 0.25
    x = torch.randn(5, 3, generator=g)
    torch.testing.assert_close(weight(x), x @ weight.dense().T)
    torch.testing.assert_close(weight.dense(), 0.25 * weight.guide + 0.75 * weight.weight.dense())
    weight(x).sum().backward()
    torch.testing.assert_close(weight.guide.grad, 0.25 * x.sum(0).expand(4, 3))
    weight.used = False
    assert torch.equal(weight(x), weight.weight(x))


def test_sparing_guides_run_as_often_as_they_count_and_the_same_again():
    def used(seed):
        guided, module = None, Pair()
        guided = SelfGuided(module, ["one"], steps=400, part=1.0, sparing=True, seed=seed)
        found = []
        for _ in range(400):
            found.append(module.one.weight.used)
            guided.step()
        return found

    runs = used(0)
    assert runs == used(0) != used(1)
    assert abs(sum(runs) - 200) < 40  # the shares sum to 200, the deviation is about 8
    assert sum(runs[:100]) > 80
    assert sum(runs[300:]) < 20


@pytest.mark.parametrize("options", KINDS)
def test_the_lever_puts_trained_structures_into_feed_forward_layers(options):
    model, windows = llama(), ids(8)
    before = {one.path: anatomy.matrix(model.module, one).clone() for one in model.anatomy.layers()}
    StructuredFFN(steps=4, rate=5e-3, batch=4, **options).change(model, work_on(model, windows))
    changed = {path for path, layer in model.module.named_modules() if isinstance(layer, CompactLinear)}
    assert changed == {path for path in before if ".1.mlp." in path}
    for path in changed:
        weight = model.module.get_submodule(path).weight
        assert weight.dtype == torch.float16
        untrained = made(before[path], **options)
        assert type(weight) is type(untrained)
        assert 1e-3 < weight.error(untrained.dense()) < 0.5


def test_guided_recovery_starts_at_the_original():
    model, windows = llama(), ids(2)
    with torch.no_grad():
        before = model.module(input_ids=windows).logits
    layers = [one for one in model.anatomy.layers() if ".mlp." in one.path]
    guides = {one.path: anatomy.matrix(model.module, one).clone() for one in layers}
    for one in layers:
        anatomy.replace(model.module, one.path, LowRank.nearest(guides[one.path], 2))
    SelfGuided(model.module, list(guides), steps=10, guides=guides)
    with torch.no_grad():
        torch.testing.assert_close(model.module(input_ids=windows).logits, before)


def test_premerged_layers_compute_the_same_and_follow_their_factors():
    g = torch.Generator().manual_seed(3)
    inner = LowRank(torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g))
    weight, x = Premerged(inner, max_rows=2), torch.randn(3, 5, generator=g)
    with torch.no_grad():
        assert torch.equal(weight(x[:2]), x[:2] @ inner.dense().T)  # as a matrix
        assert torch.equal(weight(x), inner(x))
        inner.up.mul_(2)
        assert torch.equal(weight(x[:2]), x[:2] @ inner.dense().T)
    assert torch.equal(weight(x[:2]), inner(x[:2]))  # with gradients, as factors
    assert weight.cost() == inner.cost()


def test_how_many_rows_are_few_is_measured(monkeypatch):
    class Said:
        def __init__(self, value):
            self.ratio = self
            self.value = value

    rows = iter([1.5, 1.2, 0.9])
    monkeypatch.setattr(premerge.latency, "compare", lambda plain, own, repeats: Said(next(rows)))
    weight = LowRank(torch.zeros(6, 2), torch.zeros(2, 5))
    assert faster_up_to(weight, 64) == 2  # the factors are slower on 1 and 2 rows, faster on 4
    rows = iter([0.9])
    assert faster_up_to(weight, 64) == 0
    rows = iter([1.5, 1.5])
    assert faster_up_to(weight, 2) == 2


def test_a_recipe_makes_saves_and_loads_them(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "pennyweight: 1\nsteps:\n"
        "- factorize.structured_ffn: {kind: block_shuffle, blocks: 4}\n"
        "- infer.premerge: {max_rows: 4}\n"
    )
    found = apply(
        toys.llama(tmp_path / "model"), recipe, data=toys.text_file(tmp_path), out=tmp_path / "out",
        settings=toys.QUICK,
    )  # fmt: skip
    again = load(tmp_path / "out")
    merged = [layer.weight for layer in again.module.modules() if isinstance(layer, CompactLinear)]
    assert [weight.form for weight in merged] == ["premerged"] * 3
    assert {weight.max_rows for weight in merged} == {4}
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.module(windows).logits, load(found.directory).module(windows).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "neither rank nor density; give one"),
        ({"kind": "block_shuffle", "rank": 3}, "the size of block_shuffle follows from blocks; leave rank and density"),
        ({"kind": "block_shuffle", "blocks": 3}, r"gate_proj \(48x32\) is not divided by 3 blocks"),
        ({"kind": "block_shuffle", "blocks": 8}, "nor its lesser side by their square"),
        ({"kind": "block_dense", "rank": 6}, r"rank 6 of .* in 4 blocks; give a multiple of 4 up to 32"),
        ({"rank": 40}, r"rank 40 of .*gate_proj \(48x32\) in 1 blocks; give a multiple of 1 up to 32"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(options, words):
    model = llama()
    with pytest.raises(OptionError, match=words):
        make("factorize.structured_ffn", options).change(model, work_on(model))


def test_steps_that_change_nothing_are_refused():
    model = llama()
    with pytest.raises(OptionError, match=r"infer.premerge: the step selects no factorized linear layer"):
        Premerge().change(model, work_on(model))
    StructuredFFN(rank=4).change(model, work_on(model))
    with pytest.raises(OptionError, match="is low_rank already; put this step first"):
        StructuredFFN(rank=4).change(model, work_on(model))
    module = Pair()
    module.one = CompactLinear(Dense(torch.zeros(6, 5)))
    with pytest.raises(OptionError, match="one holds a dense matrix; make it a structured one first"):
        SelfGuided(module, ["one"], steps=4)
    with pytest.raises(OptionError, match="0 layers, 4 steps"):
        SelfGuided(module, [], steps=4)
