"""Tables whose rows share values: products of shared rows, tensor trains, hashing networks, one array, equal blocks.

Row 114, the inter-feature methods. Sources: CompoEmb, arXiv:1909.02107; TT-Rec, arXiv:2101.11714; DHE,
arXiv:2010.10784; ROBE, arXiv:2108.02191; AdaptEmb, "Model Size Reduction Using Frequency Based Double Hashing",
arXiv:2007.14523; Dedup, arXiv:2201.10442. Differs from them: see `pennyweight.weights`; ROBE's places bear equal loads
(`Hashed`); the shares of AdaptEmb and the length of Dedup's blocks are fixed.

Shape letters: M rows, N width.
"""

from __future__ import annotations

from math import ceil

import torch

from pennyweight.embeddings.table import NO_JUDGE, SPREAD, Compressor, Judge
from pennyweight.weights import DeepHash, Dense, Hadamard, Hashed, SharedRows, Stacked, TensorTrain, Weight


class Whole(Compressor):
    """The table itself."""

    def start(self) -> Weight:
        rows = self.fitting(
            lambda rows: self.table.value_bytes * rows * self.table.width,
            self.table.rows,
            self.table.rows,
            "a table of",
        )
        return Dense(self.table.drawn(self.generator, rows))


class Hash(Compressor):
    """Rows by the remainder of their number."""

    def start(self) -> Weight:
        rows = self.fitting(
            lambda rows: self.table.value_bytes * rows * self.table.width, 1, self.table.rows, "a table of"
        )
        return SharedRows(Dense(self.table.drawn(self.generator, rows)), rows=self.table.rows)


class Compo(Compressor):
    """The product of two rows: one by the quotient, one by the remainder."""

    def start(self) -> Weight:
        count, width = self.table.rows, self.table.width
        # quotients get few rows and remainders the rest: from the root of M on, more remainders need fewer quotients
        least = ceil(count**0.5)
        rows = self.fitting(
            lambda r: self.table.value_bytes * width * (r + ceil(count / r)), least, count, "remainders of"
        )
        quotients = 1 + self.table.drawn(self.generator, ceil(count / rows))
        return Hadamard(
            SharedRows(Dense(quotients), rows=count, rule="quotient", step=rows),
            SharedRows(Dense(self.table.drawn(self.generator, rows)), rows=count),
        )


class TensorTrains(Compressor):
    """Three cores of one rank."""

    def start(self) -> Weight:
        a = b = ceil(self.table.rows ** (1 / 3))
        c = ceil(self.table.rows / (a * b))
        d, e, f = _three(self.table.width)

        def ranks(r: int) -> tuple[int, int]:
            return min(r, a * d), min(r, c * f)

        def size(r: int) -> int:
            p, q = ranks(r)
            values: int = a * d * p + b * p * e * q + c * q * f
            return self.table.value_bytes * values

        p, q = ranks(self.fitting(size, 1, max(a * d, c * f), "cores of rank"))
        # an entry is a sum of p * q products of three
        scale = (SPREAD / (p * q) ** 0.5) ** (1 / 3)
        cores = [scale * torch.randn(one, generator=self.generator) for one in ((a, d, p), (b, p, e, q), (c, q, f))]
        return TensorTrain(*cores, rows=self.table.rows)

    def nearest(self, matrix: torch.Tensor) -> Weight:
        cores = self.weight
        assert isinstance(cores, TensorTrain)
        rows = (cores.first.shape[0], cores.second.shape[0], cores.third.shape[0])
        columns = (cores.first.shape[1], cores.second.shape[2], cores.third.shape[2])
        return TensorTrain.nearest(
            matrix, rows=rows, columns=columns, rank=max(cores.second.shape[1], cores.second.shape[3])
        )


def _three(width: int) -> tuple[int, int, int]:
    """Three factors of ``width``, as even as they come, the largest last."""
    best = min(
        ((d, e, width // (d * e)) for d in range(1, width + 1) for e in range(d, width + 1) if width % (d * e) == 0),
        key=lambda found: (max(found), -min(found)),
    )
    return tuple(sorted(best))  # type: ignore[return-value]


class DeepHashes(Compressor):
    """A network of hashes, no row of its own for any id."""

    def start(self) -> Weight:
        width = self.table.width
        units = self.fitting(
            lambda h: self.table.value_bytes * (h * min(h, 1024) + h + h * width + width), 1, 2**14, "hidden units"
        )
        hashes = min(units, 1024)
        hidden = torch.randn(units, hashes, generator=self.generator) * (3 / hashes) ** 0.5
        last = torch.randn(width, units, generator=self.generator) * SPREAD / units**0.5
        return DeepHash(hidden, torch.zeros(units), last, torch.zeros(width), rows=self.table.rows)


class Robe(Compressor):
    """Every entry somewhere in one array."""

    def start(self) -> Weight:
        total = self.table.rows * self.table.width
        count = self.fitting(lambda values: self.table.value_bytes * values, 1, total, "an array of")
        values = SPREAD * torch.randn(count, generator=self.generator)
        return Hashed(values, rows=self.table.rows, columns=self.table.width)

    def nearest(self, matrix: torch.Tensor) -> Weight:
        assert isinstance(self.weight, Hashed)
        return Hashed.nearest(matrix, len(self.weight.values))


class Adapt(Compressor):
    """Rows of their own for frequent ids, shared ones for the rest."""

    #: Of the rows that the budget holds.
    OWN = 0.7

    def start(self) -> Weight:
        count = self.table.rows
        rows = self.fitting(lambda rows: self.table.value_bytes * rows * self.table.width, 2, count, "a table of")
        if rows == count:
            return Dense(self.table.drawn(self.generator))
        own = max(1, int(self.OWN * rows))
        tail = SharedRows(Dense(self.table.drawn(self.generator, rows - own)), rows=count - own, rule="hash")
        return Stacked(Dense(self.table.drawn(self.generator, own)), tail)


class Dedup(Compressor):
    """A whole table in training; then similar blocks of rows become one, and what is left is trained on."""

    #: Rows of a block.
    BLOCK = 4
    #: Of the steps, before blocks are put together.
    AFTER = 0.5

    def start(self) -> Weight:
        self._blocks = self.fitting(self._size, 1, ceil(self.table.rows / self.BLOCK), "blocks:")
        return Dense(self.table.drawn(self.generator))

    def nearest(self, matrix: torch.Tensor) -> Weight:
        self.weight = Dense(matrix.clone())
        self.step(1.0, NO_JUDGE)
        return self.weight

    def _size(self, kept: int) -> int:
        index = 2 if kept <= 2**15 else 4
        return self.table.value_bytes * kept * self.BLOCK * self.table.width + index * ceil(
            self.table.rows / self.BLOCK
        )

    def step(self, through: float, judge: Judge) -> bool:
        if through < self.AFTER or isinstance(self.weight, SharedRows):
            return False
        matrix = self.weight.dense().detach()
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % self.BLOCK))
        blocks = padded.view(-1, self.BLOCK * self.table.width)
        index = similar(blocks, self._blocks, self.generator)
        kept = int(index.max()) + 1
        # frequent rows count for more in what stands for a bucket of blocks
        use = torch.nn.functional.pad(self.table.counts.float(), (0, -len(matrix) % self.BLOCK)).view(-1, self.BLOCK)
        weight = use.sum(1).clamp_min(1e-6)
        total = torch.zeros(kept, blocks.shape[1]).index_add(0, index, blocks * weight[:, None])
        mean = total / torch.zeros(kept).index_add(0, index, weight)[:, None]
        table = Dense(mean.view(kept * self.BLOCK, self.table.width).contiguous())
        self.weight = SharedRows(table, index, rows=self.table.rows, rule="stored", step=self.BLOCK)
        return True


def similar(blocks: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) a bucket for each of ``blocks`` (B, values), at most ``most`` of them: by the signs of random projections.

    Locality-sensitive: the chance that two blocks differ in a sign is their angle over pi. Projections are added as
    long as the buckets stay few enough.
    """
    if most >= len(blocks):
        return torch.arange(len(blocks))
    index = torch.zeros(len(blocks), dtype=torch.long)
    centered = blocks - blocks.mean(0)
    misses = 0
    while misses < 8:
        sign = (centered @ torch.randn(blocks.shape[1], generator=generator)) > 0
        finer = torch.unique(2 * index + sign, return_inverse=True)[1]
        if int(finer.max()) + 1 > most:
            misses += 1
        else:
            index = finer
            if int(index.max()) + 1 == len(blocks):
                break
    return index
