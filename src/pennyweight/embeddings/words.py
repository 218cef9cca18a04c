"""Labelled texts as bags of words: the task that tables are compared on (row 114).

Shape letters: C bags, L ids of a bag.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import torch

from pennyweight.data.tables import LabelledText, labelled_text
from pennyweight.embeddings.bench import Bags
from pennyweight.errors import DataError


def word_bags(source: str | Path, *, length: int = 24, held_out: int = 3000, seed: int = 0) -> Bags:
    """Texts of two classes as bags of their first ``length`` words, numbered by how often they occur in training.

    Args:
        source: ``tweets`` or ``polarity``, of which the positive and negative ones are taken; or a CSV file with the
            columns text and label, of two labels.
        length: L.
        held_out: texts to judge by, drawn at random; a third of them all where that is fewer.
        seed: of the draw.

    Raises:
        DataError: a file that cannot be read, other columns, rows without a label, not two classes, or no words.
    """
    found = _read(Path(source)) if str(source).endswith(".csv") else labelled_text(str(source))
    classes = ("negative", "positive") if {"negative", "positive"} <= set(found.classes) else found.classes
    if len(classes) != 2:
        raise DataError(f"embeddings: {source} has {len(classes)} labels ({', '.join(classes[:5])}); give texts of two")
    low, high = (found.classes.index(name) for name in classes)
    pairs = [(t, one == high) for t, one in zip(found.texts, found.labels, strict=True) if one in (low, high)]
    held_out = min(held_out, len(pairs) // 3)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    words = [re.findall(r"[a-z0-9'@#]+", pairs[n][0].lower())[:length] for n in order]
    labels = torch.tensor([int(pairs[n][1]) for n in order])
    counts = Counter(word for text in words[held_out:] for word in text)
    if not counts:
        raise DataError(f"embeddings: {source}: no text to train on has a word; give texts of letters or figures")
    number = {word: n for n, (word, _) in enumerate(counts.most_common())}
    ids = torch.full((len(words), length), -1)
    for row, text in enumerate(words):
        known = [number[word] for word in text if word in number]
        ids[row, : len(known)] = torch.tensor(known, dtype=torch.long)
    return Bags(ids[held_out:], labels[held_out:], ids[:held_out], labels[:held_out], len(number))


def _read(path: Path) -> LabelledText:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            pairs: list[tuple[str, str | None]] = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    except KeyError as error:
        raise DataError(f"{path}: no column {error}; give columns text and label") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a CSV file with columns text and label") from None
    labels = [label for _, label in pairs if label is not None]
    if len(labels) < len(pairs):
        place = next(place for place, (_, label) in enumerate(pairs, 1) if label is None)
        raise DataError(f"{path}: row {place} after the heading has no label; give every text one")
    classes = tuple(sorted(set(labels)))
    return LabelledText(tuple(text for text, _ in pairs), tuple(map(classes.index, labels)), classes)
