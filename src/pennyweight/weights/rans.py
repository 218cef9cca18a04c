"""Range coding (rANS) of small integers under context tables: lossless, within a percent of their entropy.

Source: J. Duda, "Asymmetric numeral systems", arXiv:1311.2540. Here: 32-bit states, 16-bit words, probabilities in
1/2^14, many independent lanes. The C twin in ``pennyweight.native`` does the same at some hundred million symbols a
second; results are bit-identical.

Shape letters: S symbols in the scan, K contexts, A alphabet, L lanes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pennyweight.errors import FormError
from pennyweight.native import library

PROBABILITY_BITS = 14
TOTAL = 1 << PROBABILITY_BITS
_LOW = 1 << 16
_PIECE = 1 << 22  # symbols counted at a time: counting takes 8 bytes for each
#: Frequencies are kept as one byte, an eighth of an octave a step: the loss against exact counts is below 0.1 %.
_STEPS = np.array([0] + [max(1, round(2 ** (v / 8))) for v in range(255)], dtype=np.int64)

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Coded:
    """A coded scan.

    Attributes:
        words: (words,) uint16, lane after lane.
        states: (L,) uint32, the state each lane starts from.
        lengths: (L,) uint32, words of each lane.
    """

    words: NDArray[np.uint16]
    states: NDArray[np.uint32]
    lengths: NDArray[np.uint32]


def lanes_for(count: int) -> int:
    """How many lanes a scan of ``count`` symbols gets: one for every 8192, at least one."""
    return max(1, count // 8192)


def tables_of(symbols: Bytes, contexts: Bytes, alphabet: int, num_contexts: int) -> Bytes:
    """Byte tables (K, A) that suit these symbols: 0 never occurs, else an eighth of an octave a step."""
    counts = _counts(symbols, contexts, num_contexts, alphabet)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # the byte scale spans 32 octaves; anchored so that probability 1 is near its top
    scaled = np.rint(8 * (np.log2(np.maximum(share, 2.0**-30)) + 30)).astype(np.int64) + 1
    return np.where(counts > 0, np.clip(scaled, 1, 255), 0).astype(np.uint8)


def _counts(symbols: Bytes, contexts: Bytes, num_contexts: int, alphabet: int) -> NDArray[np.int64]:
    """(K, A) how often each symbol occurs in each context."""
    counts = np.zeros(num_contexts * alphabet, np.int64)
    for start in range(0, symbols.size, _PIECE):
        piece = slice(start, start + _PIECE)
        counts += np.bincount(contexts[piece].astype(np.int64) * alphabet + symbols[piece], minlength=counts.size)
    return counts.reshape(num_contexts, alphabet)


def frequencies_of(tables: Bytes) -> NDArray[np.uint32]:
    """Integer frequencies (K, A), each row summing to 2^14, a symbol that occurs at least 1; integers only, so that
    every machine finds the same.

    Raises:
        FormError: a row that cannot be normalized (more symbols than 2^14).
    """
    raw = _STEPS[tables]
    sums = raw.sum(1, keepdims=True)
    out = np.where(raw > 0, np.maximum(raw * TOTAL // np.maximum(sums, 1), 1), 0)
    # an empty context codes nothing: give it a valid table all the same
    out[sums[:, 0] == 0, 0] = TOTAL
    rows, largest = np.arange(len(out)), out.argmax(1)
    out[rows, largest] += TOTAL - out.sum(1)
    if (out[rows, largest] < 1).any():
        raise FormError("entropy-coded weight: a probability table does not normalize; the file is damaged")
    return out.astype(np.uint32)


def contexts_of(row: Bytes, column: Bytes, of_sum: Bytes, *, native: bool = True) -> Bytes:
    """(M*N,) the context of every position, row after row.

    Args:
        row: (M,) below 128.
        column: (N,) below 128.
        of_sum: (256,) the context of each sum of the two.
        native: use the C twin where it is there.
    """
    routine = library("rans") if native else None
    if routine is None:
        found: Bytes = of_sum[(row & 127)[:, None] + (column & 127)[None, :]].ravel()
        return found
    contexts = np.empty(row.size * column.size, np.uint8)
    row, column = np.ascontiguousarray(row), np.ascontiguousarray(column)
    routine.pw_contexts(
        _pointer(row), _pointer(column), ctypes.c_int64(row.size), ctypes.c_int64(column.size), _pointer(of_sum),
        _pointer(contexts),
    )  # fmt: skip
    return contexts


def _starts(frequency: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return np.concatenate([np.zeros((len(frequency), 1), np.uint32), frequency.cumsum(1)[:, :-1]], 1).astype(np.uint32)


def cost_bits(symbols: Bytes, contexts: Bytes, tables: Bytes) -> float:
    """Ideal length in bits of the scan under ``tables``; `encode` comes within a word a lane of it."""
    frequency = frequencies_of(tables)
    counts = _counts(symbols, contexts, *tables.shape)
    used = counts > 0
    return float((counts[used] * (PROBABILITY_BITS - np.log2(frequency[used]))).sum())


def _pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def encode(symbols: Bytes, contexts: Bytes, tables: Bytes, *, native: bool = True) -> Coded:
    """Code a flat scan.

    Args:
        symbols: (S,) below A.
        contexts: (S,) below K.
        tables: (K, A) from `tables_of`; every symbol that occurs has an entry above 0.
        native: use the C twin where it is there.
    """
    count, lanes = symbols.size, lanes_for(symbols.size)
    frequency = frequencies_of(tables)
    start = _starts(frequency)
    symbols, contexts = np.ascontiguousarray(symbols), np.ascontiguousarray(contexts)
    states, lengths = np.empty(lanes, np.uint32), np.empty(lanes, np.uint32)
    routine = library("rans") if native else None
    if routine is not None:
        words = np.empty(count + lanes, np.uint16)  # never more than a word a symbol
        routine.pw_encode.restype = ctypes.c_int64
        number = ctypes.c_int64
        written = routine.pw_encode(
            _pointer(symbols), _pointer(contexts), number(count), number(lanes), number(tables.shape[1]),
            _pointer(frequency), _pointer(start), _pointer(states), _pointer(lengths), _pointer(words),
            number(words.size),
        )  # fmt: skip
        assert written >= 0
        return Coded(words[:written].copy(), states, lengths)
    steps = -(-count // lanes)
    x = np.full(lanes, _LOW, np.int64)
    buffer, filled = np.empty((lanes, steps + 1), np.uint16), np.zeros(lanes, np.int64)
    for step in range(steps - 1, -1, -1):
        live = min(lanes, count - step * lanes)  # only the last step can be short
        at = slice(step * lanes, step * lanes + live)
        k, s = contexts[at].astype(np.int64), symbols[at].astype(np.int64)
        f, state = frequency[k, s].astype(np.int64), x[:live]
        full = np.nonzero(f << (32 - PROBABILITY_BITS) <= state)[0]
        buffer[full, filled[full]] = state[full] & 0xFFFF
        filled[full] += 1
        state[full] >>= 16
        x[:live] = (state // f << PROBABILITY_BITS) + state % f + start[k, s]
    states[:] = x
    lengths[:] = filled
    words = np.concatenate([buffer[lane, : filled[lane]][::-1] for lane in range(lanes)])
    return Coded(words, states, lengths)


def decode(coded: Coded, contexts: Bytes, tables: Bytes, *, native: bool = True) -> Bytes:
    """The scan (S,) that `encode` was given.

    Raises:
        FormError: the words do not fit the tables: a damaged file.
    """
    count, lanes = contexts.size, coded.states.size
    if lanes != lanes_for(count) or coded.lengths.size != lanes:
        raise FormError(f"entropy-coded weight: {lanes} lanes for {count} symbols; the file is damaged")
    ends = coded.lengths.astype(np.int64).cumsum()
    if ends[-1] != coded.words.size:
        raise FormError("entropy-coded weight: the coded words do not fit their lanes; the file is damaged")
    frequency = frequencies_of(tables)
    start = _starts(frequency)
    alphabet = tables.shape[1]
    symbol_of = np.repeat(np.tile(np.arange(alphabet, dtype=np.uint8), len(tables)), frequency.ravel())
    contexts = np.ascontiguousarray(contexts)
    symbols = np.empty(count, np.uint8)
    words = np.append(coded.words, np.uint16(0))  # a word past the end may be read, before a damaged lane is found out
    routine = library("rans") if native and words.size < 1 << 31 else None
    if routine is not None:
        number = ctypes.c_int64
        wrong = routine.pw_decode(
            _pointer(contexts), number(count), number(lanes), number(alphabet), _pointer(frequency << 16 | start),
            _pointer(np.append(symbol_of, np.zeros(4, np.uint8))), _pointer(np.ascontiguousarray(coded.states)),
            _pointer(ends.astype(np.uint32)), _pointer(words), _pointer(symbols),
        )  # fmt: skip
        if wrong:
            raise FormError("entropy-coded weight: the coded words do not fit their tables; the file is damaged")
        return symbols
    following = ends - coded.lengths
    x = coded.states.astype(np.int64)
    for step in range(-(-count // lanes)):
        live = min(lanes, count - step * lanes)
        at = slice(step * lanes, step * lanes + live)
        k, state = contexts[at].astype(np.int64), x[:live]
        slot = state & (TOTAL - 1)
        s = symbol_of[(k << PROBABILITY_BITS) + slot]
        symbols[at] = s
        state = frequency[k, s].astype(np.int64) * (state >> PROBABILITY_BITS) + slot - start[k, s]
        low = np.nonzero(state < _LOW)[0]
        state[low] = (state[low] << 16) | words[np.minimum(following[low], coded.words.size)]
        following[low] += 1
        x[:live] = state
    if (following != ends).any() or (x != _LOW).any():
        raise FormError("entropy-coded weight: the coded words do not fit their tables; the file is damaged")
    return symbols
