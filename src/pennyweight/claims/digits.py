"""What claims about image generators share: a diffusion transformer that draws digits, and a judge that reads them.

Both are trained here, once a process, in half a minute on one thread.

Shape letters: B images, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from pennyweight.claims.tiny import one_thread
from pennyweight.claims.vision import accuracy, digits, train
from pennyweight.train import Samples, Trainer
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine
from pennyweight.zoo.dit import BEGIN, DiT, DiTConfig, flow_loss

STEPS = 800
#: Digits lie between 0 and 1; the model draws them between -1 and 1.
_CENTER, _SPREAD = 0.5, 0.5


def texts(labels: Tensor) -> Tensor:
    """Two tokens a digit, (B, 2): the one that begins a text, and the digit's word."""
    return torch.stack([torch.full_like(labels, BEGIN), 1 + labels], 1)


@lru_cache(maxsize=2)
def dit(steps: int = STEPS) -> DiT:
    """A diffusion transformer trained on the digits; shared, so not to be changed: copy it."""
    return fit_flow(DiT(DiTConfig(), generator=torch.Generator().manual_seed(0)), texts, steps)


def fit_flow(module: DiT, texts_of: Callable[[Tensor], Tensor], steps: int = STEPS) -> DiT:
    """``module`` itself, trained to draw the digits of texts (B, L) that ``texts_of`` makes of labels (B,)."""
    images, labels, _, _ = digits()
    noise = torch.Generator().manual_seed(1)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return flow_loss(model, batch[0], batch[1], noise)

    with one_thread():
        Trainer(
            module,
            torch.optim.AdamW(module.parameters(), weight_decay=0.0),
            Samples(scaled(images), texts_of(labels), seed=0),
            batch=64,
            loss=loss,
            schedule=cosine(steps, steps // 20, peak=2e-3, floor=0.0),
            clip=1.0,
        ).run(steps)
    return module.eval()


def scaled(images: Tensor) -> Tensor:
    """``images`` between 0 and 1 as the model draws them."""
    return (images - _CENTER) / _SPREAD


class Judge(nn.Module):
    """Reads a digit: images (B, 1, 8, 8) between 0 and 1 -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.three, self.head = nn.Linear(32 * 16, 32), nn.Linear(32, 10)

    def features(self, images: Tensor) -> Tensor:
        """(B, 32): what the last layer reads."""
        x = torch.relu(self.two(torch.relu(self.one(images))))
        return torch.relu(self.three(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.features(images))
        return found


@lru_cache(maxsize=1)
def judge() -> Judge:
    """A judge that reads at least 19 of 20 held-out digits."""
    torch.manual_seed(0)
    module = Judge()
    with one_thread():
        train(module, steps=600)
    right = accuracy(module)
    assert right > 0.95, f"the judge reads {right:.3f} of the digits"
    return module


def read(images: Tensor) -> Tensor:
    """(B, 10) logits of drawn images."""
    found: Tensor = judge()((images * _SPREAD + _CENTER).clamp(0, 1))
    return found.detach()


def features(images: Tensor) -> Tensor:
    """(B, 32) features of drawn images."""
    found: Tensor = judge().features((images * _SPREAD + _CENTER).clamp(0, 1))
    return found.detach()
