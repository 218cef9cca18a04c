"""Folding against the unfolded network, formats against each other, and refusals (row 203)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from pennyweight import edge
from pennyweight.claims import fire
from pennyweight.errors import BudgetError, DataError, MissingExtraError, ModelError, OptionError
from pennyweight.model.fold_norms import fold_norms
from pennyweight.zoo.fire import FireNet
from pennyweight.zoo.resnet import ResNet, ResNetConfig

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="the extra `export` is not installed")


def shaken(module, seed=0):
    """With statistics and scales far from their initial values."""
    g = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(generator=g)
            part.running_var.uniform_(0.2, 3, generator=g)
            part.weight.data.normal_(generator=g)
            part.bias.data.normal_(generator=g)
    return module.eval()


@pytest.mark.parametrize("double", [False, True])
def test_folded_networks_compute_what_they_did(double):
    for module, x in (
        (FireNet(4, generator=torch.Generator().manual_seed(0)), torch.rand(3, 3, 16, 16)),
        (ResNet(ResNetConfig(width=4), generator=torch.Generator().manual_seed(0)), torch.rand(3, 1, 8, 8)),
        (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), torch.rand(3, 5)),
    ):
        shaken(module)
        module, x = (module.double(), x.double()) if double else (module, x)
        norms = sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
        with torch.no_grad():
            before = module(x)
            pairs = fold_norms(module, x)
            after = module(x)
        assert len(pairs) == norms
        assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
        for a, b in zip(*(one if isinstance(one, tuple) else (one,) for one in (before, after)), strict=True):
            limit = 1e-12 if double else 1e-5
            assert float((a - b).abs().max()) <= limit * float(a.abs().max())


class Shared(nn.Module):
    """The convolution is read by its norm and by a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        found = self.conv(x)
        return self.norm(found) + found


def test_what_something_else_reads_is_left_alone():
    module, x = shaken(Shared()), torch.rand(2, 1, 6, 6)
    with torch.no_grad():
        before = module(x)
        with pytest.raises(ModelError, match="no batch norm of Shared follows a convolution or linear layer alone"):
            fold_norms(module, x)
        assert torch.equal(module(x), before)
    assert isinstance(module.norm, nn.BatchNorm2d)


@pytest.fixture(scope="module")
def task():
    """A small network of the claim's kind, its data in two parts."""
    torch.manual_seed(0)
    return fire.trained(192, steps=60), fire.patches(192, seed=0), fire.patches(120, seed=9)[:2]


def fitted(task, **options):
    module, train, held = task
    return edge.fit(
        module, train, held, classes=fire.CLASSES, **({"loss": fire.loss, "steps": 10, "repeats": 5} | options)
    )


def test_patches_are_what_they_say():
    images, labels, masks = fire.patches(20, seed=1)
    assert images.shape == (20, 3, 32, 32)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert torch.equal(masks.flatten(1).any(1), labels.bool())
    assert torch.equal(fire.patches(20, seed=1)[0], images)
    burning = images.movedim(1, -1)[masks[:, 0] > 0].mean(0)
    assert burning[0] > 1.5 * burning[2]


def test_every_format_is_judged_and_the_original_is_left_alone(task):
    before = {name: tensor.clone() for name, tensor in task[0].state_dict().items()}
    found = fitted(task, backend="torch", floors=["accuracy>=0.5", "recall[fire]>=50%"])
    assert [one.format for one in found.tried] == list(edge.FORMATS)
    with torch.no_grad():
        wanted = float((task[0](task[2][0])[0].argmax(1) == task[2][1]).float().mean())
    plain = found.tried[0]
    assert plain.accuracy == pytest.approx(wanted)
    assert (plain.ratio.low, plain.ratio.value, plain.ratio.high) == (1, 1, 1)
    for one in found.tried:
        assert abs(one.accuracy - wanted) < 0.1
        assert one.p50_ms <= one.p95_ms
        assert one.fps == pytest.approx(1e3 / one.p95_ms)
        assert not one.missed
    assert found.tried[2].bytes < 0.45 * plain.bytes
    assert found.chosen.fps == max(one.fps for one in found.tried)
    assert all(torch.equal(before[name], tensor) for name, tensor in task[0].state_dict().items())
    with pytest.raises(ModelError, match="install onnxruntime and onnx"):
        found.save("anywhere")


def test_limits_of_recall_are_exact():
    for right, count in ((0, 5), (3, 5), (95, 100), (100, 100)):
        wanted = binomtest(right, count, alternative="greater").proportion_ci(0.95, "exact").low
        assert edge._lower(right, count) == pytest.approx(wanted, abs=1e-9)


def test_what_cannot_be_held_is_refused_with_the_nearest(task):
    with pytest.raises(
        BudgetError, match=r"none of fp32, bf16 holds what is asked; the nearest, .* misses recall\[fire\]"
    ):
        fitted(task, backend="torch", formats=("fp32", "bf16"), floors=["recall[fire]>=0.9999"])
    with pytest.raises(BudgetError, match=r"misses fps>=1e\+09: .* \(p95 .* ms\)"):
        fitted(task, backend="torch", formats=("fp32",), budget="fps>=1000000000")
    everything = ["recall[fire]>=0.5", "recall[clear]>=0.5"]
    assert fitted(task, backend="torch", formats=("fp32",), floors=everything, budget="fps>=0.01").chosen.fps > 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "15"}, r"budget '15' is none; give frames a second, as in 'fps>=15'"),
        ({"floors": ["recall>=0.9"]}, r"give 'accuracy>=0.9' or 'recall\[clear\]>=95%'"),
        ({"floors": ["recall[smoke]>=0.9"]}, r"no class is called 'smoke'; there are clear, fire"),
        ({"floors": ["accuracy>=90"]}, r"a share lies between 0 and 1"),
        ({"formats": ("int4",)}, r"unknown format 'int4'; give some of fp32, bf16"),
        ({"backend": "tensorrt"}, r"backend = 'tensorrt'; give auto, onnxruntime or torch"),
    ],
)
def test_bad_questions_are_refused(task, options, words):
    with pytest.raises(OptionError, match=words):
        fitted(task, **options)


def test_a_class_without_images_and_a_missing_package_are_named(task, monkeypatch):
    module, train, (images, labels) = task
    with pytest.raises(DataError, match=r"no held-out image is of the class of recall\[fire\]"):
        edge.fit(
            module, train, (images[labels == 0], labels[labels == 0]), classes=fire.CLASSES, backend="torch",
            formats=("fp32",), floors=["recall[fire]>=0.5"], repeats=3,
        )  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"needs the packages onnxruntime and onnx; install pennyweight\[export\]"
    ):
        fitted(task, backend="onnxruntime")


@needs_onnx
def test_the_exported_network_answers_as_the_module_does(task, tmp_path):
    found = fitted(task, backend="onnxruntime", formats=("fp32", "int8-ptq"))
    assert {one.backend for one in found.tried} == {"onnxruntime"}
    x = task[2][0][:7]  # another batch than it was exported with
    plain = fitted(task, backend="onnxruntime", formats=("fp32",))
    with torch.no_grad():
        torch.testing.assert_close(plain.run(x), task[0](x)[0], rtol=1e-3, atol=1e-4)
    narrow = fitted(task, backend="onnxruntime", formats=("int8-ptq",))
    with torch.no_grad():
        simulated = narrow.module(x)[0]
        wide = task[0](x)[0]
    # the device and the simulation differ by far less than either does from 8 bits' own step
    assert float((narrow.run(x) - wide).abs().max()) < 0.1 * float(wide.abs().max())
    assert float((simulated - wide).abs().max()) < 0.1 * float(wide.abs().max())
    narrow.save(tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == narrow.onnx
    assert '"format": "int8-ptq"' in (tmp_path / "edge.json").read_text()
    assert len(narrow.onnx) < 0.75 * len(plain.onnx)
