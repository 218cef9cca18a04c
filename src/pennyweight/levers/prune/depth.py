"""Depth pruning: the run of blocks that turns the stream least goes.

Row 93. Source: V. Thangarasa et al., "Self-Data Distillation for Recovering Quality in Pruned Large Language Models",
arXiv:2410.09982: blocks chosen by the angular distance between what goes into block l and into block l + n, at the
last token (after A. Gromov et al., arXiv:2403.17887). What makes good for them is `pennyweight.train.self_data`.
Differs from the source: block influence and blocks that are no run, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import OptionError
from pennyweight.lever import at_least, lever, one_of, option
from pennyweight.model.model import Model
from pennyweight.solvers.depth import Metric, redundant, streams
from pennyweight.surgery import remove_blocks
from pennyweight.surgery.probe import probe
from pennyweight.work import Work


@lever(
    "prune.depth",
    reach="model",
    row=93,
    paper="Self-Data Distillation for Recovering Quality in Pruned Large Language Models, arXiv:2410.09982",
)
@dataclass(frozen=True, kw_only=True)
class Depth:
    """Take whole blocks out, those that change what passes through them least."""

    blocks: int = option(1, at_least(0), "how many go")
    metric: str = option("angular", one_of("angular", "influence"), "how a change is measured")
    contiguous: bool = option(True, one_of(True, False), "one run of blocks, or the least ones wherever they are")

    def change(self, model: Model, work: Work) -> None:
        if not self.blocks:
            return
        inputs = inputs_of(model, work.inputs("prune.depth"))
        found = streams(model.module, inputs)
        if self.blocks >= len(found) - 1:
            raise OptionError(f"prune.depth: {self.blocks} of {len(found) - 1} blocks; leave at least one")
        metric: Metric = "angular" if self.metric == "angular" else "influence"
        gone = redundant(found, self.blocks, metric=metric, contiguous=self.contiguous)
        remove_blocks(model.module, gone, probe(inputs))
