"""AQT against its formulas, plain training and hand arithmetic (row 124)."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn
from torch.nn import functional

from pennyweight.errors import BudgetError, DataError, ModelError, OptionError
from pennyweight.lever import make
from pennyweight.measure.bit_macs import bit_macs
from pennyweight.model import anatomy, load
from pennyweight.model.model import Model
from pennyweight.model.saving import save
from pennyweight.plan.sizes import Trial, best_within, envelope
from pennyweight.train import Samples, Trainer
from pennyweight.train.aqt import AQT, Bound, round_channels
from pennyweight.weights import Quantized
from pennyweight.work import Work
from pennyweight.zoo.resnet import ResNet, ResNetConfig


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def resnet(seed=0, **sizes):
    return ResNet(ResNetConfig(**({"width": 4} | sizes)), generator=torch.Generator().manual_seed(seed))


def data():
    images = draw(48, 1, 8, 8, seed=1)
    return images, (images.mean((1, 2, 3)) > 0).long()


def loss(module, batch):
    return functional.cross_entropy(module(batch[0]), batch[1])


def trained(module, aqt=None, steps=8):
    Trainer(
        module, torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), Samples(*data()), batch=16, loss=loss,
        callbacks=[aqt] if aqt else [],
    ).run(steps)  # fmt: skip
    return module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_round_to_multiples_of_their_channels_largest(bits):
    weight = draw(5, 3, 2, 2)
    weight[4] = 0
    found = round_channels(weight, bits)
    for row, rounded in zip(weight.flatten(1), found.flatten(1), strict=True):
        largest = row.abs().max()
        if largest == 0:
            assert not rounded.any()
            continue
        steps = rounded / largest * (2 ** (bits - 1) - 1)
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert float((rounded - row).abs().max()) <= 0.501 * float(largest) / (2 ** (bits - 1) - 1)


def test_gradients_pass_the_rounding_of_weights_and_stop_at_clipped_inputs():
    weight = draw(3, 4).requires_grad_()
    g = draw(3, 4, seed=2)
    (round_channels(weight, 4) * g).sum().backward()
    assert torch.equal(weight.grad, g)
    bound = Bound(4, "tensor").train()
    bound(torch.tensor([[-1.0, 1.0]]))
    bound.fix()
    x = torch.tensor([[-2.0, -0.5, 0.3, 1.5]], requires_grad=True)
    bound(x).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_bounds_are_the_running_mean_of_the_largest_values_and_then_stay(granularity):
    bound = Bound(8, granularity).train()
    batches = [draw(6, 3, seed=seed).abs() for seed in range(4)]
    wanted = None
    for batch in batches:
        assert torch.equal(bound(batch), batch)  # nothing is rounded yet
        largest = batch.amax(0) if granularity == "channel" else batch.amax()[None]
        wanted = largest if wanted is None else 0.9 * wanted + 0.1 * largest
    bound.eval()(100 * batches[0])  # not looked at outside of training
    bound.train().fix()
    torch.testing.assert_close(bound.activation.scale * 255, wanted)
    assert not bound.activation.zero.any()  # no bit for a sign
    rounded = bound(10 * batches[0])
    assert bool((rounded <= wanted + 1e-5).all())
    before = bound.activation.scale.clone()
    bound(1000 * batches[0])
    assert torch.equal(bound.activation.scale, before)


def test_inputs_with_signs_get_a_symmetric_range():
    bound = Bound(4, "tensor").train()
    bound(torch.tensor([[-3.0, 1.0]]))
    bound.fix()
    assert bound.activation.symmetric
    torch.testing.assert_close(bound.activation.scale, torch.tensor([3 / 7]))


def test_sixteen_bits_train_as_if_nothing_were_there():
    plain, rounded = resnet(), resnet()
    aqt = AQT(rounded, anatomy.of(rounded).layers(), bits=16, activation_bits=16, start=2)
    trained(plain)
    trained(rounded, aqt)
    aqt.finish()
    for (name, a), (other, b) in zip(plain.state_dict().items(), rounded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_finishing_leaves_what_was_trained(tmp_path):
    module = resnet()
    maps = anatomy.of(module).layers()
    aqt = AQT(module, maps, bits=4, activation_bits=4, edge_bits=8, start=3)
    trained(module, aqt)
    x = data()[0]
    with torch.no_grad():
        before = module.eval()(x)
        aqt.finish()
        after = module(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    widths = [module.get_submodule(one.path).weight.bits for one in maps]
    assert (widths[0], widths[-1], set(widths[1:-1])) == (8, 8, {4})
    assert {module.get_submodule(one.path).activation.bits for one in maps} == {8, 4}
    assert not module.get_submodule(maps[1].path).activation.symmetric  # behind a ReLU
    assert all(isinstance(module.get_submodule(one.path).weight, Quantized) for one in maps)


def test_training_moves_weights_that_rounding_alone_would_leave():
    module = resnet(seed=3)
    aqt = AQT(module, anatomy.of(module).layers(), bits=2, activation_bits=2, edge_bits=None, start=2)
    images, labels = data()
    with torch.no_grad():
        first = float(loss(module, (images, labels)))
    trained(module, aqt, steps=40)
    aqt.finish()
    with torch.no_grad():
        assert float(loss(module.train(), (images, labels))) < 0.8 * first


def test_the_lever_tunes_images_and_text_and_survives_a_file(tmp_path):
    module = build("vit")
    model = Model(module, None, "vit", "image-classifier", config=module.config)
    maps = tuple(one for one in model.anatomy.layers() if one.block is not None)
    pixels = draw(24, 3, 16, 16)
    lever = make("quantize.aqt", {"steps": 4, "batch": 8, "start": 0.5})
    lever.change(model, Work(model=model, windows=pixels, maps=maps))
    save(model, tmp_path / "out")
    with torch.no_grad():
        wanted = module(pixels[:2])
        found = load(tmp_path / "out").module(pixels[:2])
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    llama = Model(build("llama"), None, "llama", "causal-lm")
    ids = torch.randint(0, 64, (12, 9), generator=torch.Generator().manual_seed(0))
    inner = tuple(one for one in llama.anatomy.layers() if one.block is not None)
    lever.change(llama, Work(model=llama, windows=ids, maps=inner))
    assert llama.module.get_submodule(inner[1].path).weight.bits == 4
    assert not llama.module.training


def test_the_lever_helps_over_rounding_at_once():
    found = {}
    for steps, rate in ((2, 1e-8), (60, 3e-3)):
        module = trained(resnet(seed=1), steps=40).eval()
        model = Model(module, None, "resnet", "module")
        images = data()[0]
        with torch.no_grad():
            wanted = module(images)
        options = {"bits": 3, "activation_bits": 4, "edge_bits": None, "steps": steps, "learning_rate": rate}
        lever = make("quantize.aqt", options | {"start": 0.5})
        lever.change(model, Work(model=model, windows=images, maps=model.anatomy.layers()))
        with torch.no_grad():
            found[steps] = float((module(images) - wanted).square().mean())
    assert found[60] < found[2]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(5, 7)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def test_bit_macs_are_the_hands_arithmetic():
    module, x = Two(), torch.zeros(1, 3, 4, 6)
    conv, head = 4 * 6 * 5 * 27, 5 * 7
    plain = bit_macs(module, inputs=x)
    assert (plain.total, plain.macs, plain.of_bf16) == ((conv + head) * 256, conv + head, 1.0)
    widths = {"conv": (4, 8), "head": (2, 3)}
    assert bit_macs(module, inputs=x, widths=widths).total == conv * 32 + head * 6
    assert bit_macs(module, "linear", inputs=x, widths=widths).total == conv * 8 + head * 4
    assert bit_macs(module, "linear", inputs=x, widths={"conv": (16, 4)}).layers["conv"] == conv * 16
    aqt = AQT(module.train(), anatomy.of(module).layers(), bits=4, activation_bits=3, edge_bits=None, start=1)
    module(x)
    aqt.step()
    aqt.finish()
    read = bit_macs(module, inputs=x)  # off the compact layers
    assert read.total == (conv + head) * 12
    assert read.of_bf16 == pytest.approx(12 / 256)
    with pytest.raises(OptionError, match="mode = 'cubic'; give quadratic or linear"):
        bit_macs(module, "cubic", inputs=x)
    with pytest.raises(OptionError, match="'tail' is no layer"):
        bit_macs(module, inputs=x, widths={"tail": (4, 4)})
    with pytest.raises(ModelError, match="give inputs"):
        bit_macs(module)


def test_the_envelope_is_what_no_trial_beats():
    trials = [Trial("a", 4, 1.0), Trial("b", 2, 3.0), Trial("c", 3, 3.5), Trial("d", 9, 1.0), Trial("e", 8, 0.5)]
    assert [one.name for one in envelope(trials)] == ["b", "a", "e"]
    assert best_within(trials, 3.9).name == "b"
    assert best_within(trials, 100).name == "e"
    with pytest.raises(BudgetError, match=r"a cost of 1 cannot be met: the cheapest trial, b, costs 2"):
        best_within(trials, 1)
    with pytest.raises(DataError, match="no trials"):
        envelope([])


def test_bad_options_are_refused():
    module = resnet()
    maps = anatomy.of(module).layers()
    with pytest.raises(OptionError, match=r"aqt: bits = 9; give 2 to 8, or 16"):
        AQT(module, maps, bits=9, start=1)
    with pytest.raises(OptionError, match=r"start = 0 for"):
        AQT(module, maps, start=0)
    with pytest.raises(OptionError, match=r"bits = 12 is out of range; give 2 to 8, or 16"):
        make("quantize.aqt", {"bits": 12})
    aqt = AQT(module, maps, start=5)
    with pytest.raises(OptionError, match=r"no input reached stem; train at least one step"):
        aqt.finish()
    with pytest.raises(OptionError, match=r"depth 9 is not 6n \+ 2; give 8, 14, 20"):
        ResNetConfig(depth=9)
    vit = Model(build("vit"), None, "vit", "image-classifier")
    with pytest.raises(DataError, match="one tensor of windows"):
        make("quantize.aqt").change(vit, Work(model=vit, windows={"pixel_values": draw(2, 3, 16, 16)}, maps=()))
