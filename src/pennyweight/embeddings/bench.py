"""Every way to make a table small, trained on one task under one budget: quality, bytes, look-ups, memory of training.

Row 114; see `pennyweight.embeddings.table`. The task is labelled bags of ids: words of short texts, or what a person
clicked. The model: the mean of a bag's rows, a hidden layer, a class.

Shape letters: C bags, L ids of a bag, M rows, N width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.embeddings.table import METHODS, Compressor, Table, compressor
from pennyweight.errors import BudgetError, OptionError, ShapeError
from pennyweight.measure import latency
from pennyweight.weights import Weight, stored_bytes

UseCase = Literal["quality", "lookup", "training"]
#: Methods within so much of the best quality are as good as it.
TIE = 0.005
#: Ids of a timed look-up.
_LOOKED_UP = 1024


@dataclass(frozen=True)
class Bags:
    """Labelled bags of ids.

    Attributes:
        ids: (C, L), -1 where a bag is shorter; row 0 is the most frequent id.
        labels: (C,) 0 or 1.
        held_ids, held_labels: to judge by.
        rows: M, ids there are.
    """

    ids: Tensor
    labels: Tensor
    held_ids: Tensor
    held_labels: Tensor
    rows: int

    def table(self, width: int) -> Table:
        """What is to be made small, as often looked up as in training."""
        counts = torch.bincount(self.ids[self.ids >= 0], minlength=self.rows)
        if bool((counts.diff() > 0).any()):
            raise ShapeError("embeddings: ids are not numbered by falling frequency; renumber them")
        return Table(counts, width)


@dataclass(frozen=True)
class Result:
    """What a method did under a budget.

    Attributes:
        method: its name.
        budget: as a share of the table in 32 bits.
        auc: area under the curve on held-out bags.
        bytes: of what is kept, as a file holds it.
        lookup_ms: to look 1,024 rows up.
        training_bytes: that training held of the table at the most, see `Compressor.training_bytes`.
        why: it was not trained; empty for one that was.
    """

    method: str
    budget: float
    auc: float = 0.0
    bytes: int = 0
    lookup_ms: float = 0.0
    training_bytes: int = 0
    why: str = ""


class _Head(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.hidden, self.last = nn.Linear(width, 32), nn.Linear(32, 1)
        with torch.no_grad():
            for layer in (self.hidden, self.last):
                layer.weight.normal_(0, layer.weight.shape[1] ** -0.5, generator=g)
                layer.bias.zero_()

    def forward(self, weight: Weight, ids: Tensor) -> Tensor:
        """(C,) log-odds."""
        there = (ids >= 0).float()[..., None]
        mean = (weight.rows(ids.clamp_min(0)) * there).sum(1) / there.sum(1).clamp_min(1)
        found: Tensor = self.last(functional.relu(self.hidden(10 * mean)))[:, 0]  # rows start small
        return found


def auc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a positive is scored above a negative, ties counting half."""
    order = np.argsort(scores.numpy(), kind="stable")
    sorted_ = scores.numpy()[order]
    _, first, count = np.unique(sorted_, return_index=True, return_counts=True)
    ranks = np.repeat(first + (count + 1) / 2, count)
    positive = labels.numpy()[order] == 1
    ups, downs = int(positive.sum()), int((~positive).sum())
    if not ups or not downs:
        raise OptionError("embeddings: held-out labels are of one class; give both")
    return float((ranks[positive].sum() - ups * (ups + 1) / 2) / (ups * downs))


def train(made: Compressor, bags: Bags, *, steps: int, batch: int = 128, rate: float = 3e-3, seed: int = 0) -> _Head:
    """Train a head and the table of ``made``; the head. The table is then ``made.finish()``."""
    head, g = _Head(made.table.width, seed), torch.Generator().manual_seed(seed + 1)

    def loss(weight: Weight, which: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(head(weight, bags.ids[which]), bags.labels[which].float())

    def fresh() -> torch.optim.Optimizer:
        return torch.optim.Adam([*made.parameters(), *head.parameters()], lr=rate)

    optimizer = fresh()
    for done in range(1, steps + 1):
        which = torch.randint(len(bags.ids), (batch,), generator=g)
        (loss(made.weight, which) + made.penalty()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        def judge(weight: Weight, which: Tensor = which) -> float:
            with torch.no_grad():
                return float(loss(weight, which))

        if made.step(done / steps, judge):
            optimizer = fresh()
    return head


def run(method: str, bags: Bags, budget: float, *, width: int = 16, steps: int = 300, seed: int = 0) -> Result:
    """Train one method under ``budget``, a share of the table in 32 bits, and measure it."""
    table = bags.table(width)
    limit = table.bytes if method == "dense" else int(budget * table.bytes)
    try:
        made = compressor(method, table, limit, seed=seed)
        held = [made.training_bytes()]
        head = train(made, bags, steps=steps, seed=seed)
    except BudgetError as error:
        return Result(method, budget, why=str(error))
    held.append(made.training_bytes())
    kept = made.finish()
    size = stored_bytes(kept)
    assert size == kept.cost().bytes, method
    if size > limit:
        return Result(method, budget, bytes=size, why=f"takes {size} bytes of {limit}")
    ids = torch.randint(table.rows, (_LOOKED_UP,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        score = auc(head(kept, bags.held_ids), bags.held_labels)
        timed = latency.time(lambda: kept.rows(ids), repeats=5)
    return Result(method, budget, score, size, timed.milliseconds, max(held))


def bench(
    bags: Bags,
    *,
    budgets: Sequence[float] = (0.5, 0.1, 0.02),
    methods: Sequence[str] | None = None,
    width: int = 16,
    steps: int = 300,
    seed: int = 0,
    report: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Every method under every budget; those that cannot be so small say why.

    Args:
        bags: the task.
        budgets: as shares of the table in 32 bits.
        methods: out of `METHODS`; None for the fourteen.
        width: N.
        steps: of training, for each.
        seed: of every draw.
        report: called with each result.
    """
    found = []
    for budget in budgets:
        for method in FOURTEEN if methods is None else methods:
            found.append(run(method, bags, budget, width=width, steps=steps, seed=seed))
            if report is not None:
                report(found[-1])
    return found


#: The methods of the study.
FOURTEEN = tuple(name for name in METHODS if name not in ("hash", "narrow", "dense"))


def recommend(results: Sequence[Result], use_case: UseCase, *, budget: float) -> Result:
    """What to take under ``budget``, of methods as good as the best (within `TIE`).

    Args:
        results: as `bench` gives them.
        use_case: "quality": the best; "lookup": the fastest of the good ones; "training": the one that trains in the
            least memory.
        budget: one of those in ``results``.

    Raises:
        OptionError: an unknown use case, or no method that was trained under that budget.
    """
    there = [one for one in results if one.budget == budget and not one.why]
    if use_case not in get_args(UseCase) or not there:
        raise OptionError(
            f"embeddings: use case {use_case!r} under {budget}: {len(there)} methods were trained; give quality, "
            "lookup or training, and a budget of the results"
        )
    good = [one for one in there if one.auc >= max(one.auc for one in there) - TIE]
    keys: dict[str, Callable[[Result], float]] = {
        "quality": lambda one: -one.auc,
        "lookup": lambda one: one.lookup_ms,
        "training": lambda one: one.training_bytes,
    }
    return min(good, key=keys[use_case])


def report(results: Sequence[Result]) -> str:
    """What `bench` found as tab-separated lines, and what to take for each use under each budget."""
    lines = ["budget\tmethod\tquality (AUC)\tbytes\tlook-up of 1,024, ms\tbytes in training\twhy not"]
    for one in results:
        figures = (f"{one.auc:.4f}", f"{one.bytes:,}", f"{one.lookup_ms:.3f}", f"{one.training_bytes:,}")
        lines.append("\t".join([f"{one.budget:.3g}", one.method, *(("",) * 4 if one.why else figures), one.why]))
    for budget in dict.fromkeys(one.budget for one in results):
        try:
            uses = [f"{use}: {recommend(results, use, budget=budget).method}" for use in get_args(UseCase)]
        except OptionError:
            uses = ["nothing fits"]
        lines.append(f"take at {budget:.3g}, for {', for '.join(uses)}")
    return "\n".join(lines)
