"""Ternary weights in a variable-length code: the most probable runs of symbols, each one 16-bit codeword.

Source: E. Frantar and D. Alistarh, "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models",
arXiv:2310.16795, section 4: 2^16 codewords for the most probable sequences of up to 14 pairs of symbols, rows parsed
greedily by longest match, no codeword across rows. Differs from the source: the probability of zero is a setting, not
always 0.885; a row's last codeword may run past its end; the dictionary follows from that one setting, so that no file
holds it; the sequences are enumerated by their counts of zeros instead of by a heap.

Shape letters: M out features, N in features, K codewords, W words of the dictionary, S symbols of the longest word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pennyweight.errors import FormError, ShapeError
from pennyweight.weights.by_rows import by_rows
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, check_finite, form

WORDS = 2**16
_PAIRS = 14  # of the longest word
_FIXED = 2**20  # logarithms as whole numbers, so that every machine orders the words alike


@dataclass(frozen=True)
class _Dictionary:
    """Words as a trie: every prefix of a word is a word.

    Attributes:
        children: (W + 1, 9) int32, the word that a pair makes of a word, -1 where there is none; the last row is that
            of the empty word.
        symbols: (W, S) uint8, padded.
        lengths: (W,) int64, symbols of each word.
    """

    children: NDArray[np.int32]
    symbols: Tensor
    lengths: Tensor


@lru_cache(maxsize=16)
def _dictionary(zeros: int) -> _Dictionary:
    """The words for symbols of which ``zeros`` in a thousand are 0, and 1 and 2 are equally frequent."""
    zero, other = (round(_FIXED * math.log(p)) for p in (zeros / 1000, (1 - zeros / 1000) / 2))
    # words of as many pairs and as many zeros are equally probable: take whole classes, and a part of the last
    classes = [(pairs, others) for pairs in range(1, _PAIRS + 1) for others in range(2 * pairs + 1)]
    # single pairs first, whatever they are worth: any row can then be parsed
    classes.sort(key=lambda c: (c[0] > 1, -((2 * c[0] - c[1]) * zero + c[1] * other), c))
    room, taken = WORDS, {}
    for pairs, others in classes:
        taken[pairs, others] = min(room, math.comb(2 * pairs, others) << others)
        room -= taken[pairs, others]
    children = np.full((WORDS + 1, 9), -1, dtype=np.int32)
    symbols, lengths = np.zeros((WORDS, 2 * _PAIRS), dtype=np.uint8), np.zeros(WORDS, dtype=np.int64)
    pair = np.stack(np.divmod(np.arange(9, dtype=np.uint8), 3), axis=1)
    parents, others_of, total = np.array([WORDS]), np.zeros(1, dtype=np.int64), 0
    for pairs in range(1, _PAIRS + 1):
        others = (others_of[:, None] + (pair > 0).sum(1)).ravel()  # of every child, parent after parent
        kept = np.zeros(others.size, dtype=bool)
        for count in range(2 * pairs + 1):
            kept[np.flatnonzero(others == count)[: taken[pairs, count]]] = True
        parent, last = np.divmod(np.flatnonzero(kept), 9)
        made = total + np.arange(len(parent))
        children[parents[parent], last] = made
        if pairs > 1:
            symbols[made] = symbols[parents[parent]]
        symbols[made, 2 * pairs - 2 : 2 * pairs], lengths[made] = pair[last], 2 * pairs
        parents, others_of, total = made, others[kept], total + len(parent)
    assert total == WORDS
    return _Dictionary(children, torch.from_numpy(symbols), torch.from_numpy(lengths))


def _parse(codes: NDArray[np.uint8], found: _Dictionary) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Words of the greedy parse, row after row, and how many each row (M,) has; all rows advance at once."""
    rows, columns = codes.shape
    width = -(-columns // 2)
    padded = np.zeros((rows, 2 * (width + _PAIRS)), dtype=np.uint8)
    padded[:, :columns] = codes
    pairs = 3 * padded[:, 0::2] + padded[:, 1::2]
    at, active, out, where = np.zeros(rows, dtype=np.int64), np.arange(rows), [], []
    while active.size:
        word, length = np.full(active.size, WORDS, dtype=np.int32), np.zeros(active.size, dtype=np.int64)
        going = np.arange(active.size)
        for _ in range(_PAIRS):
            step = found.children[word[going], pairs[active[going], at[active[going]] + length[going]]]
            going, step = going[step >= 0], step[step >= 0]
            word[going] = step
            length[going] += 1
        out.append(word)
        where.append(active)
        at[active] += length
        active = active[at[active] < width]
    row = np.concatenate(where)
    return np.concatenate(out)[np.argsort(row, kind="stable")], np.bincount(row, minlength=rows)


@form("dictionary")
class DictionaryCoded(Weight):
    """``W[i, j]`` is 0, ``levels[i, 0]`` or ``levels[i, 1]``, as the code 0, 1 or 2 says.

    Args:
        words: (K,) int16, the codewords of all rows (their 16 bits, the sign being one of them).
        counts: (M,) int16 or int32, codewords of each row.
        levels: (M, 2), what the codes 1 and 2 stand for; trained.
        columns: N.
        zeros: zeros in a thousand symbols that the dictionary was made for, 334 to 999.

    Raises:
        FormError: rows that do not decode to N symbols (a damaged file).

    Computes in float32 (float64 where the levels are).

    Cost: M*N + 2*M parameters; two bytes a codeword, the counts and the levels; 2*M*N FLOPs a row. Exact for a matrix
    of which each row holds zero and two other values at most.
    """

    tensors = ("words", "counts", "levels")
    words: Tensor
    counts: Tensor

    def __init__(self, words: Tensor, counts: Tensor, levels: Tensor, *, columns: int, zeros: int) -> None:
        if words.ndim != 1 or counts.ndim != 1 or levels.shape != (counts.numel(), 2):
            raise ShapeError(
                f"DictionaryCoded: words {tuple(words.shape)}, counts {tuple(counts.shape)} and levels "
                f"{tuple(levels.shape)}; give (words,), (out,) and (out, 2)"
            )
        if words.dtype != torch.int16 or counts.dtype not in (torch.int16, torch.int32):
            raise FormError(
                f"DictionaryCoded: words are {words.dtype}, counts {counts.dtype}; give int16, and int16 or int32"
            )
        if not isinstance(zeros, int) or not 334 <= zeros <= 999:
            raise FormError(f"DictionaryCoded: zeros = {zeros!r} in a thousand; give 334 to 999")
        super().__init__(shape=(counts.numel(), columns))
        check_finite(levels, "DictionaryCoded: levels")
        self.zeros = zeros
        self.register_buffer("words", words)
        self.register_buffer("counts", counts)
        self.levels = levels if isinstance(levels, nn.Parameter) else nn.Parameter(levels)
        if words.device.type != "meta":
            self._check()

    @classmethod
    def encode(cls, codes: Tensor, levels: Tensor, *, zeros: int | None = None) -> DictionaryCoded:
        """The weight with ``codes`` (M, N), whole numbers 0, 1 and 2, and ``levels`` (M, 2).

        Args:
            codes: (M, N).
            levels: (M, 2).
            zeros: zeros in a thousand to make the dictionary for; None: as the codes have them, to five.

        Raises:
            FormError: other codes.
        """
        if codes.ndim != 2 or codes.is_floating_point() or not 0 <= int(codes.min()) <= int(codes.max()) <= 2:
            raise FormError("DictionaryCoded: codes are not a matrix of whole numbers 0, 1 and 2")
        if zeros is None:  # not exactly, so that the matrices of a model share their dictionaries
            zeros = min(995, max(335, 5 * round(200 * float((codes == 0).float().mean()))))
        words, counts = _parse(codes.detach().cpu().to(torch.uint8).numpy(), _dictionary(zeros))
        size = torch.int16 if codes.shape[1] < 2**16 - 1 else torch.int32  # a word holds two symbols or more
        return cls(
            torch.from_numpy(words.astype(np.uint16).view(np.int16)),
            torch.from_numpy(counts).to(size),
            levels,
            columns=codes.shape[1],
            zeros=zeros,
        )

    def _check(self) -> None:
        counts = self.counts.long().cpu()
        if int(counts.min()) < 1 or int(counts.sum()) != self.words.numel():
            raise FormError("DictionaryCoded: counts do not fit the words; the file is damaged")
        lengths = _dictionary(self.zeros).lengths[self.words.cpu().long() & 0xFFFF].cumsum(0)
        ends = counts.cumsum(0)
        whole = lengths[ends - 1].diff(prepend=torch.zeros(1, dtype=torch.int64))
        if bool(((whole < self.shape[1]) | (whole > self.shape[1] + 2 * _PAIRS)).any()):
            raise FormError(f"DictionaryCoded: some rows are no {self.shape[1]} symbols; the file is damaged")

    def codes(self, index: Tensor | None = None) -> Tensor:
        """(M, N) uint8, or those of the rows ``index`` (R,), decoded all at once."""
        counts = self.counts.long()
        ends = counts.cumsum(0)
        if index is None:
            words, rows = self.words, counts.numel()
        else:
            starts, counts, rows = (ends - counts)[index], counts[index], index.numel()
            ends = counts.cumsum(0)
            place = torch.arange(int(counts.sum()), device=counts.device)
            words = self.words[place + (starts - (ends - counts)).repeat_interleave(counts)]
        found = _dictionary(self.zeros)
        words = words.long() & 0xFFFF
        lengths = found.lengths.to(words.device)[words]
        symbols = found.symbols.to(words.device)[words]  # (K, S)
        owner = torch.arange(rows, device=words.device).repeat_interleave(counts)
        before = lengths.cumsum(0) - lengths
        first = before[ends - counts] if rows else before
        column = (before - first[owner])[:, None] + torch.arange(2 * _PAIRS, device=words.device)
        inside = (column < self.shape[1]) & (column < (before - first[owner] + lengths)[:, None])
        # row after row, word after word, symbol after symbol: what is inside is the matrix in its order
        return symbols[inside].view(rows, self.shape[1])

    def _values(self, codes: Tensor, levels: Tensor) -> Tensor:
        levels = levels.to(self.dtype)
        return torch.where(codes == 1, levels[:, :1], torch.where(codes == 2, levels[:, 1:], 0.0))

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.levels.dtype, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self, x)

    def dense(self) -> Tensor:
        return self._values(self.codes(), self.levels)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        return self._values(self.codes(flat), self.levels[flat]).view(*index.shape, self.shape[1])

    def settings(self) -> dict[str, Any]:
        return {"columns": self.shape[1], "zeros": self.zeros}

    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(m * n + 2 * m, self.words.nbytes + self.counts.nbytes + self.levels.nbytes, 2 * m * n)
