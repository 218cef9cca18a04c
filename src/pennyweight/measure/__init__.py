"""What a model costs and how good it is, each figure with its unit and its interval.

Nothing here imports torch before it is asked for; `pennyweight.measure.stats` never does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.measure.figures import Comparison, Figure, Measurement
    from pennyweight.measure.measurement import measure

__all__ = ["Comparison", "Figure", "Measurement", "measure"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "measure":
        from pennyweight.measure.measurement import measure

        return measure
    from pennyweight.measure import figures

    return getattr(figures, name)
