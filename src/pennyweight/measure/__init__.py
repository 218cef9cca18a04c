"""What a model costs and how good it is, each figure with its unit and its interval.

Nothing here imports torch before it is asked for; `pennyweight.measure.stats` never does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.measure import kernel_theory
    from pennyweight.measure.curvature import fisher_trace, flatness
    from pennyweight.measure.figures import Comparison, Figure, Measurement
    from pennyweight.measure.measurement import measure
    from pennyweight.measure.unigram import unigram_normalised_loss, unigram_normalized_loss

_WHERE = {
    "Comparison": "figures",
    "Figure": "figures",
    "Measurement": "figures",
    "fisher_trace": "curvature",
    "flatness": "curvature",
    "measure": "measurement",
    "unigram_normalised_loss": "unigram",
    "unigram_normalized_loss": "unigram",
}

__all__ = [
    "Comparison",
    "Figure",
    "Measurement",
    "fisher_trace",
    "flatness",
    "kernel_theory",
    "measure",
    "unigram_normalised_loss",
    "unigram_normalized_loss",
]


def __getattr__(name: str) -> Any:
    if name == "kernel_theory":
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
