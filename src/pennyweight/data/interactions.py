"""Who took what: implicit feedback to train recommenders on, made of real text where no other is at hand.

A passage of a text is a user and a word of it an item that it took: passages share topics as users share tastes, words
are as unevenly frequent as items are, and what a passage holds back can be predicted from what it shows.

Shape letters: U users, I items, P pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.errors import DataError

_WORD = re.compile(r"[a-z]{3,}")


@dataclass(frozen=True)
class Interactions:
    """Pairs of users and items.

    Attributes:
        seen: (P, 2) user and item, to train on.
        held: (P', 2) pairs of the same users, to judge by.
        users: U.
        items: I.
    """

    seen: Tensor
    held: Tensor
    users: int
    items: int

    def matrix(self, pairs: Tensor) -> Tensor:
        """(U, I) bool: ``pairs`` (P, 2) as a table."""
        found = torch.zeros(self.users, self.items, dtype=torch.bool)
        found[pairs[:, 0], pairs[:, 1]] = True
        return found


def of_texts(
    texts: Iterable[str], *, items: int = 1500, skip: int = 60, words: int = 120, least: int = 12, seed: int = 0
) -> Interactions:
    """The words of passages, a fifth of each passage's held back.

    Args:
        texts: cut into passages.
        items: I, the words in most passages, after ``skip`` that say nothing ("the").
        skip: see ``items``.
        words: of a passage.
        least: items a passage has to hold.
        seed: of what is held back.

    Raises:
        DataError: too little text.
    """
    passages = []
    for text in texts:
        found = _WORD.findall(text.lower())
        passages += [set(found[start : start + words]) for start in range(0, len(found) - words + 1, words)]
    counts = Counter(word for passage in passages for word in passage)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[skip : skip + items]
    if len(ranked) < items:
        raise DataError(f"interactions: {len(ranked)} words for {items} items; give more text, or ask for fewer")
    index = {word: at for at, word in enumerate(ranked)}
    taken = [sorted(index[word] for word in passage if word in index) for passage in passages]
    taken = [one for one in taken if len(one) >= least]
    if not taken:
        raise DataError(f"interactions: no passage of {words} words holds {least} of the items; ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    seen, held = [], []
    for user, one in enumerate(taken):
        order = torch.randperm(len(one), generator=generator).tolist()
        cut = len(one) // 5
        held += [(user, one[at]) for at in order[:cut]]
        seen += [(user, one[at]) for at in order[cut:]]
    return Interactions(torch.tensor(seen), torch.tensor(held), len(taken), items)
