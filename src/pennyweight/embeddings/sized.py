"""Tables whose rows differ in width or lose entries: by frequency, by search, or by size.

Row 114, the intra-feature methods but rounding. Sources: MDE, A. Ginart et al., "Mixed Dimension Embeddings with
Application to Memory-Efficient Recommendation Systems", arXiv:1909.11810; AutoDim, X. Zhao et al., arXiv:2006.14827;
OptEmbed, F. Lyu et al., arXiv:2208.04482; DeepLight, W. Deng et al., arXiv:2002.06987; AutoSrh, S. Kong et al.,
arXiv:2208.06399. Differs from them: buckets of frequency stand for fields; searches take the first half of the steps,
and what they find is trained on, from the values there are; AutoDim's widths mix by softmax alone (no Gumbel noise);
OptEmbed's evolution scores a mask on one batch; nothing is pruned to a share of its own but to the budget.

Shape letters: M rows, N width, B buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pennyweight.embeddings.table import SPREAD, Compressor, Judge, Table
from pennyweight.errors import BudgetError
from pennyweight.weights import Cost, Dense, LowRank, Sparse, Stacked, Transposed, Weight

#: Of the steps, before a search or a pruning ends.
_AFTER = 0.5


class Narrow(Compressor):
    """Every row of one smaller width, behind one projection: what the same bytes buy the plain way."""

    kind = "intra"

    def start(self) -> Weight:
        rows, width = self.table.rows, self.table.width
        least = self.fitting(lambda d: self.table.value_bytes * d * (rows + width), 1, width, "a width of")
        return LowRank(
            self.table.drawn(self.generator, width=least),
            torch.randn(least, width, generator=self.generator) / least**0.5,
        )


def widths_within(table: Table, wanted: Sequence[float], budget: int) -> list[int]:
    """Widths from 1 for the buckets of ``table``, in proportion to ``wanted``, within ``budget`` bytes.

    Raises:
        BudgetError: a width of 1 is too much already.
    """
    sizes, width = table.sizes(), table.width

    def at(factor: float) -> list[int]:
        return [min(width, max(1, int(factor * share))) for share in wanted]

    def size(widths: Sequence[int]) -> int:
        return sum(table.value_bytes * _entries(rows, d, width) for rows, d in zip(sizes, widths, strict=True))

    if size(at(0)) > budget:
        raise BudgetError(
            f"embeddings: {budget} bytes for {sum(sizes)} rows: a width of 1 in all buckets takes {size(at(0))} already"
        )
    low, high = 0.0, 2.0 * width / min(wanted)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= budget else (low, middle)
    return at(low)


def _entries(rows: int, d: int, width: int) -> int:
    """Numbers that hold ``rows`` rows of width ``d``, projected to ``width`` unless they are that wide."""
    return rows * d + (d * width if d < width else 0)


class Mde(Compressor):
    """Buckets of rows in widths that fall with their frequency, each behind a projection."""

    kind = "intra"
    #: Widths are in proportion to this power of how often a row is looked up.
    POWER = 0.3

    def start(self) -> Weight:
        sizes = self.table.sizes()
        means = [float(part.double().mean()) for part in torch.split(self.table.counts, sizes)]
        wanted = [max(mean, 1e-9) ** self.POWER for mean in means]
        widths = widths_within(self.table, wanted, self.budget)
        return Stacked(*(_bucket(self.table, rows, d, self.generator) for rows, d in zip(sizes, widths, strict=True)))

    def nearest(self, matrix: Tensor) -> Weight:
        pieces = torch.split(matrix, self.table.sizes())
        terms = [term for _, term in self.weight.named_parts()]
        return Stacked(
            *(
                Dense(piece.clone()) if isinstance(term, Dense) else LowRank.nearest(piece, _rank(term))
                for piece, term in zip(pieces, terms, strict=True)
            )
        )


def _bucket(table: Table, rows: int, d: int, generator: torch.Generator) -> Weight:
    """Rows of width ``d``, behind a projection where that is less than the table's."""
    if d == table.width:
        return Dense(table.drawn(generator, rows))
    down = torch.randn(d, table.width, generator=generator) / d**0.5
    return LowRank(table.drawn(generator, rows, d), down)


def _rank(weight: Weight) -> int:
    assert isinstance(weight, LowRank)
    return min(weight.up.shape)


class _Mixed(Weight):
    """A sum of tables of several widths for each bucket, weighted by what is being learned; never saved.

    Args:
        tables: of each width, for each bucket.
    """

    def __init__(self, tables: Sequence[Sequence[Weight]]) -> None:
        stacks = [Stacked(*column) for column in zip(*tables, strict=True)]  # one a width
        super().__init__(shape=stacks[0].shape)
        self.stacks = nn.ModuleList(stacks)
        self.choice = nn.Parameter(torch.zeros(len(tables), len(stacks)))
        rows = torch.tensor([bucket[0].shape[0] for bucket in tables])
        self.register_buffer("bucket", torch.repeat_interleave(torch.arange(len(tables)), rows))

    def rows(self, index: Tensor) -> Tensor:
        share = self.choice.softmax(1)[self.bucket[index]]  # type: ignore[index]
        found = [
            stack.rows(index) * share[..., n, None]  # type: ignore[operator]
            for n, stack in enumerate(self.stacks)
        ]
        return torch.stack(found).sum(0)

    def dense(self) -> Tensor:
        return self.rows(torch.arange(self.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T

    @property
    def T(self) -> Weight:
        return Transposed(self)

    def cost(self) -> Cost:
        return Cost(sum(p.numel() for p in self.parameters()))


class AutoDim(Compressor):
    """Widths of buckets learned: tables of several widths are mixed, and the best of them trained on."""

    kind = "intra"

    def start(self) -> Weight:
        width = self.table.width
        self._sizes = self.table.sizes()
        widths_within(self.table, [1.0] * len(self._sizes), self.budget)  # or no choice can fit
        self._widths = sorted({1, *(width // part for part in (8, 4, 2, 1) if width >= part)})
        return _Mixed([[_bucket(self.table, rows, d, self.generator) for d in self._widths] for rows in self._sizes])

    def step(self, through: float, judge: Judge) -> bool:
        if through < _AFTER or not isinstance(self.weight, _Mixed):
            return False
        mixed = self.weight
        share = mixed.choice.detach().softmax(1)
        wanted = (share * torch.tensor(self._widths, dtype=share.dtype)).sum(1)
        fitting = widths_within(self.table, wanted.tolist(), self.budget)
        terms = []
        for bucket, most in enumerate(fitting):
            which = max(n for n, d in enumerate(self._widths) if d <= most)
            stack = mixed.stacks[which]
            assert isinstance(stack, Stacked)
            terms.append(stack.terms[bucket])
        self.weight = Stacked(*terms)  # type: ignore[arg-type]
        return True


class _Masked(Weight):
    """A matrix times a mask; never saved."""

    mask: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(shape=(matrix.shape[0], matrix.shape[1]))
        self.matrix = nn.Parameter(matrix)
        self.register_buffer("mask", torch.ones_like(matrix, dtype=torch.bool))

    def rows(self, index: Tensor) -> Tensor:
        return self.matrix[index] * self.mask[index]

    def dense(self) -> Tensor:
        return self.matrix * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T

    @property
    def T(self) -> Weight:
        return Transposed(self)

    def cost(self) -> Cost:
        return Cost(int(self.mask.sum()))


class DeepLight(Compressor):
    """Entries pruned by size, more and more of them, until what is left fits."""

    kind = "intra"

    def start(self) -> Weight:
        self._kept = self.fitting(self.most, 1, self.table.rows * self.table.width, "entries:")
        return _Masked(self.table.drawn(self.generator))

    def nearest(self, matrix: Tensor) -> Weight:
        self.weight = _Masked(matrix.clone())
        self.keep_largest(self._kept)
        return self.finish()

    def most(self, kept: int) -> int:
        """Bytes of ``kept`` entries at most: their values and a bit for every place."""
        return self.table.value_bytes * kept + -(-self.table.rows * self.table.width // 8)

    def step(self, through: float, judge: Judge) -> bool:
        weight = self.weight
        assert isinstance(weight, _Masked)
        total = weight.matrix.numel()
        # the cubic of gradual pruning
        left = 1 - (1 - self._kept / total) * (1 - max(0.0, 1 - through / _AFTER) ** 3)
        if through <= _AFTER + 1e-9 or int(weight.mask.sum()) > self._kept:
            self.keep_largest(max(self._kept, int(left * total)))
        return False

    @torch.no_grad()
    def keep_largest(self, count: int) -> None:
        """Mask all but ``count`` entries."""
        weight = self.weight
        assert isinstance(weight, _Masked)
        size = (weight.matrix.abs() * weight.mask).flatten()
        mask = torch.zeros_like(size, dtype=torch.bool)
        mask[size.topk(min(count, len(size))).indices] = True
        weight.mask.copy_(mask.view_as(weight.mask))

    def finish(self) -> Weight:
        weight = self.weight
        assert isinstance(weight, _Masked)
        return Sparse.keep(weight.dense().detach(), weight.mask)


class OptEmbed(DeepLight):
    """Rows that matter little pruned by learned thresholds, and widths of buckets found by evolution."""

    #: Sizes of the evolution.
    POPULATION, GENERATIONS = 8, 4

    def start(self) -> Weight:
        made = super().start()
        self._sizes = self.table.sizes()
        self._threshold = nn.Parameter(torch.full((len(self._sizes),), -3.0))
        self._done = False
        return made

    def parameters(self) -> list[nn.Parameter]:
        return [*super().parameters(), *([] if self._done else [self._threshold])]

    def penalty(self) -> Tensor | float:
        if self._done:
            return 0.0
        # thresholds rise by themselves, and fall where rows under them are missed: a row's size stands for that
        size = self._norms()
        limit = torch.repeat_interleave(self._threshold.exp(), torch.tensor(self._sizes))
        missed = (torch.sigmoid((size.detach() - limit) / SPREAD) * size.detach()).mean()
        return 1e-3 * (-self._threshold).exp().mean() - 1e-2 * missed

    def _norms(self) -> Tensor:
        weight = self.weight
        assert isinstance(weight, _Masked)
        return weight.matrix.abs().mean(1)

    @torch.no_grad()
    def step(self, through: float, judge: Judge) -> bool:
        if through < _AFTER or self._done:
            return False
        weight = self.weight
        assert isinstance(weight, _Masked)
        limit = torch.repeat_interleave(self._threshold.exp(), torch.tensor(self._sizes))
        alive = self._norms() >= limit
        # the smallest rows go until a width of 1 fits
        order = self._norms().masked_fill(~alive, -1).argsort(descending=True)
        alive[order[self._kept :]] = False
        ends = [0, *torch.tensor(self._sizes).cumsum(0).tolist()]
        rows = [int(alive[start:stop].sum()) for start, stop in pairwise(ends)]
        weight.mask.copy_(self._mask(alive, ends, self._evolved(rows, alive, ends, judge)))
        self._done = True
        return True

    def _mask(self, alive: Tensor, ends: Sequence[int], widths: Sequence[int]) -> Tensor:
        mask = torch.zeros(self.table.rows, self.table.width, dtype=torch.bool)
        for (start, stop), width in zip(pairwise(ends), widths, strict=True):
            mask[start:stop, :width] = alive[start:stop, None]
        return mask

    def _evolved(self, rows: Sequence[int], alive: Tensor, ends: Sequence[int], judge: Judge) -> list[int]:
        """Widths of buckets, mutated and chosen by the loss of a batch; all of them fit."""
        weight = self.weight
        assert isinstance(weight, _Masked)

        def draw(near: Sequence[int] | None) -> list[int]:
            change = torch.randint(-2, 3, (len(rows),), generator=self.generator).tolist()
            free = torch.randint(1, self.table.width + 1, (len(rows),), generator=self.generator).tolist()
            found = [min(self.table.width, max(1, w + c)) for w, c in zip(near, change, strict=True)] if near else free
            while sum(r * w for r, w in zip(rows, found, strict=True)) > self._kept:
                widest = max(range(len(rows)), key=lambda n: (found[n] > 1) * rows[n] * found[n])
                found[widest] -= 1
            return found

        def loss(widths: Sequence[int]) -> float:
            weight.mask.copy_(self._mask(alive, ends, widths))
            return judge(weight)

        pool = [(loss(widths), widths) for widths in (draw(None) for _ in range(self.POPULATION))]
        for _ in range(self.GENERATIONS):
            best = sorted(pool)[: self.POPULATION // 2]
            pool = best + [(loss(child), child) for child in (draw(parent) for _, parent in best)]
        return min(pool)[1]


class AutoSrh(DeepLight):
    """Gates for each bucket and column, shrunk by their own penalty; the weakest columns of buckets go."""

    def start(self) -> Weight:
        made = super().start()
        self._sizes = self.table.sizes()
        self._gates = nn.Parameter(torch.ones(len(self._sizes), self.table.width))
        self._gated = _Gated(made, self._gates, self._sizes)
        self._done = False
        return self._gated

    def penalty(self) -> Tensor | float:
        return 0.0 if self._done else 1e-3 * self._gates.abs().mean()

    @torch.no_grad()
    def step(self, through: float, judge: Judge) -> bool:
        if through < _AFTER or self._done:
            return False
        inner = self._gated.inner
        assert isinstance(inner, _Masked)
        inner.matrix.mul_(torch.repeat_interleave(self._gates, torch.tensor(self._sizes), dim=0))
        order = self._gates.abs().flatten().argsort(descending=True)
        mask = torch.zeros_like(self._gates, dtype=torch.bool)
        room = self._kept
        for place in order.tolist():
            bucket, column = divmod(place, self.table.width)
            if self._sizes[bucket] <= room:
                mask[bucket, column] = True
                room -= self._sizes[bucket]
        self.weight = inner
        inner.mask.copy_(torch.repeat_interleave(mask, torch.tensor(self._sizes), dim=0))
        if not mask.any():
            raise BudgetError(f"embeddings: {self.budget} bytes hold no column of any bucket of {self._sizes} rows")
        self._done = True
        return True


class _Gated(Weight):
    """A matrix whose columns are multiplied by the gates of each row's bucket; never saved."""

    bucket: Tensor

    def __init__(self, inner: Weight, gates: nn.Parameter, sizes: Sequence[int]) -> None:
        super().__init__(shape=inner.shape)
        self.inner, self.gates = inner, gates
        self.register_buffer("bucket", torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes))))

    def rows(self, index: Tensor) -> Tensor:
        return self.inner.rows(index) * self.gates[self.bucket[index]]

    def dense(self) -> Tensor:
        return self.inner.dense() * self.gates[self.bucket]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T

    @property
    def T(self) -> Weight:
        return Transposed(self)

    def cost(self) -> Cost:
        return self.inner.cost()
