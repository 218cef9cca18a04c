"""Claims: what each row promises, run here on real small models beside its baseline; one file a row.

``run`` and ``Assets`` are looked up on first use: listing claims loads no model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pennyweight.claims.claim import Claim, Outcome, claim, claims

if TYPE_CHECKING:
    from pennyweight.claims.assets import Assets
    from pennyweight.claims.runner import Record, current, earlier, page, run

_WHERE = {
    "Assets": "assets",
    "Record": "runner",
    "current": "runner",
    "earlier": "runner",
    "page": "runner",
    "run": "runner",
}

__all__ = ["Assets", "Claim", "Outcome", "Record", "claim", "claims", "current", "earlier", "page", "run"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
