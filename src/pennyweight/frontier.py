"""The whole curve of quality against bytes, from one measurement of sensitivity.

Statistics and predictions are made once; one plan in the middle is solved and measured to set the prices; every other
point is then a knapsack away. Points marked as measured were solved and scored, all others are predicted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pennyweight.errors import BudgetError
from pennyweight.fit import first_plan, measure, solved_cost
from pennyweight.job import Job, Progress, Settings, chosen_levers, quiet
from pennyweight.journal import Journal
from pennyweight.model import bf16_bytes, load
from pennyweight.model.model import Model
from pennyweight.plan.choose import frontier as hull
from pennyweight.plan.slots import slots_of
from pennyweight.safe_write import write_text
from pennyweight.task import task_of

SHARES = (0.5, 0.33, 0.25, 0.2, 0.15, 0.125, 0.1)


@dataclass(frozen=True)
class Point:
    """One point of the curve.

    Attributes:
        bytes: of the files.
        share: of the original's bf16 size.
        effect: as people read it (a perplexity ratio, a mean cosine).
        measured: scored on the check windows, rather than predicted.
    """

    bytes: int
    share: float
    effect: float
    measured: bool


@dataclass(frozen=True)
class Frontier:
    """The curve of one model."""

    model: str
    metric: str
    points: tuple[Point, ...]

    def table(self) -> str:
        """One line a point, dearest first."""
        head = f"{self.model}: {'bytes':>14}  {'share':>6}  {self.metric}"
        rows = [
            f"{'':{len(self.model)}}  {p.bytes:>14,}  {p.share:>6.1%}  {p.effect:.4f}"
            + ("" if p.measured else " (predicted)")
            for p in self.points
        ]
        return "\n".join([head, *rows])

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)


def frontier(
    model: str | Path | torch.nn.Module | Model,
    *,
    data: Any = "wiki",
    levers: str | Sequence[str] | None = None,
    shares: Sequence[float] = SHARES,
    measured: Sequence[float] = (0.25, 0.15),
    out: str | Path | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    progress: Progress = quiet,
) -> Frontier:
    """The curve at ``shares`` of the bf16 size.

    Args:
        model: as for `pennyweight.fit.fit`.
        data: text to calibrate and check on.
        levers: as for `fit`.
        shares: where the curve is read.
        measured: shares that are really solved and scored; the first sets the prices of the others.
        out: a directory for ``frontier.json``.
        seed: of every draw.
        settings: how much text is read.
        progress: called with (stage, done, total).
    """
    loaded = model if isinstance(model, Model) else load(model)
    with TemporaryDirectory() as folder:
        job = Job(
            model=loaded, task=task_of(loaded), data=data, budgets=(), floor=None, cards=chosen_levers(levers, ()),
            settings=settings or Settings(seed=seed), progress=progress, journal=Journal(folder),
        )  # fmt: skip
        reference = bf16_bytes(loaded)
        slots = slots_of(loaded.anatomy, job.statistics())
        before = job.scores("baseline", "original", loaded.module, job.check, exact=False)
        offers = job.offers(slots)
        prices, _ = first_plan(job, slots, offers, reference)
        points = []
        for share in measured:
            plan = prices.plan(slots, offers, {"bytes": int(share * reference)})
            weights = job.solve(slots, plan)
            prices, spent = solved_cost(job, prices, plan, weights, slots)
            harm, prices, _ = measure(job, slots, weights, plan, prices, before)
            points.append(Point(spent["bytes"], spent["bytes"] / reference, job.task.effect_of(harm), True))
        problem = prices.problem(slots, offers)
        curve = hull(problem)
        for share in shares:
            if any(abs(share - known) < 1e-9 for known in measured):
                continue
            fitting = [(size, harm) for size, harm, _ in curve if size <= share * reference]
            if fitting:
                size, harm = fitting[-1]
                points.append(Point(size, size / reference, job.task.effect_of(harm), False))
    if not points:
        raise BudgetError(
            f"{loaded.name}: no plan is as small as {max(shares):.0%}; the smallest is {curve[0][0]:,} bytes"
        )
    found = Frontier(loaded.name, job.task.metric, tuple(sorted(points, key=lambda p: -p.bytes)))
    if out is not None:
        write_text(Path(out) / "frontier.json", found.to_json())
    return found
