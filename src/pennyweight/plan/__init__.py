"""From budget to recipe; bits for every layer; budgets of inference, augmentation, memory at a training length."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.plan.allocation import Allocation, Layers, bits
    from pennyweight.plan.augmentation_arms import Augmentation, augmentation
    from pennyweight.plan.inference_budget import Stage, test_time
    from pennyweight.plan.memory_bits import bits_for_memory

_WHERE = {
    "Allocation": "allocation",
    "Augmentation": "augmentation_arms",
    "Layers": "allocation",
    "Stage": "inference_budget",
    "augmentation": "augmentation_arms",
    "bits": "allocation",
    "bits_for_memory": "memory_bits",
    "test_time": "inference_budget",
}

__all__ = ["Allocation", "Augmentation", "Layers", "Stage", "augmentation", "bits", "bits_for_memory", "test_time"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
