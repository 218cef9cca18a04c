"""Plugs for redundant runs of blocks and feed-forwards: one distilled block, or one linear layer, in place of each.

Row 24. Source: "Pluggable Pruning with Contiguous Layer Distillation for Diffusion Transformers" (PPCL),
arXiv:2511.16156; the parts and what differs are told in `pennyweight.solvers.probes` (which runs),
`pennyweight.solvers.projections` (which feed-forwards) and `pennyweight.train.plugs` (the students, and switching them
in and out without this lever). For any stack of blocks on one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import OptionError
from pennyweight.lever import at_least, lever, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.depth import streams
from pennyweight.solvers.probes import Interval, intervals
from pennyweight.solvers.projections import Projection, feed_forwards, projections
from pennyweight.surgery.probe import probe
from pennyweight.train.plugs import Plugs
from pennyweight.work import Work


@lever(
    "prune.ppcl",
    reach="model",
    row=24,
    paper="Pluggable Pruning with Contiguous Layer Distillation for Diffusion Transformers, arXiv:2511.16156",
)
@dataclass(frozen=True, kw_only=True)
class PPCL:
    """Put one distilled block, or one linear layer, in place of what linear probes can follow."""

    runs: int = option(1, at_least(0), "how many runs of blocks at most, those that probes follow best")
    projections: int = option(0, at_least(0), "how many feed-forwards of other blocks become one linear layer, at most")
    steps: int = option(200, at_least(0), "of training, of all students at once")
    rate: float = option(1e-3, at_least(0), "learning rate")
    batch: int = option(8, at_least(1), "windows a step")

    def change(self, model: Model, work: Work) -> None:
        inputs = inputs_of(model, work.inputs("prune.ppcl"))
        found = sorted(intervals(streams(model.module, inputs)), key=lambda one: -one.alignment)[: self.runs]
        parts = self._parts(model.module, inputs, found) if self.projections else []
        if not found and not parts:
            raise OptionError(
                f"prune.ppcl: runs {self.runs}, projections {self.projections}: nothing to replace; ask for a run of a "
                "model of several blocks, or for feed-forwards that are modules of their own"
            )
        plugs = Plugs(model.module, sorted(found, key=lambda one: one.first), parts)
        generator = torch.Generator().manual_seed(work.seed)
        count = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0])

        def batches(step: int) -> Any:
            work.report("distilling", step + 1, self.steps)
            rows = torch.randint(0, count, (self.batch,), generator=generator)
            if isinstance(inputs, Mapping):
                return {name: _rows(one, rows) for name, one in inputs.items()}
            return tuple(_rows(one, rows) for one in inputs)

        plugs.train(batches, steps=self.steps, rate=self.rate)
        plugs.keep(range(len(plugs.students)), probe(inputs))

    def _parts(self, module: nn.Module, inputs: Any, runs: list[Interval]) -> list[Projection]:
        """Feed-forwards outside of ``runs``, those that one linear map follows best."""
        blocks = anatomy.of(module).blocks
        gone = tuple(f"{blocks[index].path}." for one in runs for index in one.blocks)
        paths = [path for path in feed_forwards(module) if not path.startswith(gone)]
        found = sorted(projections(module, inputs, paths), key=lambda one: -one.alignment)[: self.projections]
        return sorted(found, key=lambda one: paths.index(one.path))


def _rows(one: Any, rows: Tensor) -> Any:
    return one[rows] if isinstance(one, Tensor) and one.ndim else one
