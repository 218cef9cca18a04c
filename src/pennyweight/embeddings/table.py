"""What every way to make a table small has in common.

Row 114. Source: H. Zhang et al., "Experimental Analysis of Large-scale Learnable Vector Storage Compression",
arXiv:2311.15578, and its code (Hsword/Hetu): fourteen methods under equal budgets of memory. Differs from the source:
each method is written anew on `pennyweight.weights`, in its plainest form; rows are numbered by falling frequency, so
that no method stores which rows are frequent; buckets of frequency stand for the fields of a table.

Shape letters: M rows, N width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pennyweight.errors import BudgetError, OptionError
from pennyweight.weights import Weight

#: Deviation of values that a table starts from.
SPREAD = 0.1
#: Loss in nats of the model with a table in place of its own.
Judge = Callable[[Weight], float]


def NO_JUDGE(weight: Weight) -> float:
    """For tables that are made small without a model."""
    return 0.0


@dataclass(frozen=True)
class Table:
    """What is to be made small.

    Attributes:
        counts: (M,) how often each row is looked up, falling.
        width: N.
        buckets: rows are parted into so many buckets of equal use at most.
        value_bytes: of a floating value.
    """

    counts: Tensor
    width: int
    buckets: int = 6
    value_bytes: int = 4

    def __post_init__(self) -> None:
        if self.counts.ndim != 1 or not len(self.counts) or bool((self.counts.diff() > 0).any()) or self.width < 1:
            raise OptionError(
                f"embeddings: counts {tuple(self.counts.shape)} for a width of {self.width}; number rows by falling "
                "frequency, and give at least one"
            )

    @property
    def rows(self) -> int:
        """M."""
        return len(self.counts)

    @property
    def bytes(self) -> int:
        """Of the table itself."""
        return self.value_bytes * self.rows * self.width

    def sizes(self) -> list[int]:
        """Rows of each bucket: rows in order, each bucket looked up about as often as the others."""
        share = self.counts.double().clamp_min(1e-9).cumsum(0)
        edges = torch.searchsorted(share, share[-1] * torch.arange(1, self.buckets) / self.buckets) + 1
        cut = sorted({0, self.rows, *(min(int(edge), self.rows) for edge in edges)})
        return [stop - start for start, stop in pairwise(cut)]

    def drawn(self, generator: torch.Generator, rows: int | None = None, width: int | None = None) -> Tensor:
        """(rows, width) normal values to start from."""
        shape = (self.rows if rows is None else rows, self.width if width is None else width)
        return SPREAD * torch.randn(shape, generator=generator)


class Compressor:
    """A table in training, and what it becomes.

    Whoever trains looks rows up with ``weight.rows``, calls `step` after each step of the optimizer, makes the
    optimizer anew where it says so, and keeps what `finish` gives.

    Args:
        table: to be made small.
        budget_bytes: that what is kept may take.
        generator: of every draw.

    Raises:
        BudgetError: the method has no table that small.
    """

    #: The paper's kinds: rows share values ("inter"), or each becomes smaller ("intra").
    kind = "inter"

    def __init__(self, table: Table, budget_bytes: int, generator: torch.Generator) -> None:
        self.table, self.budget, self.generator = table, budget_bytes, generator
        self.weight = self.start()

    def start(self) -> Weight:
        """The weight that is trained."""
        raise AssertionError("written by each method")

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained now."""
        return list(self.weight.parameters())

    def training_bytes(self) -> int:
        """That training holds of the table now: of what is trained, values, gradients and the two moments of Adam."""
        return 4 * sum(parameter.nbytes for parameter in self.parameters())

    def penalty(self) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def step(self, through: float, judge: Judge) -> bool:
        """Called after each step, ``through`` of 1 of them done; whether the parameters are others from now on."""
        return False

    def finish(self) -> Weight:
        """What is kept: computes what the trained table last did, within the budget."""
        return self.weight

    def nearest(self, matrix: Tensor) -> Weight:
        """The weight of this kind that is near to a trained table (M, N); instead of training.

        Raises:
            OptionError: the method has none, it has to be trained.
        """
        raise OptionError(f"embeddings: {type(self).__name__} has no nearest table; train it from the start")

    def fitting(self, size: Callable[[int], int], least: int, most: int, what: str) -> int:
        """The greatest number from ``least`` to ``most`` whose size in bytes the budget holds; sizes grow with numbers.

        Raises:
            BudgetError: none does.
        """
        if size(least) > self.budget:
            raise BudgetError(
                f"embeddings: {self.budget} bytes for {self.table.rows}x{self.table.width}: {what} {least} takes "
                f"{size(least)} already"
            )
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if size(middle) <= self.budget else (least, middle - 1)
        return least


#: Where each method is: its name, module and class.
METHODS: dict[str, tuple[str, str]] = {
    "compo": ("shared", "Compo"),
    "tt": ("shared", "TensorTrains"),
    "dhe": ("shared", "DeepHashes"),
    "robe": ("shared", "Robe"),
    "adapt": ("shared", "Adapt"),
    "dedup": ("shared", "Dedup"),
    "mgqe": ("rounded", "Mgqe"),
    "int": ("rounded", "Integers"),
    "alpt": ("rounded", "Alpt"),
    "mde": ("sized", "Mde"),
    "autodim": ("sized", "AutoDim"),
    "optembed": ("sized", "OptEmbed"),
    "deeplight": ("sized", "DeepLight"),
    "autosrh": ("sized", "AutoSrh"),
    "hash": ("shared", "Hash"),
    "narrow": ("sized", "Narrow"),
    "dense": ("shared", "Whole"),
}


def compressor(method: str, table: Table, budget_bytes: int, *, seed: int = 0) -> Compressor:
    """The compressor ``method`` for ``table``.

    ``hash``, ``narrow`` and ``dense`` are none of the fourteen but what they are compared with.

    Raises:
        OptionError: no such method.
        BudgetError: it has no table that small.
    """
    if method not in METHODS:
        raise OptionError(f"embeddings: no method is called {method!r}; there are {', '.join(METHODS)}")
    module, name = METHODS[method]
    cls: type[Compressor] = getattr(importlib.import_module(f"pennyweight.embeddings.{module}"), name)
    return cls(table, budget_bytes, torch.Generator().manual_seed(seed))
