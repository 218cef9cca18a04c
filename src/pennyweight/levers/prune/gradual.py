"""Gradual magnitude pruning: sparsity rises along a cubic while a network is trained.

Row 196. Source: M. Zhu and S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", arXiv:1710.01878, equation 1: fast while there is much to spare, ever slower towards the end, so that
training can recover. Differs from the source: masks may also be chosen over all layers at once; momentum and weight
decay move masked weights as little as gradients do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from pennyweight.errors import OptionError
from pennyweight.solvers.masks import Selection
from pennyweight.train.masked import Masks
from pennyweight.train.sparsity_schedules import SparsitySchedule


class GradualPruning:
    """Masks the weights of some layers in any training loop, after a schedule such as `CubicSchedule`.

    While it runs, a layer computes with its weight times the mask; masked entries get no gradient and keep the value
    they had, so that a later choice may take them up again. The optimizer may be made before or after: the parameters
    stay.

        pruning = GradualPruning(layers, CubicSchedule(final=0.9, start=100, end=1000))
        for batch in batches:
            loss(batch).backward(); optimizer.step(); optimizer.zero_grad()
            pruning.step()
        pruning.finish()

    Args:
        layers: modules with a ``weight``; none twice, no weight shared between two.
        schedule: of the share of zeros.
        scope: "layer" zeroes that share of each layer, "global" of all weights together.

    Raises:
        ShapeError: no layer, a layer without weight, or a weight that two layers share.
    """

    def __init__(
        self, layers: Iterable[nn.Module], schedule: SparsitySchedule, *, scope: Literal["layer", "global"] = "layer"
    ) -> None:
        if scope not in ("layer", "global"):
            raise OptionError(f"gradual pruning: scope {scope!r}; give layer or global")
        self.schedule, self.scope = schedule, scope
        self.masks = Masks(layers, where="gradual pruning")
        self.steps = 0
        self._choose_if_due()

    def step(self) -> None:
        """Call once after each step of the optimizer."""
        self.masks.restore()
        self.steps += 1
        self._choose_if_due()

    @property
    def sparsity(self) -> float:
        """Share of zeros in all the layers now."""
        return self.masks.sparsity

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs beside the state of the layers, which holds the masks."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps = state["steps"]

    def finish(self) -> None:
        """Write the zeros into the weights and leave plain layers behind."""
        self.masks.finish()

    def _choose_if_due(self) -> None:
        if self.schedule.chooses(self.steps):
            selection = Selection(
                sparsity=self.schedule.sparsity(self.steps),
                scope="global" if self.scope == "global" else "matrix",
                nearest=True,
            )
            self.masks.choose(selection.kept([matrix.abs() for matrix in self.masks.matrices()]))
