"""What claims about image models share: the digits in two parts, and code to train and judge small classifiers on them.

Shape letters: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.data.tables import digits as all_digits
from pennyweight.train import Samples, Trainer
from pennyweight.train.loop import Callback, Loss
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine

HELD_OUT = 597  # of 1,797 images


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (1200, 1, 8, 8) and labels to train on, images (597, 1, 8, 8) and labels to judge by.

    Drawn at random once for all: in the order of the file neighbors were written by one hand.
    """
    found = all_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    images, labels = found.images[order][:, None], found.labels[order]
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def logits_of(module: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, K) of a plain classifier or of one of ``transformers``."""
    found = module(images)
    return found if isinstance(found, Tensor) else found.logits


def label_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of (images, labels)."""
    return functional.cross_entropy(logits_of(module, batch[0]), batch[1])


def train(
    module: nn.Module,
    *,
    steps: int,
    batch: int = 64,
    rate: float = 3e-3,
    seed: int = 0,
    weight_decay: float = 1e-4,
    callbacks: Sequence[Callback] = (),
    loss: Loss = label_loss,
    few: int | None = None,
) -> nn.Module:
    """``module`` itself, trained on the digits (the first ``few``) with AdamW at a cosine rate, then in eval mode."""
    images, labels = (part[:few] for part in digits()[:2])
    Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=weight_decay),
        Samples(images, labels, seed=seed),
        batch=batch,
        loss=loss,
        schedule=cosine(steps, max(1, steps // 10), peak=rate, floor=0.0),
        clip=1.0,
        callbacks=callbacks,
    ).run(steps)
    return module.eval()


@torch.no_grad()
def correct(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) float32: one where the class is right."""
    return (logits_of(module, images).argmax(1) == labels).float()


def held_out_correct(module: nn.Module) -> Tensor:
    """(597,) float32: `correct` on the held-out images."""
    return correct(module, *digits()[2:])


def accuracy(module: nn.Module) -> float:
    """Share of held-out images whose class is right."""
    return float(held_out_correct(module).mean())
