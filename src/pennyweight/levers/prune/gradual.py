"""Gradual magnitude pruning: sparsity rises along a cubic while a network is trained.

Row 196. Source: M. Zhu and S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", arXiv:1710.01878, equation 1: fast while there is much to spare, ever slower towards the end, so that
training can recover. Differs from the source: masks may also be chosen over all layers at once; momentum and weight
decay move masked weights as little as gradients do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pennyweight.errors import OptionError, ShapeError
from pennyweight.solvers.masks import smallest


@dataclass(frozen=True, kw_only=True)
class CubicSchedule:
    """``s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * d))**3`` for t = t_0, t_0 + d, ..., t_0 + n*d.

    Attributes:
        final: s_f, share of zeros at the end.
        start: t_0, the first step at which weights are masked.
        end: t_0 + n*d, the last one; a whole number of intervals after ``start``.
        every: d, steps between two choices of the masks.
        initial: s_i, share of zeros at ``start``.

    Raises:
        OptionError: shares outside 0 to 1 or falling, or steps that do not divide.
    """

    final: float
    start: int
    end: int
    every: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final <= 1:
            raise OptionError(
                f"gradual pruning from {self.initial} to {self.final}; "
                "give shares of zeros with 0 <= initial <= final <= 1"
            )
        if self.every < 1 or self.start < 0 or self.end <= self.start or (self.end - self.start) % self.every:
            raise OptionError(
                f"gradual pruning from step {self.start} to {self.end} every {self.every}; "
                "give 0 <= start < end, a whole number of intervals apart"
            )

    def sparsity(self, step: int) -> float:
        """Share of zeros while ``step`` is run: 0 before ``start``, constant between two choices and after ``end``."""
        if step < self.start:
            return 0.0
        chosen = min(step, self.end) - (min(step, self.end) - self.start) % self.every
        left = 1 - (chosen - self.start) / (self.end - self.start)
        return self.final + (self.initial - self.final) * left**3

    def chooses(self, step: int) -> bool:
        """Whether masks are chosen anew at ``step``."""
        return self.start <= step <= self.end and (step - self.start) % self.every == 0


class GradualPruning:
    """Masks the weights of some layers in any training loop, after `CubicSchedule`.

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
        self, layers: Iterable[nn.Module], schedule: CubicSchedule, *, scope: Literal["layer", "global"] = "layer"
    ) -> None:
        self.layers, self.schedule, self.scope = list(layers), schedule, scope
        weights = [getattr(layer, "weight", None) for layer in self.layers]
        if not weights or not all(isinstance(weight, nn.Parameter) for weight in weights):
            raise ShapeError(
                "gradual pruning: give at least one layer, each with a weight of its own, such as nn.Linear"
            )
        if len({id(weight) for weight in weights}) != len(weights):
            raise ShapeError("gradual pruning: two of the layers share a weight; give one of them")
        if scope not in ("layer", "global"):
            raise OptionError(f"gradual pruning: scope {scope!r}; give layer or global")
        self.steps = 0
        self._masked = [_Masked(layer.weight) for layer in self.layers]  # type: ignore[arg-type]
        for layer, masked in zip(self.layers, self._masked, strict=True):
            parametrize.register_parametrization(layer, "weight", masked)
        self._choose_if_due()

    def step(self) -> None:
        """Call once after each step of the optimizer."""
        for weight, masked in zip(self._weights(), self._masked, strict=True):
            masked.restore(weight)
        self.steps += 1
        self._choose_if_due()

    @property
    def sparsity(self) -> float:
        """Share of zeros in all the layers now."""
        kept = sum(int(masked.mask.sum()) for masked in self._masked)
        return 1 - kept / sum(masked.mask.numel() for masked in self._masked)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs beside the state of the layers, which holds the masks."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps = state["steps"]

    def finish(self) -> None:
        """Write the zeros into the weights and leave plain layers behind."""
        for layer in self.layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)

    def _weights(self) -> list[nn.Parameter]:
        return [layer.parametrizations.weight.original for layer in self.layers]  # type: ignore[union-attr,misc]

    @torch.no_grad()
    def _choose_if_due(self) -> None:
        if not self.schedule.chooses(self.steps):
            return
        sparsity = self.schedule.sparsity(self.steps)
        sizes = [weight.detach().abs().flatten() for weight in self._weights()]
        if self.scope == "global":
            together = smallest(torch.cat(sizes), round(sparsity * sum(size.numel() for size in sizes)))
            pruned = list(torch.split(together, [size.numel() for size in sizes]))
        else:
            pruned = [smallest(size, round(sparsity * size.numel())) for size in sizes]
        for masked, weight, mask in zip(self._masked, self._weights(), pruned, strict=True):
            masked.choose(weight, ~mask.view_as(weight))


class _Masked(nn.Module):
    """The parametrization ``weight * mask``; the gradient is masked with it."""

    mask: Tensor
    held: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("held", weight.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def choose(self, weight: Tensor, mask: Tensor) -> None:
        self.mask.copy_(mask)
        self.held.copy_(weight)

    @torch.no_grad()
    def restore(self, weight: Tensor) -> None:
        # momentum and weight decay move parameters without a gradient
        weight.copy_(torch.where(self.mask, weight, self.held))
