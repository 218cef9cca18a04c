"""Sub-word pieces: the likeliest way to cut a text into pieces of a vocabulary, and vocabularies that make it likely.

Row 122. Source: F. Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative
AI", arXiv:2410.18441: pieces and cuts that maximize the likelihood of the text, where byte-pair encoding merges what is
frequent. The likeliest cut is found by dynamic programming, the probabilities by expectation maximization over all
cuts, as T. Kudo, "Subword Regularization", arXiv:1804.10959, has it. Differs from the source: only its abstract is
public, and this is the classical solution of what it says; pieces are dropped by what each is worth to the likelihood.

This module imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pennyweight.errors import DataError, OptionError


@dataclass(frozen=True)
class Pieces:
    """A vocabulary of pieces with their log probabilities, in nats.

    Args:
        logs: of each piece; at least one.
    """

    logs: Mapping[str, float]

    def __post_init__(self) -> None:
        wrong = [piece for piece, log in self.logs.items() if not piece or not log <= 0]
        if not self.logs or wrong:
            said = repr(wrong[0]) if wrong else "nothing"
            raise OptionError(
                f"pieces: {said} in the vocabulary; give texts of a character or more, each with a log <= 0"
            )

    @cached_property
    def longest(self) -> int:
        """Characters of the longest piece."""
        return max(map(len, self.logs))

    def segment(self, word: str) -> list[str]:
        """The likeliest pieces that make up ``word``; of equals those with the longest last piece.

        Exact, in time linear in the word and the longest piece.

        Raises:
            DataError: no pieces make it up.
        """
        best, at = [0.0] + [-math.inf] * len(word), [0] * (len(word) + 1)
        for end in range(1, len(word) + 1):
            for start in range(max(0, end - self.longest), end):
                log = best[start] + self.logs.get(word[start:end], -math.inf)
                if log > best[end]:
                    best[end], at[end] = log, start
        if best[-1] == -math.inf:
            raise self._none(word)
        found, end = [], len(word)
        while end:
            found.append(word[at[end] : end])
            end = at[end]
        return found[::-1]

    def longest_match(self, word: str) -> list[str]:
        """The pieces that taking the longest one that fits, from the left, gives.

        Raises:
            DataError: no piece fits somewhere.
        """
        found, start = [], 0
        while start < len(word):
            ends = range(min(len(word), start + self.longest), start, -1)
            end = next((end for end in ends if word[start:end] in self.logs), None)
            if end is None:
                raise self._none(word)
            found.append(word[start:end])
            start = end
        return found

    def log_likelihood(self, word: str) -> float:
        """The log of the probability of ``word``, over all ways to cut it; -infinity where there is none."""
        return self._forward(word)[-1]

    def nats(self, pieces: Iterable[str]) -> float:
        """What a sequence of pieces costs: minus its log probability."""
        return -sum(self.logs[piece] for piece in pieces)

    def expected(self, words: Mapping[str, float]) -> tuple[dict[str, float], float]:
        """How often each piece is used by ``words`` (text -> count) on average over their cuts, and their likelihood.

        Raises:
            DataError: no pieces make up one of them.
        """
        counts: dict[str, float] = dict.fromkeys(self.logs, 0.0)
        total = 0.0
        for word, count in words.items():
            forward, backward = self._forward(word), self._forward(word, backward=True)
            if forward[-1] == -math.inf:
                raise self._none(word)
            total += count * forward[-1]
            for start in range(len(word)):
                for end in range(start + 1, min(len(word), start + self.longest) + 1):
                    piece = word[start:end]
                    if piece in self.logs:
                        log = forward[start] + self.logs[piece] + backward[end] - forward[-1]
                        counts[piece] += count * math.exp(log)
        return counts, total

    def _forward(self, word: str, *, backward: bool = False) -> list[float]:
        """Log probability of all cuts of every beginning (or ending) of ``word``."""
        found = [-math.inf] * (len(word) + 1)
        found[len(word) if backward else 0] = 0.0
        ends = range(len(word) - 1, -1, -1) if backward else range(1, len(word) + 1)
        for here in ends:
            there = range(max(0, here - self.longest), here)
            if backward:
                there = range(here + 1, min(len(word), here + self.longest) + 1)
            logs = [
                found[other] + self.logs.get(word[min(here, other) : max(here, other)], -math.inf) for other in there
            ]
            top = max(logs)
            if top > -math.inf:
                found[here] = top + math.log(sum(math.exp(log - top) for log in logs))
        return found

    def _none(self, word: str) -> DataError:
        return DataError(f"pieces: no pieces of the vocabulary make up {word[:40]!r}; every character must be a piece")


def fit(
    words: Mapping[str, float] | Sequence[str],
    *,
    size: int,
    longest: int = 8,
    rounds: int = 2,
    kept: float = 0.75,
) -> Pieces:
    """The vocabulary of ``size`` pieces that makes ``words`` likely.

    It begins with every frequent substring; the probabilities are fitted to all cuts, the pieces whose loss costs the
    likelihood least are dropped, and so on until ``size`` are left. Single characters stay.

    Args:
        words: text -> count, or texts.
        size: pieces.
        longest: characters of a piece at most.
        rounds: of expectation maximization between two drops.
        kept: share of the pieces that a drop leaves.

    Raises:
        OptionError: a size below the number of characters, or shares out of range.
        DataError: no words.
    """
    counted = dict(Counter(words)) if not isinstance(words, Mapping) else dict(words)
    counted = {word: count for word, count in counted.items() if word and count > 0}
    if not counted:
        raise DataError("pieces: no words to fit a vocabulary to")
    letters = {letter for word in counted for letter in word}
    if size < len(letters) or longest < 1 or rounds < 1 or not 0 < kept < 1:
        raise OptionError(
            f"pieces: size = {size} for {len(letters)} characters, longest = {longest}, rounds = {rounds}, "
            f"kept = {kept}; give at least as many pieces as characters, and a share below 1"
        )
    seen: Counter[str] = Counter()
    for word, count in counted.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + longest) + 1):
                seen[word[start:end]] += count  # type: ignore[assignment]
    # by the characters that a piece would cover, as frequent long ones are worth more; ties by the text
    order = sorted(seen, key=lambda piece: (-seen[piece] * len(piece), piece))
    chosen = letters | {piece for piece in order if seen[piece] > 1}
    first = [piece for piece in order if piece in chosen][: max(10 * size, len(letters))]
    pieces = _normalized({piece: float(seen[piece]) for piece in sorted({*first, *letters})}, letters)
    while True:
        for _ in range(rounds):
            pieces = _normalized(pieces.expected(counted)[0], letters)
        if len(pieces.logs) <= size:
            return pieces
        wanted = max(size, int(kept * len(pieces.logs)))
        worth = _worth(pieces, counted)
        free = sorted(pieces.logs.keys() - letters, key=lambda piece: (-worth[piece], piece))
        left = letters | set(free[: wanted - len(letters)])
        pieces = _normalized({piece: math.exp(log) for piece, log in pieces.logs.items() if piece in left}, letters)


def _normalized(counts: Mapping[str, float], letters: set[str]) -> Pieces:
    """Probabilities from counts; a character never seen as a piece keeps a trace, so that every word can be cut."""
    total = sum(counts.values())
    held = {
        piece: max(count, 1e-6 * total / len(counts) if piece in letters else 0.0) for piece, count in counts.items()
    }
    held = {piece: count for piece, count in held.items() if count > 0}
    total = sum(held.values())
    return Pieces({piece: min(0.0, math.log(count / total)) for piece, count in held.items()})


def _worth(pieces: Pieces, words: Mapping[str, float]) -> dict[str, float]:
    """What the likeliest cuts would lose, in nats, if a piece had to be made up of others."""
    used: Counter[str] = Counter()
    for word, count in words.items():
        for piece in pieces.segment(word):
            used[piece] += count  # type: ignore[assignment]
    found = {}
    for piece, log in pieces.logs.items():
        rest = Pieces({part: one for part, one in _inside(pieces, piece).items()}) if len(piece) > 1 else None
        found[piece] = math.inf if rest is None else used[piece] * (log + rest.nats(rest.segment(piece)))
    return found


def _inside(pieces: Pieces, piece: str) -> dict[str, float]:
    """The pieces inside ``piece``, without itself."""
    parts = {piece[start:end] for start in range(len(piece)) for end in range(start + 1, len(piece) + 1)} - {piece}
    return {part: pieces.logs[part] for part in parts if part in pieces.logs}


def bits_per_character(pieces: Pieces, words: Mapping[str, float], cut: str = "segment") -> float:
    """What ``words`` (text -> count) cost, in bits a character, when cut by ``Pieces.segment`` or ``longest_match``.

    Raises:
        OptionError: another way to cut.
    """
    if cut not in ("segment", "longest_match"):
        raise OptionError(f"pieces: cut = {cut!r}; give segment or longest_match")
    method = pieces.segment if cut == "segment" else pieces.longest_match
    costs = np.array([pieces.nats(method(word)) * count for word, count in words.items()])
    return float(costs.sum() / math.log(2) / sum(len(word) * count for word, count in words.items()))
