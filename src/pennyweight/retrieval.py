"""Datastores of text, and how a language model gains as they grow.

Row 67. Source: R. Shao et al., "Scaling Retrieval-Based Language Models with a Trillion-Token Datastore",
arXiv:2407.12854: retrieve K passages once from the whole datastore, then decontaminate, then keep each passage with
probability p, then take the best k. Scores rank passages whatever else is there, so that this equals an index over a
p-subsample as long as k of the K survive (`laws.datastore.failure` says how surely). Differs from the source: BM25
stands beside an encoder, and short passages are allowed.

Shape letters: P passages, Q queries, K retrieved, k kept.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pennyweight.errors import DataError, OptionError
from pennyweight.laws.datastore import check

Array = NDArray[np.float64]
_WORD = re.compile(r"\w+")
_K1, _B = 1.2, 0.75  # of BM25, the usual values


@lru_cache(maxsize=1 << 17)
def words(text: str) -> tuple[str, ...]:
    """Lower-case words."""
    return tuple(_WORD.findall(text.lower()))


@dataclass(frozen=True)
class Datastore:
    """Passages that can be searched.

    Attributes:
        passages: in order of their documents, without exact repetitions.
        documents: the number of the document of each.
        tokens: words in all of them.
    """

    passages: tuple[str, ...]
    documents: tuple[int, ...]
    tokens: int
    _index: Any = field(repr=False)

    def search(self, query: str, K: int = 1000) -> list[tuple[int, float]]:
        """The best ``K`` passages, (number, score), best first; ties by number."""
        scores = self._index(query)
        order = np.lexsort((np.arange(scores.size), -scores))[:K]
        return [(int(at), float(scores[at])) for at in order]

    def draw(self, seed: int) -> Array:
        """One number in [0, 1) a passage, of its text and the seed: it is kept at p when below p, wherever it lies."""
        return np.array([_uniform(text, seed) for text in self.passages])


def _uniform(text: str, seed: int) -> float:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


class _BM25:
    def __init__(self, passages: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in passages]
        self.terms: dict[str, int] = {}
        rows, columns, values = [], [], []
        lengths = np.array([sum(c.values()) for c in counts], dtype=float)
        mean = max(float(lengths.mean()), 1.0)
        for at, count in enumerate(counts):
            for term, many in count.items():
                columns.append(self.terms.setdefault(term, len(self.terms)))
                rows.append(at)
                values.append(many * (_K1 + 1) / (many + _K1 * (1 - _B + _B * lengths[at] / mean)))
        shape = (len(passages), max(1, len(self.terms)))
        self.weights = sparse.csr_matrix((values, (rows, columns)), shape=shape)
        holding = np.bincount(columns, minlength=shape[1]) if columns else np.zeros(shape[1])
        # of the whole datastore: a subsample has nearly the same, and ranks must not move with it
        self.rarity = np.log1p((len(passages) - holding + 0.5) / (holding + 0.5))

    def __call__(self, query: str) -> Array:
        wanted = np.zeros(self.weights.shape[1])
        for term, many in Counter(words(query)).items():
            if term in self.terms:
                wanted[self.terms[term]] = many * self.rarity[self.terms[term]]
        return np.asarray(self.weights @ wanted)


class _Dense:
    def __init__(self, passages: Sequence[str], encode: Callable[[Sequence[str]], Any]) -> None:
        self.encode = encode
        self.vectors = np.asarray(encode(list(passages)), dtype=float)  # (P, F)
        if self.vectors.ndim != 2 or len(self.vectors) != len(passages):
            raise DataError(
                f"datastore: the encoder gave {self.vectors.shape} for {len(passages)} passages; give (P, F)"
            )

    def __call__(self, query: str) -> Array:
        return np.asarray(self.vectors @ np.asarray(self.encode([query]), dtype=float)[0])


def datastore(
    text: str | Sequence[str],
    chunk_words: int = 256,
    *,
    encode: Callable[[Sequence[str]], Any] | None = None,
) -> Datastore:
    """Cut documents into passages and index them.

    Args:
        text: a document, or several.
        chunk_words: words of a passage.
        encode: texts to vectors (P, F), scored by inner product; None for BM25.

    Raises:
        DataError: no words.
    """
    if chunk_words < 1:
        raise OptionError(f"datastore: chunk_words = {chunk_words}; give 1 or more")
    seen: dict[str, int] = {}
    for number, document in enumerate([text] if isinstance(text, str) else text):
        parts = document.split()
        for start in range(0, len(parts), chunk_words):
            seen.setdefault(" ".join(parts[start : start + chunk_words]), number)
    if not seen:
        raise DataError("datastore: no words in the text; give at least one document")
    passages = tuple(seen)
    index = _BM25(passages) if encode is None else _Dense(passages, encode)
    return Datastore(passages, tuple(seen.values()), sum(len(one.split()) for one in passages), index)


def contaminated(passage: str, answer: str, *, longest: int = 32, jaccard: float = 0.8) -> bool:
    """Whether a passage holds the answer: a shared run of ``longest`` words, or 13-grams overlapping by ``jaccard``."""
    one, two = words(passage), words(answer)
    runs = {two[at : at + longest] for at in range(len(two) - longest + 1)}
    if runs and any(one[at : at + longest] in runs for at in range(len(one) - longest + 1)):
        return True
    grams, others = ({w[at : at + 13] for at in range(len(w) - 12)} for w in (one, two))
    union = len(grams | others)
    return union > 0 and len(grams & others) / union > jaccard


class CacheModel:
    """The plainest language model that retrieval helps: word frequencies, mixed with the words of what was read.

    Args:
        documents: whose words it counts.
        weight: of the words read.
    """

    def __init__(self, documents: Sequence[str], weight: float = 0.3) -> None:
        self.counts = Counter(word for text in documents for word in words(text))
        self.total, self.weight = sum(self.counts.values()), weight

    def loss(self, passages: Sequence[str], query: str, answer: str) -> float:
        """Nats a word of the answer after the passages and the query; words that nowhere occurred share one count."""
        here = Counter(word for text in [*passages, query] for word in words(text))
        size = max(sum(here.values()), 1)
        found = [
            -math.log((1 - self.weight) * (self.counts[word] or 1) / (self.total + 1) + self.weight * here[word] / size)
            for word in words(answer)
        ]
        return sum(found) / len(found) if found else 0.0


#: Passages of the datastore that are asked for when no queries are given.
_ASKED = 200


class CurvePoint(NamedTuple):
    """The mean loss with a datastore of share ``p``.

    Attributes:
        p: share of the datastore; 0 without retrieval.
        tokens: words in it, on average.
        loss: mean over queries and seeds.
        standard_error: of it, over queries.
        failures: queries with fewer than k passages left, over all seeds.
        losses: of each query, mean over seeds; the same queries at every share, to be paired.
    """

    p: float
    tokens: float
    loss: float
    standard_error: float
    failures: int
    losses: tuple[float, ...]


def scaling_curve(
    ds: Datastore,
    ps: Sequence[float],
    seeds: int | Sequence[int] = 1,
    K: int = 1000,
    k: int = 3,
    *,
    queries: Sequence[tuple[str, str]] | None = None,
    loss: Callable[[Sequence[str], str, str], float] | None = None,
) -> list[CurvePoint]:
    """The loss of a language model on answers as the datastore grows, from one retrieval a query.

    Args:
        ds: the whole datastore.
        ps: shares of it; 0 is no retrieval.
        seeds: how many subsamples, or their seeds.
        K: retrieved once.
        k: passages given to the model, best last (nearest to the query).
        queries: (query, answer): the query is searched for and not scored. None asks 200 of the passages for their own
            second half by their first, each left out of what it may find.
        loss: of passages, query and answer: nats a token of the answer; None for `CacheModel` of the passages.

    Raises:
        DataError: a share at which too few of K would survive.
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    own: Sequence[int | None] = [None] * len(queries or ())
    if queries is None:
        queries, own = _halves(ds)
    loss = loss or CacheModel(ds.passages).loss
    if not queries or not chosen or k < 1:
        raise DataError(f"scaling_curve: {len(queries)} queries, {len(chosen)} seeds, k = {k}; give at least 1 of each")
    reach = min(K, len(ds.passages))
    for p in ps:
        if not 0 <= p <= 1:
            raise DataError(f"scaling_curve: a share of {p}; give 0 to 1")
        if 0 < p < 1 and reach < len(ds.passages):  # with every passage retrieved nothing can be missed
            check(reach, p, k)
    ranked = [
        [at for at, _ in ds.search(query, reach) if at != asked and not contaminated(ds.passages[at], answer)]
        for (query, answer), asked in zip(queries, own, strict=True)
    ]
    draws = {seed: ds.draw(seed) for seed in chosen}
    points = []
    for p in sorted(ps):
        each, failures = np.zeros(len(queries)), 0
        for at, (query, answer) in enumerate(queries):
            found = []
            for seed in chosen if 0 < p < 1 else chosen[:1]:
                kept = kept_of(ranked[at], draws[seed], p, k)
                failures += 0 < p and len(kept) < k
                found.append(loss([ds.passages[i] for i in reversed(kept)], query, answer))
            each[at] = float(np.mean(found))
        spread = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan
        points.append(CurvePoint(p, p * ds.tokens, float(each.mean()), spread, int(failures), tuple(each.tolist())))
    return points


def _halves(ds: Datastore) -> tuple[list[tuple[str, str]], list[int]]:
    """Passages evenly spread, each cut into a query and its answer, and their numbers."""
    parts = [passage.split() for passage in ds.passages]
    able = [at for at, found in enumerate(parts) if len(found) > 1]
    asked = able[:: max(1, len(able) // _ASKED)][:_ASKED]
    cut = [(parts[at], len(parts[at]) // 2) for at in asked]
    return [(" ".join(found[:half]), " ".join(found[half:])) for found, half in cut], asked


def kept_of(ranked: Sequence[int], draw: Array, p: float, k: int) -> list[int]:
    """The best ``k`` of ``ranked`` passages that a subsample of share ``p`` holds."""
    found = []
    for at in ranked:
        if p > 0 and draw[at] < p:
            found.append(at)
            if len(found) == k:
                break
    return found
