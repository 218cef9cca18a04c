"""The few rows that a model is traced and compared on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_ROWS, _TOKENS = 2, 7  # unlike each other, and unlike most sizes of models


def probe(inputs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any] | tuple[Any, ...]:
    """Two rows of ``inputs``, the first tokens of each where they are token ids."""
    if isinstance(inputs, Mapping):
        return {name: _short(one) for name, one in inputs.items()}
    return tuple(_short(one) for one in inputs)


def _short(one: Any) -> Any:
    if not isinstance(one, Tensor) or one.ndim == 0:
        return one
    rows = one[:_ROWS]
    return rows[:, :_TOKENS] if rows.ndim == 2 and not rows.is_floating_point() else rows
