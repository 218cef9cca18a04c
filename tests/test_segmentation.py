"""The likeliest cut of a word against all cuts, and against the Unigram model of `tokenizers`."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis.strategies import dictionaries, floats, text
from tokenizers import Tokenizer, models

from pennyweight.data.segmentation import Pieces, bits_per_character, fit
from pennyweight.errors import DataError, OptionError

LETTERS = {"a": -3.0, "b": -3.5, "c": -4.0}
WORDS = {
    "the": 50,
    "then": 20,
    "there": 20,
    "other": 15,
    "bother": 9,
    "weather": 8,
    "here": 12,
    "heather": 3,
    "tree": 7,
}


def all_cuts(word):
    for cuts in itertools.product((False, True), repeat=len(word) - 1):
        ends = [place + 1 for place, cut in enumerate(cuts) if cut] + [len(word)]
        yield [word[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@given(
    word=text("abc", min_size=1, max_size=10),
    pieces=dictionaries(text("abc", min_size=2, max_size=4), floats(-8, -0.5), max_size=12),
)
def test_it_is_the_best_of_all_cuts_and_the_likelihood_is_their_sum(word, pieces):
    known = Pieces(LETTERS | pieces)
    possible = [cut for cut in all_cuts(word) if all(piece in known.logs for piece in cut)]
    costs = [known.nats(cut) for cut in possible]
    found = known.segment(word)
    assert "".join(found) == word
    assert known.nats(found) == pytest.approx(min(costs))
    assert known.log_likelihood(word) == pytest.approx(math.log(sum(math.exp(-cost) for cost in costs)))
    assert known.nats(found) <= known.nats(known.longest_match(word)) + 1e-9
    counts, total = known.expected({word: 2.0})
    assert total == pytest.approx(2 * known.log_likelihood(word))
    weights = [math.exp(-cost - known.log_likelihood(word)) for cost in costs]
    for piece in known.logs:
        by_hand = 2 * sum(weight * cut.count(piece) for weight, cut in zip(weights, possible, strict=True))
        assert counts[piece] == pytest.approx(by_hand, abs=1e-9)


def test_it_cuts_as_the_unigram_model_of_tokenizers_does():
    pieces = fit(WORDS, size=20)
    vocabulary = [("<unk>", -100.0), *pieces.logs.items()]
    theirs = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    draw = random.Random(0)
    for _ in range(200):
        word = "".join(draw.choice("theronba") for _ in range(draw.randint(1, 12)))
        assert pieces.nats(theirs.encode(word).tokens) == pytest.approx(pieces.nats(pieces.segment(word)))


def test_longest_match_takes_the_longest_and_pays_for_it():
    pieces = Pieces(LETTERS | {"ab": -1.0, "abc": -6.0, "cc": -1.0})
    assert pieces.longest_match("abccc") == ["abc", "cc"]
    assert pieces.segment("abccc") == ["ab", "c", "cc"]
    assert pieces.segment("") == pieces.longest_match("") == []


def test_expectation_maximization_never_lowers_the_likelihood():
    pieces = Pieces({piece: -3.0 for piece in ["th", "he", "the", "er", "re", "ther", *"theronbwa"]})
    before = -math.inf
    for _ in range(20):
        counts, total = pieces.expected(WORDS)
        assert total >= before - 1e-9
        before, whole = total, sum(counts.values())
        pieces = Pieces({piece: math.log(count / whole) for piece, count in counts.items() if count > 1e-30})
    again, _ = pieces.expected(WORDS)
    # at the fixed point the probabilities are the shares expected under themselves
    for piece, count in again.items():
        assert math.exp(pieces.logs[piece]) == pytest.approx(count / sum(again.values()), abs=1e-3)


def test_a_fitted_vocabulary_has_its_size_and_beats_single_characters_and_plain_frequency():
    letters = {letter for word in WORDS for letter in word}
    pieces = fit(WORDS, size=20)
    assert len(pieces.logs) == 20
    assert letters <= pieces.logs.keys()
    assert sum(math.exp(log) for log in pieces.logs.values()) == pytest.approx(1)
    alone = fit(WORDS, size=len(letters))
    assert alone.logs.keys() == letters
    assert bits_per_character(pieces, WORDS) < 0.75 * bits_per_character(alone, WORDS)
    # the same number of pieces, the most frequent substrings instead
    seen = {}
    for word, count in WORDS.items():
        for start, end in itertools.combinations(range(len(word) + 1), 2):
            seen[word[start:end]] = seen.get(word[start:end], 0) + count
    frequent = sorted(seen.keys() - letters, key=lambda piece: -seen[piece])[: 20 - len(letters)]
    plain = Pieces({piece: -3.0 for piece in (*frequent, *sorted(letters))})
    for _ in range(30):
        counts, _ = plain.expected(WORDS)
        plain = Pieces({piece: math.log(max(count, 1e-9) / sum(counts.values())) for piece, count in counts.items()})
    assert bits_per_character(pieces, WORDS) < bits_per_character(plain, WORDS)
    assert fit([*WORDS, "the"], size=12) == fit({**dict.fromkeys(WORDS, 1), "the": 2}, size=12)


def test_what_cannot_be_is_refused():
    with pytest.raises(DataError, match=r"no pieces of the vocabulary make up 'abd'; every character must be a piece"):
        Pieces(LETTERS).segment("abd")
    with pytest.raises(DataError, match="make up 'abd'"):
        Pieces(LETTERS).longest_match("abd")
    with pytest.raises(DataError, match="make up 'abd'"):
        Pieces(LETTERS).expected({"abd": 1})
    assert Pieces(LETTERS).log_likelihood("abd") == -math.inf
    with pytest.raises(OptionError, match=r"pieces: 'a' in the vocabulary"):
        Pieces({"a": 0.5})
    with pytest.raises(OptionError, match="nothing in the vocabulary"):
        Pieces({})
    with pytest.raises(OptionError, match="size = 3 for 9 characters"):
        fit(WORDS, size=3)
    with pytest.raises(DataError, match="no words to fit a vocabulary to"):
        fit({"": 3}, size=3)
    with pytest.raises(OptionError, match="cut = 'best'; give segment or longest_match"):
        bits_per_character(Pieces(LETTERS), {"a": 1}, cut="best")
