"""Changing what a trained model reads."""

from pennyweight.zoo.patches import repatch, resize_patch

__all__ = ["repatch", "resize_patch"]
