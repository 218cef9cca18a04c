"""What a model costs and how good it is, each figure with its unit and its interval.

``pennyweight.measure`` is this package and, called, the verb: ``pw.measure(model, data)``. Nothing here imports torch
before it is asked for; `pennyweight.measure.stats` never does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.measure.measurement import Figure, Measurement, measure

__all__ = ["Figure", "Measurement", "measure"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pennyweight.measure import measurement

    return getattr(measurement, name)


class _Verb(ModuleType):
    """A package that is also the verb it is named after: ``pw.measure`` would else be one or the other by luck."""

    def __call__(self, *args: Any, **options: Any) -> Measurement:
        from pennyweight.measure.measurement import measure

        return measure(*args, **options)


sys.modules[__name__].__class__ = _Verb
