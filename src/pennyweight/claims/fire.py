"""What claims about fire on drones share: synthetic patches of woodland, some with flames, some with what looks alike.

No aerial footage can be embedded: textures are smoothed noise in greens and browns, flames are bright blobs whose red
lies well above their blue, and every other image without fire has a roof or a sunlit rock of about that color.

Shape letters: B images, S rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.train import Samples, Trainer
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine
from pennyweight.zoo.fire import FireNet

CLASSES = ("clear", "fire")
SIZE = 32


def patches(count: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, S, S) between 0 and 1, classes (B,), and masks (B, 1, S, S) of flames."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 1, 8, 8, generator=g)
    coarse = functional.interpolate(noise, SIZE, mode="bilinear", align_corners=False)
    fine = torch.rand(count, 1, SIZE, SIZE, generator=g)
    light = 0.35 + 0.4 * torch.rand(count, 1, 1, 1, generator=g)
    tint = torch.tensor([0.6, 0.8, 0.4])[:, None, None] + 0.25 * (torch.rand(count, 3, 1, 1, generator=g) - 0.5)
    images = light * tint * (0.5 + 0.7 * coarse + 0.3 * fine)
    labels = torch.arange(count) % 2
    masks = torch.zeros(count, 1, SIZE, SIZE)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for index in range(count):
        burning = bool(labels[index])
        if not burning and index % 4:  # index 2 of 4: something that looks alike
            _roof(images[index], g)
        if burning:
            for _ in range(1 + int(torch.randint(2, (1,), generator=g))):
                center = 4 + (SIZE - 8) * torch.rand(2, generator=g)
                radius = 1.5 + 3 * torch.rand(2, generator=g)
                away = ((rows - center[0]) / radius[0]).square() + ((columns - center[1]) / radius[1]).square()
                strength = (-away + 0.5 * (fine[index, 0] - 0.5)).exp().clamp_max(1)
                color = torch.tensor([1.0, 0.45, 0.1]) + 0.2 * (torch.rand(3, generator=g) - 0.5)
                images[index] = torch.lerp(images[index], color[:, None, None].expand_as(images[index]), strength[None])
                masks[index, 0] = torch.maximum(masks[index, 0], (strength > 0.5).float())
    images = images + 0.08 * torch.randn(images.shape, generator=g)
    return images.clamp_(0, 1), labels, masks


def _roof(image: Tensor, g: torch.Generator) -> None:
    top, left = (int(torch.randint(2, SIZE - 10, (1,), generator=g)) for _ in range(2))
    height, width = (int(torch.randint(3, 8, (1,), generator=g)) for _ in range(2))
    color = torch.tensor([0.75, 0.4, 0.2]) + 0.2 * (torch.rand(3, generator=g) - 0.5)
    image[:, top : top + height, left : left + width] = color[:, None, None]


def loss(module: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of class and mask, in nats, their sum."""
    logits, mask = module(batch[0])
    weight = torch.where(batch[2] > 0, 8.0, 1.0)  # few pixels burn
    found: Tensor = functional.cross_entropy(logits, batch[1]) + functional.binary_cross_entropy_with_logits(
        mask, batch[2], weight
    )
    return found


def trained(count: int = 1024, *, width: int = 8, steps: int = 300, seed: int = 0) -> FireNet:
    """A network trained on ``count`` patches, in eval mode."""
    module = FireNet(width, generator=torch.Generator().manual_seed(seed))
    Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=1e-4),
        Samples(*patches(count, seed=seed), seed=seed),
        batch=32,
        loss=loss,
        schedule=cosine(steps, steps // 10, peak=5e-3, floor=0.0),
        clip=1.0,
    ).run(steps)
    module.eval()
    return module


def overlap(masks: Tensor, logits: Tensor) -> float:
    """Intersection over union of flames found and flames there."""
    found, there = logits > 0, masks > 0
    return float((found & there).sum() / (found | there).sum().clamp_min(1))
