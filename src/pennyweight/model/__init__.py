"""Models in and out: load, save, assets, checkpoints, and one view of any model's anatomy.

Names are looked up on first use, so that listing assets does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.model.checkpoint import Checkpoint
    from pennyweight.model.loading import load
    from pennyweight.model.model import Model, bf16_bytes, parameters

_WHERE = {
    "Checkpoint": "checkpoint",
    "load": "loading",
    "Model": "model",
    "bf16_bytes": "model",
    "parameters": "model",
}

__all__ = ["Checkpoint", "Model", "bf16_bytes", "load", "parameters"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
