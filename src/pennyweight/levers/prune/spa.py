"""Structured pruning adapters: the units of a model go while adapters of the frozen rest are trained.

Row 239; sources and what differs in `pennyweight.solvers.structured_adapters`. Units go along a cubic, as in row 196;
what is left is a plain, smaller model, the adapters merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group
from pennyweight.solvers.sparse_tuning import Tuning, linear_maps
from pennyweight.solvers.structured_adapters import Shape, StructuredAdapters
from pennyweight.surgery import trace
from pennyweight.train.sparsity_schedules import Ramp, between_plateaus
from pennyweight.work import Work

_NAME = "prune.spa"


class Narrowing:
    """A callback that prunes the units of adapters along a schedule."""

    def __init__(self, adapters: StructuredAdapters, schedule: Ramp) -> None:
        self.adapters, self.schedule, self.steps = adapters, schedule, 0

    def step(self) -> None:
        """Call after each step of the optimizer."""
        self.steps += 1
        if self.schedule.chooses(self.steps):
            self.adapters.keep(1 - self.schedule.sparsity(self.steps))


@lever(_NAME, reach="model", row=239, paper="Structured Pruning Adapters, arXiv:2211.10155")
@dataclass(frozen=True, kw_only=True)
class SPA(Tuning):
    """Prune hidden units or heads while structured adapters are trained; a smaller plain model is left."""

    kind: Literal["splora", "splopa"] = option("splora", one_of("splora", "splopa"), "low rank, or in blocks")
    sparsity: float = option(0.5, between(0, 1), "share of the units of each block that go")
    units: Literal["ffn", "heads"] = option("ffn", one_of("ffn", "heads"), "what goes")
    rank: int = option(16, at_least(1), "rank of an adapter, or of a prototype")
    prototypes: int = option(64, at_least(1), "prototypes that all layers share")
    block: int = option(8, at_least(1), "side of a prototype")
    before: float = option(0.1, between(0, 1), "share of the steps before the first unit goes")
    after: float = option(0.3, between(0, 1), "share of the steps after the last one went")

    def change(self, model: Model, work: Work) -> None:
        maps, loss = linear_maps(work, _NAME), self.loss(model, _NAME)
        windows = work.text(self.samples)
        graph = trace(model.module, [windows[:2]])
        dimensions = graph.of(self.units)
        shape = Shape(kind=self.kind, rank=self.rank, prototypes=self.prototypes, block=self.block)
        paths = list(dict.fromkeys(one.path for one in maps))
        touched = {f"{path}.weight" for path in paths}
        if any(name not in touched for one in dimensions for name, _ in one.places if name.endswith(".weight")):
            raise OptionError(f"{_NAME}: the step leaves out layers that hold the units of others; select whole blocks")
        adapters = StructuredAdapters(model.module, paths, graph, dimensions, shape, seed=work.seed, where=_NAME)
        ramp = between_plateaus(self.steps, self.sparsity, before=self.before, after=self.after, intervals=10)
        group = Group(adapters.parameters, self.rate)
        self.tune(model, work, [group], loss, stage="spa", callbacks=[Narrowing(adapters, ramp)])
        with torch.no_grad():
            adapters.finish([windows[:2]])
