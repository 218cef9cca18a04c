"""Relevance against input times gradient, the sums it must keep, and brute force; and the quantizers of row 56."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn

from pennyweight.calibrate.relevance import relevance
from pennyweight.errors import BudgetError, DataError, ModelError, OptionError
from pennyweight.lever import make
from pennyweight.levers.quantize.softmax import LogSqrt2, quantized
from pennyweight.model import load
from pennyweight.model.model import Model
from pennyweight.model.saving import save
from pennyweight.weights.layers import CompactLinear
from pennyweight.work import Work
from pennyweight.zoo.resnet import ResNet, ResNetConfig
from pennyweight.zoo.vit import vit


def wrapped(module, kind="module"):
    return Model(module=module.eval(), tokenizer=None, name="toy", kind=kind)


def images(count, *shape, seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """Two paths of matrices, a sum, a mean, and a convolution: linear in its inputs."""

    def __init__(self, *, positive=False):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False).double()
        self.left, self.right = (nn.Linear(4, 5, bias=False).double() for _ in range(2))
        self.head = nn.Linear(5, 3, bias=False).double()
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=g, dtype=torch.float64)
            if positive:
                weight.data.abs_()

    def forward(self, x):
        hidden = self.conv(x).flatten(2).transpose(1, 2)
        return self.head((self.left(hidden) + 2 * self.right(hidden)).mean(1))


@pytest.mark.parametrize(("rule", "positive"), [("plain", False), ("positive", True)])
def test_a_linear_network_gives_input_times_gradient(rule, positive):
    module, x = Linear(positive=positive), images(3, 2, 6, 6).double()
    x = x if positive else x - 0.5
    found = relevance(wrapped(module), x, rule=rule)
    leaf = x.clone().requires_grad_()
    logits = module(leaf)
    top = logits.max(1).values
    (gradient,) = torch.autograd.grad(top.sum(), leaf)
    wanted = leaf.detach() * gradient
    if rule == "positive":  # which starts from one
        wanted = wanted / top.detach()[:, None, None, None]
    torch.testing.assert_close(found.inputs, wanted, rtol=1e-6, atol=1e-8)


def test_positive_rule_is_its_formula_written_out():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=True)
    x = images(2, 4) - 0.5
    found = relevance(wrapped(nn.Sequential(layer)), x, targets=torch.tensor([2, 0]))
    for sample, target in enumerate((2, 0)):
        parts = [max(float(x[sample, j] * layer.weight[target, j].detach()), 0.0) for j in range(4)]
        wanted = torch.tensor(parts) / sum(parts)
        torch.testing.assert_close(found.inputs[sample], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_block_of_a_vision_transformer_keeps_the_sum(attention):
    module = vit(width=32, depth=3, seed=1)
    module.set_attn_implementation(attention)
    for weight in module.parameters():  # far from the small initial weights, so that branches matter
        weight.data.mul_(2).add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    x = images(4, 1, 8, 8)
    x[:, :, :, :2] = 0  # patches without a contribution
    found = relevance(wrapped(module, "image-classifier"), x)
    assert len(found.blocks) == 3
    for reached in found.blocks.values():
        torch.testing.assert_close(reached, torch.ones(4), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.inputs.flatten(1).sum(1) + found.constants, torch.ones(4), rtol=1e-4, atol=0)
    assert float(found.inputs.min()) >= 0
    shares = found.contributions()
    assert sum(shares.values()) == pytest.approx(1)
    maps = {layer.name for layer in wrapped(module).anatomy.layers()}
    assert set(shares) == maps
    # query and key meet in one product, so they get the same; the halves of attention add up to its output
    at = "vit.layers.1.attention"
    parts = {name: found.layers[f"{at}.{name}_proj"] for name in ("q", "k", "v", "o")}
    torch.testing.assert_close(parts["q"], parts["k"], rtol=1e-4, atol=0)
    torch.testing.assert_close(parts["q"] + parts["k"] + parts["v"], parts["o"], rtol=1e-4, atol=0)


def test_eager_and_fused_attention_agree():
    found = []
    for attention in ("eager", "sdpa"):
        module = vit(width=32, depth=2, seed=2)
        module.set_attn_implementation(attention)
        found.append(relevance(wrapped(module, "image-classifier"), images(2, 1, 8, 8)).inputs)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_convolutions_pooling_and_token_models_keep_the_sum():
    module = ResNet(ResNetConfig(width=4), generator=torch.Generator().manual_seed(0))
    found = relevance(wrapped(module), images(3, 1, 8, 8))
    torch.testing.assert_close(found.inputs.flatten(1).sum(1), torch.ones(3), rtol=1e-4, atol=0)
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4))
    found = relevance(wrapped(pooled), images(3, 1, 8, 8))
    torch.testing.assert_close(found.inputs.flatten(1).sum(1), torch.ones(3), rtol=1e-4, atol=0)
    llama = build("llama")
    ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    found = relevance(Model(llama, None, "llama", "causal-lm"), ids)
    torch.testing.assert_close(found.inputs.flatten(1).sum(1), torch.ones(2), rtol=1e-4, atol=0)
    assert all(layer.weight.requires_grad for layer in llama.modules() if isinstance(layer, nn.Linear))


def test_the_model_is_left_as_it_was():
    module = vit(width=32, depth=1)
    module.train()
    x = images(2, 1, 8, 8)
    before = module.eval()(x).logits.detach()
    module.train()
    relevance(wrapped(module, "image-classifier"), x)
    module.train()
    relevance(Model(module, None, "toy", "image-classifier"), x)
    assert module.training
    assert all(weight.requires_grad for weight in module.parameters())
    torch.testing.assert_close(module.eval()(x).logits, before, rtol=0, atol=0)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(torch.fft.fft(x).real)


def test_what_has_no_rule_is_named():
    with pytest.raises(ModelError, match=r"relevance: no rule is known for fft_fft"):
        relevance(wrapped(Odd()), images(2, 4))
    with pytest.raises(OptionError, match=r"rule = 'odd'; give positive or plain"):
        relevance(wrapped(nn.Sequential(nn.Linear(4, 3))), images(2, 4), rule="odd")
    with pytest.raises(DataError, match=r"targets \(3,\) for logits \(2, 3\)"):
        relevance(wrapped(nn.Sequential(nn.Linear(4, 3))), images(2, 4), targets=torch.zeros(3, dtype=torch.long))


# -- what follows from it: ranges behind LayerNorms, attention weights, bits -------------------------------------------


def toy(*, uneven=True, seed=0):
    module = vit(width=32, depth=2, seed=seed).eval()
    if uneven:
        g = torch.Generator().manual_seed(seed)
        for layer in module.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.weight.data = torch.randn(layer.weight.shape, generator=g).exp()
                layer.bias.data = torch.randn(layer.bias.shape, generator=g)
    return Model(module, None, "toy", "image-classifier", config=module.config)


def work_on(model, *, maps=None, count=32):
    return Work(model=model, windows=images(count, 1, 8, 8), maps=tuple(maps or model.anatomy.layers()))


def test_folding_channels_leaves_the_function_alone():
    model = toy()
    x = images(4, 1, 8, 8, seed=5)
    with torch.no_grad():
        before = model.module(x).logits
        make("quantize.layernorm", {"bits": 4}).change(model, work_on(model))
        for layer in model.module.modules():
            if isinstance(layer, CompactLinear):
                layer.activation = None
        after = model.module(x).logits
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())


def test_one_range_after_folding_rounds_as_a_range_for_each_channel_did_before():
    model = toy()
    path, reader = "vit.layers.1.layernorm_before", "vit.layers.1.attention.k_proj"
    norm = model.module.get_submodule(path)
    rows = 3 * torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    lever = make("quantize.layernorm", {"bits": 4, "percentile": 99.0})
    seen = []
    hook = norm.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with torch.no_grad():
        model.module(images(32, 1, 8, 8))
        hook.remove()
        wanted = norm(rows)
        scale, zero = lever.ranges(seen[0])
        lever.change(model, work_on(model))
        layer = model.module.get_submodule(reader)
        moved = norm(rows)
    code = ((wanted / scale).round() + zero).clamp(0, 15)
    folded = layer.activation
    found = (moved / folded.scale).round().add(folded.zero).clamp(0, 15)
    assert float((found == code).float().mean()) > 0.999  # but for values that lie between two levels
    assert len(scale) == 32
    assert layer.activation.granularity == "tensor"


def test_a_clipped_range_is_the_best_of_those_tried_and_unclipped_holds_all():
    rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    rows[0] = 8.0
    whole, _ = make("quantize.layernorm", {"bits": 4, "percentile": 100}).ranges(rows)
    clipped, _ = make("quantize.layernorm", {"bits": 4, "percentile": 99}).ranges(rows)
    torch.testing.assert_close(whole, (8 - rows.amin(0)) / 15, rtol=1e-5, atol=0)
    assert bool((clipped < 0.7 * whole).all())


def test_norms_that_something_else_reads_are_refused():
    bert = build("bert")  # the norm's output is the residual stream
    model = Model(bert, None, "bert", "encoder")
    ids = torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(0))
    inner = tuple(one for one in model.anatomy.layers() if one.block is not None)
    work = Work(model=model, windows=ids, maps=inner)
    with pytest.raises(OptionError, match=r"quantize.layernorm: no LayerNorm gives its output to selected linear"):
        make("quantize.layernorm").change(model, work)
    some = toy()
    queries = [one for one in some.anatomy.layers() if one.role == "attention.query"]
    with pytest.raises(OptionError, match=r"select all that read it"):
        make("quantize.layernorm").change(some, work_on(some, maps=queries))


def test_attention_weights_round_to_powers_of_the_root_of_two():
    rounder = LogSqrt2(3, 0.8)
    levels = torch.tensor([0.8 * 2 ** (-k / 2) for k in range(8)])
    torch.testing.assert_close(rounder(levels), levels)
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    nearest = (x[:, None].log2() - levels.log2()).abs().argmin(1)
    wanted = torch.where(x < 0.8 * 2**-3.75, torch.zeros(()), levels[nearest])
    torch.testing.assert_close(rounder(x), wanted)
    assert rounder(torch.zeros(2)).tolist() == [0, 0]
    values = x**6
    tried = [LogSqrt2(4, float(values.quantile(share))) for share in (0.999, 0.9999, 0.99999)]
    losses = [float((one(values) - values).square().mean()) for one in tried]
    assert LogSqrt2.fit(values, 4).scale == pytest.approx(tried[losses.index(min(losses))].scale, rel=1e-5)
    with pytest.raises(OptionError, match="LogSqrt2: bits = 9"):
        LogSqrt2(9, 1.0)


def test_attention_is_rounded_for_a_while():
    model = toy()
    x = images(2, 1, 8, 8)
    with torch.no_grad():
        for one in model.anatomy.layers():
            if one.role == "attention.query":
                model.module.get_submodule(one.path).weight.mul_(20)
        before = model.module(x).logits
        with quantized(model.module, 8):
            fine = model.module(x).logits
        with quantized(model.module, 2):
            coarse = model.module(x).logits
        after = model.module(x).logits
    assert torch.equal(before, after)
    assert 0 < float((fine - before).abs().max()) < float((coarse - before).abs().max())
    with pytest.raises(ModelError, match="attention of a Linear cannot be exchanged"), quantized(nn.Linear(2, 2), 4):
        pass


def test_more_relevance_means_no_fewer_bits_and_the_budget_holds():
    model = toy()
    maps = tuple(one for one in model.anatomy.layers() if one.role == "attention.output" or one.role == "attention.key")
    lever = make("quantize.lrp", {"average_bits": 4.5, "least_bits": 2, "most_bits": 6})
    scores = {one.name: 100.0 if one.role == "attention.key" else 0.01 for one in maps}
    lever.allocate(model, maps, scores)
    bits = {one.name: model.module.get_submodule(one.path).weight.bits for one in maps}
    stored = sum(8 * model.module.get_submodule(one.path).weight.cost().bytes for one in maps)
    assert stored <= 4.5 * sum(one.shape[0] * one.shape[1] for one in maps)
    keys, outputs = (
        [bits[one.name] for one in maps if one.role == role] for role in ("attention.key", "attention.output")
    )
    assert min(keys) > max(outputs)


def test_bits_by_relevance_survive_a_file(tmp_path):
    model = toy()
    maps = [one for one in model.anatomy.layers() if one.block is not None]
    make("quantize.layernorm", {"bits": 8}).change(model, work_on(model, maps=maps))
    model = Model(model.module, None, "toy", "image-classifier", config=model.config)
    make("quantize.lrp", {"average_bits": 5.0}).change(model, work_on(model, maps=maps))
    widths = {layer.weight.bits for layer in model.module.modules() if isinstance(layer, CompactLinear)}
    assert len(widths) > 1
    save(model, tmp_path / "out")
    x = images(3, 1, 8, 8, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out").module(x).logits, model.module(x).logits, rtol=0, atol=0)


def test_bad_bits_by_relevance_are_refused():
    model = toy()
    with pytest.raises(OptionError, match="least_bits = 5 is above most_bits = 4"):
        make("quantize.lrp", {"least_bits": 5, "most_bits": 4})
    inner = tuple(one for one in model.anatomy.layers() if one.block is not None)
    with pytest.raises(BudgetError, match=r"average_bits = 1 cannot be met: 2 bits with their scales are"):
        make("quantize.lrp", {"average_bits": 1}).allocate(model, inner, {one.name: 1.0 for one in inner})
    with pytest.raises(DataError, match=r"quantize.lrp: needs calibration data"):
        make("quantize.lrp").change(model, Work(model=model, windows=None, maps=inner))


def test_rounded_attention_keeps_a_causal_mask():
    module = build("llama")
    ids = torch.randint(5, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 60
    with torch.no_grad(), quantized(module, 8):
        first, second = (module(input_ids=each).logits for each in (ids, other))
    assert torch.allclose(first[:, :-1], second[:, :-1], atol=1e-5)
    assert not torch.allclose(first[:, -1], second[:, -1], atol=1e-5)
