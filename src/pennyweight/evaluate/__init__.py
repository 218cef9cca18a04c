"""How good a model is: one value a sample, so that `pennyweight.measure.stats` can pair them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.evaluate.extraction import Memorisation, memorisation, memorization

__all__ = ["Memorisation", "memorisation", "memorization"]


def __getattr__(name: str) -> Any:
    # on first use: the room is imported by what must not load torch
    if name in __all__:
        return getattr(importlib.import_module("pennyweight.evaluate.extraction"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
