"""What a fit would do, before hours of it: every stage run on a slice, its cost and quality, time, memory and disk.

The statistics of the slice price the plan, so the predicted quality is rougher than that of the fit itself; the times
are those of the slice, scaled by what each stage is linear in.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pennyweight.finish import continuations
from pennyweight.job import Job, Settings, standing_in
from pennyweight.journal import Journal
from pennyweight.model import bf16_bytes
from pennyweight.plan.rounds import Prices
from pennyweight.plan.slots import slots_of
from pennyweight.units import base, show_bytes, show_seconds, whole

_SLICE = Settings(length=128, statistics=4, gradients=2, check=2, heldout=2)
_SLOTS = 8  # solved for timing, spread over the model


@dataclass(frozen=True)
class StageEstimate:
    """What one stage of the fit will take."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a fit is expected to need and to give.

    Attributes:
        stages: seconds each.
        bytes: predicted size of the files; None where the budget does not bind it.
        cost: every predicted cost.
        metric: what ``quality`` is.
        quality: predicted, as people read it (a perplexity ratio, a mean cosine).
        peak_bytes: predicted peak memory.
        disk_bytes: predicted size of journal and results together.
        picked: label -> how many slots take it, most first.
    """

    stages: tuple[StageEstimate, ...]
    bytes: int
    cost: dict[str, float]
    metric: str
    quality: float
    peak_bytes: int
    disk_bytes: int
    picked: dict[str, int]

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        lines = [
            f"files      {self.bytes:,} bytes ({show_bytes(self.bytes)}), predicted",
            f"{self.metric:<10} {self.quality:.4f}, predicted from a slice of the text",
            *(f"{name:<10} {value:,}" for name, value in self.cost.items() if name != "bytes"),
            f"time       {show_seconds(self.seconds)}: "
            + ", ".join(f"{stage.name} {show_seconds(stage.seconds)}" for stage in self.stages),
            f"memory     {show_bytes(self.peak_bytes)} at the peak",
            f"disk       {show_bytes(self.disk_bytes)}, journal and results",
            "levers     " + ", ".join(f"{name} in {count} maps" for name, count in self.picked.items()),
        ]
        return "\n".join(lines)


def estimate(job: Job) -> Estimate:
    """A smoke pass of every stage of ``job`` on a slice, and what it says of the full.

    Raises:
        BudgetError: what is asked cannot be met by any plan, as the fit itself would say after its statistics.
    """
    from pennyweight.fit import first_plan  # the two need each other: a fit offers its dry run

    full = job.settings
    with TemporaryDirectory() as folder:
        small = replace(job, settings=replace(_SLICE, seed=full.seed), journal=Journal(Path(folder)), steps=[])
        statistics = small.statistics()
        slots = slots_of(small.model.anatomy, statistics)
        before = small.scores("baseline", "original", small.model.module, small.check, exact=False)
        offers = small.offers(slots)
        ceiling = None if job.floor is None or job.budgets else job.task.harm_of(job.floor, before)
        prices, allowed = first_plan(small, slots, offers, bf16_bytes(job.model))
        room = {name: whole(name, limit) for name, limit in allowed.items()}
        plan = Prices(fixed=prices.fixed).plan(slots, offers, room, ceiling)
        tried = slots[:: max(1, len(slots) // _SLOTS)]
        began = time.perf_counter()
        weights = small.solve(tried, plan)
        solving = (time.perf_counter() - began) / sum(s.map.shape[0] * s.map.shape[1] ** 1.5 for s in tried)
        began = time.perf_counter()
        with standing_in(small.model.module, tried, weights):
            small.scores("measuring", "slice", small.model.module, small.heldout, exact=True)
        exact = (time.perf_counter() - began) / small.heldout.numel()
        began = time.perf_counter()
        continuations(small.model, count=1)
        sampling = 6 * (time.perf_counter() - began)
    took = {step.name: step.seconds for step in small.steps}
    rough = took["baseline"] / small.check.numel()
    tokens = full.length * full.statistics

    stages = (
        # the backward passes are a quarter of the text at twice the price, as in the slice
        StageEstimate("statistics", took["statistics"] * tokens / (_SLICE.length * _SLICE.statistics)),
        StageEstimate("predictions", took["predictions"]),
        StageEstimate(
            "solving, two rounds", 1.3 * solving * sum(s.map.shape[0] * s.map.shape[1] ** 1.5 for s in slots)
        ),
        StageEstimate("checking plans", 5 * rough * full.length * full.check),
        StageEstimate("measuring, held out", 2 * exact * full.length * full.heldout),
        StageEstimate("samples", sampling),
    )
    inside = sum(s.map.shape[0] * s.map.shape[1] for s in slots)
    widest = sum({s.map.input_group: s.map.shape[1] ** 2 for s in slots}.values())
    size = plan.choice.cost["bytes"]
    picked: dict[str, int] = {}
    for offer in plan.picked.values():
        name = "as it is" if offer.lever is None else str(offer.lever.lever_name)
        picked[name] = picked.get(name, 0) + 1
    return Estimate(
        stages=stages,
        bytes=size,
        cost={name: base(name, value) for name, value in plan.choice.cost.items()},
        metric=job.task.metric,
        quality=job.task.effect_of(plan.choice.damage),
        # codes in memory, the dense stand-ins, and the activations of longer windows on top of what the slice needed
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + inside + 4 * inside + 4 * widest,
        disk_bytes=4 * widest + 3 * size,
        picked=dict(sorted(picked.items(), key=lambda item: -item[1])),
    )
