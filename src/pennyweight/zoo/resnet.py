"""Small residual networks for images, in the family made for CIFAR-10.

Source: K. He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2: a convolution,
three stages of n blocks at widths 1, 2 and 4 times the first, a mean over positions, one linear layer; 6n + 2 layers.
Differs from the source: where shapes change the shortcut is a 1x1 convolution (its option B), and all widths scale by
one factor, so that size can be traded against bits.

Shape letters: B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a `ResNet`.

    Attributes:
        depth: layers with weights, 6n + 2: 8, 14, 20, ...
        width: channels of the first stage; 16 in the source.
        factor: what all widths are multiplied by, rounded to whole channels.
        num_channels: C of the images.
        num_classes: K.
    """

    depth: int = 8
    width: int = 16
    factor: float = 1.0
    num_channels: int = 1
    num_classes: int = 10

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise OptionError(f"ResNet: depth {self.depth} is not 6n + 2; give 8, 14, 20, ...")
        if min(self.widths[0], self.num_channels, self.num_classes) < 1:
            raise OptionError(f"{self}: give a width, a factor, channels and classes that leave at least 1 of each")

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of the three stages."""
        first = round(self.width * self.factor)
        return first, 2 * first, 4 * first


class ResNet(nn.Module):
    """An image classifier: pixels (B, C, H, W) -> logits (B, K).

    Args:
        config: its sizes.
        generator: of the initial weights; None for torch's own.

    Initial weights are normal with deviation sqrt(2 / fan out), as the source has them.
    """

    def __init__(self, config: ResNetConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        first = config.widths[0]
        self.stem = nn.Conv2d(config.num_channels, first, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        blocks, inner = [], first
        for stage, width in enumerate(config.widths):
            for index in range((config.depth - 2) // 6):
                blocks.append(_Block(inner, width, stride=2 if stage and not index else 1))
                inner = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(inner, config.num_classes)
        self._initialize(generator)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.out_channels * layer.weight[0, 0].numel()
                layer.weight.normal_(0, (2 / fan_out) ** 0.5, generator=generator)
            elif isinstance(layer, nn.Linear):
                layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        x = functional.relu(self.norm(self.stem(pixels)))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, inner: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, width, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(inner, width, 1, stride=stride, bias=False) if stride > 1 or inner != width else None
        self.shortcut_norm = None if self.shortcut is None else nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        found = functional.relu(self.first_norm(self.first(x)))
        found = self.second_norm(self.second(found))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return functional.relu(found + x)
