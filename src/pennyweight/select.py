"""Choosing between models."""

from pennyweight.measure.curvature import Chosen, by_flatness

__all__ = ["Chosen", "by_flatness"]
