"""From budget to recipe; and budgets of inference, of augmentation, of memory at a training length."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.plan.augmentation_arms import Augmentation, augmentation
    from pennyweight.plan.inference_budget import Stage, test_time
    from pennyweight.plan.memory_bits import bits_for_memory

_WHERE = {
    "Augmentation": "augmentation_arms",
    "Stage": "inference_budget",
    "augmentation": "augmentation_arms",
    "bits_for_memory": "memory_bits",
    "test_time": "inference_budget",
}

__all__ = ["Augmentation", "Stage", "augmentation", "bits_for_memory", "test_time"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
