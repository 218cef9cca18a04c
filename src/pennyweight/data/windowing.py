"""Windows of tokens: what models are calibrated on and judged by.

Shape letters: C windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pennyweight.data.text import split
from pennyweight.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["calibration", "heldout"]


def windows(
    source: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    part: Part,
    length: int = 512,
    count: int = 32,
    seed: int = 0,
) -> Tensor:
    """Windows drawn without replacement from one part of a text: (C, T) token ids.

    The documents of the part are tokenized, joined by a blank line and cut into windows without overlap; ``seed`` picks
    ``count`` of them. Tokens that the tokenizer puts around every text (``[CLS]``, a beginning-of-text) stand around
    every window.

    Args:
        source: see `text.documents`.
        tokenizer: of the model.
        part: which documents.
        length: T.
        count: C.
        seed: of the draw.

    Raises:
        DataError: no tokenizer, or too little text for ``count`` windows.
    """
    if tokenizer is None:
        raise DataError("text needs a tokenizer, and the model has none; give token ids instead, or add tokenizer.json")
    before, after = _around(tokenizer)
    room = length - len(before) - len(after)
    if room < 1 or count < 1:
        raise DataError(f"{count} windows of {length} tokens: give at least 1 of {1 + len(before) + len(after)} tokens")
    found = split(source)
    texts = [f"{text}\n\n" for text in (found.heldout if part == "heldout" else found.calibration)]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for text in ids for token in text], dtype=torch.int64)
    whole = len(tokens) // room
    shown = source if isinstance(source, (str, Path)) else "the given text"
    if whole < count:
        raise DataError(
            f"{shown}: its {part} part has {len(tokens)} tokens in {len(texts)} documents, enough for "
            f"{whole} windows of {length}, and {count} were asked for; give more text, fewer or shorter windows"
        )
    drawn = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:count]
    chosen = tokens[: whole * room].reshape(whole, room)[drawn]
    sides = [torch.tensor(side, dtype=torch.int64).expand(count, -1) for side in (before, after)]
    return torch.cat([sides[0], chosen, sides[1]], dim=1)


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that ``tokenizer`` puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]
