"""Models in and out: load, save, assets, checkpoints, and one view of any model's anatomy.

Names are looked up on first use, so that listing assets does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.model.checkpoint import Checkpoint
    from pennyweight.model.loading import load, restore
    from pennyweight.model.model import Model, bf16_bytes, parameters
    from pennyweight.model.saving import Saved, file_bytes, save, saved_bytes

_WHERE = {
    "Checkpoint": "checkpoint",
    "load": "loading",
    "restore": "loading",
    "Saved": "saving",
    "file_bytes": "saving",
    "save": "saving",
    "saved_bytes": "saving",
    "Model": "model",
    "bf16_bytes": "model",
    "parameters": "model",
}

__all__ = [
    "Checkpoint",
    "Model",
    "Saved",
    "bf16_bytes",
    "file_bytes",
    "load",
    "parameters",
    "restore",
    "save",
    "saved_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
