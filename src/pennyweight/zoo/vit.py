"""Small vision Transformers of ``transformers``, for images of digits.

Source: A. Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
arXiv:2010.11929. Differs from the source: sizes only.
"""

from __future__ import annotations

from typing import Any

import torch


def vit(
    *,
    image: int = 8,
    patch: int = 2,
    num_channels: int = 1,
    width: int = 32,
    depth: int = 4,
    num_heads: int = 4,
    num_classes: int = 10,
    seed: int = 0,
) -> Any:
    """A classifier of images with random weights, in eval mode."""
    from transformers import ViTConfig, ViTForImageClassification

    config: Any = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        intermediate_size=4 * width,
        image_size=image,
        patch_size=patch,
        num_channels=num_channels,
        num_labels=num_classes,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module: Any = ViTForImageClassification(config)
        return module.eval()
