"""A small network that sees fire: whether an image shows it, and where.

Row 203. Source of the shape: O. Ronneberger et al., "U-Net", arXiv:1505.04597: an encoder whose maps are handed over to
a decoder of equal steps; here it has a second head, a class for the whole image. Differs from the source: sizes, batch
norm, and padding that keeps the size.

Shape letters: B images, H rows, W columns, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import OptionError


class _Step(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()
        )


class FireNet(nn.Module):
    """Images (B, 3, H, W), H and W multiples of 4 -> logits of classes (B, K) and of the mask (B, 1, H, W).

    Args:
        width: channels of the first step.
        num_classes: K; the first is "clear" by custom, the second "fire".
        generator: of the initial weights; None for torch's own.
    """

    def __init__(self, width: int = 8, num_classes: int = 2, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if min(width, num_classes) < 1:
            raise OptionError(f"FireNet: width {width}, {num_classes} classes; give at least 1 of each")
        self.first = _Step(3, width)
        self.second = _Step(width, 2 * width, stride=2)
        self.third = _Step(2 * width, 4 * width, stride=2)
        self.deep = _Step(4 * width, 4 * width)
        self.up = _Step(6 * width, 2 * width)
        self.last = _Step(3 * width, width)
        self.mask = nn.Conv2d(width, 1, 1)
        self.head = nn.Linear(4 * width, num_classes)
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                fan_in = weight[0].numel()
                weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            elif name.endswith("bias"):
                weight.data.zero_()  # torch draws them from its own generator, whatever the seed

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of classes (B, K), and of the mask (B, 1, H, W)."""
        first = self.first(pixels)
        second = self.second(first)
        deep = self.deep(self.third(second))
        up = self.up(torch.cat([functional.interpolate(deep, scale_factor=2.0), second], 1))
        last = self.last(torch.cat([functional.interpolate(up, scale_factor=2.0), first], 1))
        return self.head(deep.mean((2, 3))), self.mask(last)
