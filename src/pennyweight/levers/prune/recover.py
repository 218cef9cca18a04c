"""Recovery after structured pruning: what is left learns what the model expected before the recipe changed it.

Source: S. Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", arXiv:2407.14679; what
is done, and what differs, is told in `pennyweight.solvers.recovery`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, option
from pennyweight.model.model import Model
from pennyweight.solvers.recovery import recover, states_of
from pennyweight.work import Work


@lever(
    "prune.recover",
    reach="model",
    paper="Compact Language Models via Pruning and Knowledge Distillation, arXiv:2407.14679",
)
@dataclass(frozen=True, kw_only=True)
class Recover:
    """Train a language model, after steps that shrank it, towards the one that the recipe began with."""

    steps: int = option(200, at_least(1), "of the optimizer")
    batch: int = option(2, at_least(1), "windows a step")
    windows: int = option(256, at_least(1), "calibration windows to train on")
    rate: float = option(3e-4, at_least(0), "learning rate at its peak")
    warmup: float = option(0.1, between(0, 1), "share of the steps in which the rate rises")

    def change(self, model: Model, work: Work) -> None:
        """Train all but the embedding and the head.

        Raises:
            OptionError: outside of a recipe, where nobody knows the original; or one of another width.
            ModelError: no language model with a plain head.
        """
        if work.original is None:
            raise OptionError("prune.recover: needs the model as it was before; run it as a step of a recipe")
        text = work.text(self.windows)
        recover(
            model.module, text, states_of(work.original.module, text), steps=self.steps, batch=self.batch,
            rate=self.rate, warmup=self.warmup, seed=work.seed,
            report=lambda done, total: work.report("recovering", done, total),
        )  # fmt: skip
