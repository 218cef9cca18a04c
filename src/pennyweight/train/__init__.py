"""Training: a loop that resumes bit for bit, learning-rate schedules, optimizers, streams of samples."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.train import optim, schedules
    from pennyweight.train.constrained import data_constrained
    from pennyweight.train.distributed import processes, sharded, whole
    from pennyweight.train.dynamic import DynamicSparsity
    from pennyweight.train.loop import Trainer, next_token_loss
    from pennyweight.train.optim import effective_step
    from pennyweight.train.quantized import qat
    from pennyweight.train.samples import Samples, byte_windows, two_stage

_WHERE = {
    "DynamicSparsity": "dynamic",
    "Samples": "samples",
    "Trainer": "loop",
    "byte_windows": "samples",
    "data_constrained": "constrained",
    "effective_step": "optim",
    "next_token_loss": "loop",
    "processes": "distributed",
    "qat": "quantized",
    "sharded": "distributed",
    "two_stage": "samples",
    "whole": "distributed",
}
_MODULES = ("optim", "schedules")

__all__ = [
    "DynamicSparsity",
    "Samples",
    "Trainer",
    "byte_windows",
    "data_constrained",
    "effective_step",
    "next_token_loss",
    "optim",
    "processes",
    "qat",
    "schedules",
    "sharded",
    "two_stage",
    "whole",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
