"""Data: embedded texts and tables, a user's own text, and windows of tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.data.tables import Digits, LabelledText, digits, labelled_text, word_pairs
    from pennyweight.data.teaching import ConceptGraph, augment, synthesise, synthesize
    from pennyweight.data.text import Split, documents, split
    from pennyweight.data.transport import projektor
    from pennyweight.data.windowing import Part, windows

_WHERE = {
    "ConceptGraph": "teaching",
    "Digits": "tables",
    "LabelledText": "tables",
    "Part": "windowing",
    "Split": "text",
    "augment": "teaching",
    "digits": "tables",
    "documents": "text",
    "labelled_text": "tables",
    "projektor": "transport",
    "split": "text",
    "synthesise": "teaching",
    "synthesize": "teaching",
    "windows": "windowing",
    "word_pairs": "tables",
}

__all__ = [
    "ConceptGraph",
    "Digits",
    "LabelledText",
    "Part",
    "Split",
    "augment",
    "digits",
    "documents",
    "labelled_text",
    "projektor",
    "split",
    "synthesise",
    "synthesize",
    "windows",
    "word_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
