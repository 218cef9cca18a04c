"""Which entries of a sparse matrix are kept, in as few bits as fixed-width codes give.

The kept places, in scan order, are written as gaps: a code says how many places are left out before the next kept one,
and the largest code says that as many as it counts are left out and no kept one follows yet. One bit a code is a bitmap
(1 = left out); the sparser the pattern, the more bits pay. `Gaps.of` takes the width that stores least: within 12 % of
the entropy of a random pattern from 50 % down to 2 % kept.

Source: S. Han et al., "Deep Compression", arXiv:1510.00149, section 2 (relative indices with a padding symbol). Differs
from the source: the padding symbol holds no zero value, and the width is chosen for each matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from pennyweight.errors import FormError
from pennyweight.weights.packing import pack, packed_width, unpack


@dataclass(frozen=True)
class Gaps:
    """Kept places of a mask of known size.

    Attributes:
        packed: (bytes,) uint8.
        bits: of a code.
        length: codes in ``packed``.
    """

    packed: Tensor
    bits: int
    length: int

    @classmethod
    def of(cls, mask: Tensor) -> Gaps:
        """The kept places of ``mask``, bool, any shape, True = kept."""
        place = mask.reshape(-1).nonzero()[:, 0]
        gap = place.diff(prepend=place.new_tensor([-1])) - 1
        lengths = {bits: int((gap // (2**bits - 1)).sum()) + gap.numel() for bits in range(1, 9)}
        bits = min(lengths, key=lambda width: packed_width(lengths[width], width))
        escape = 2**bits - 1
        # each kept place ends a run of escapes: write the remainders where the runs end, escapes elsewhere
        end = (gap // escape + 1).cumsum(0) - 1
        codes = torch.full((lengths[bits],), escape, dtype=torch.uint8, device=mask.device)
        codes[end] = (gap % escape).to(torch.uint8)
        return cls(pack(codes, bits), bits, lengths[bits])

    def places(self) -> Tensor:
        """(kept,) int64 places in scan order, increasing."""
        escape = 2**self.bits - 1
        codes = unpack(self.packed, self.bits, self.length)
        kept = codes != escape
        if self.bits == 1:  # each code is one place
            found: Tensor = kept.nonzero()[:, 0]
        else:
            found = ((codes + kept).cumsum(0, dtype=torch.int64) - 1)[kept]
        return found


def check_gaps(gaps: Gaps, kept: int, size: int, where: str) -> None:
    """Refuse gaps that do not place ``kept`` entries among ``size``: a damaged file."""
    if gaps.packed.dtype != torch.uint8 or not 1 <= gaps.bits <= 8 or gaps.length < 0:
        raise FormError(f"{where}: a pattern of {gaps.packed.dtype} in {gaps.bits} bits; give uint8 in 1 to 8 bits")
    if gaps.packed.shape != (packed_width(gaps.length, gaps.bits),):
        raise FormError(
            f"{where}: a pattern of shape {tuple(gaps.packed.shape)} is not {gaps.length} codes of {gaps.bits} bits; "
            f"give ({packed_width(gaps.length, gaps.bits)},)"
        )
    if gaps.packed.device.type == "meta":
        return
    places = gaps.places()
    if places.numel() != kept or (kept and int(places[-1]) >= size):
        last = int(places[-1]) if places.numel() else 0
        raise FormError(f"{where}: the pattern keeps {places.numel()} up to place {last}, for {kept} values of {size}")


@cache
def choices(n: int, m: int) -> Tensor:
    """(C(m, n), n) every way to keep ``n`` of ``m`` places, in colexicographic order, as `choice_rank` counts."""
    return torch.tensor(sorted(combinations(range(m), n), key=lambda chosen: chosen[::-1])).view(-1, n)


def choice_rank(places: Tensor) -> Tensor:
    """(...) rank of increasing ``places`` (..., n) in `choices`: the combinatorial number system."""
    n, top = places.shape[-1], int(places.max()) + 1 if places.numel() else 1
    table = torch.tensor([[comb(p, i + 1) for i in range(n)] for p in range(top)], device=places.device)
    return table[places, torch.arange(n, device=places.device)].sum(-1)
