"""Architectures to build from sizes alone."""

from pennyweight.zoo.gpt import GPT, GPTConfig
from pennyweight.zoo.patches import ViT, ViTConfig, vit

__all__ = ["GPT", "GPTConfig", "ViT", "ViTConfig", "vit"]
