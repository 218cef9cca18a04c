"""Models of the zoo that claims train: a seed says all of their first weights, whatever was drawn before."""

import pytest
import torch

from pennyweight.arch import vit as patches
from pennyweight.zoo.dit import DiT, DiTConfig
from pennyweight.zoo.fire import FireNet
from pennyweight.zoo.gpt import GPT, GPTConfig
from pennyweight.zoo.linformer import EncoderLayer
from pennyweight.zoo.resnet import ResNet, ResNetConfig
from pennyweight.zoo.vit import vit

MADE = {
    "dit": lambda g: DiT(DiTConfig(width=16, depth=1, num_heads=2), generator=g),
    "fire": lambda g: FireNet(4, generator=g),
    "gpt": lambda g: GPT(GPTConfig(width=16, depth=1, num_heads=2, vocabulary=32, context=8), generator=g),
    "resnet": lambda g: ResNet(ResNetConfig(width=4), generator=g),
    "linformer": lambda g: EncoderLayer(16, 2, length=8, keys=4, generator=g),
    "patches": lambda g: patches(
        4, image=8, channels=1, width=16, depth=1, num_heads=2, classes=3, seed=g.initial_seed()
    ),
    "vit": lambda g: vit(width=16, depth=1, seed=g.initial_seed()),
}


@pytest.mark.parametrize("name", MADE)
def test_a_seed_says_every_weight_a_model_begins_with(name):
    found = []
    for seed, before in ((3, 0), (3, 1), (4, 1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(before)
            found.append(MADE[name](torch.Generator().manual_seed(seed)).state_dict())
    one, again, other = found
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
