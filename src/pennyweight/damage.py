"""Predicted damage of a compact weight, and what a lever may say of its candidates before they are solved.

Damage of a change D of a matrix is the K-FAC form ``0.5 sum_i g_i (D H D^T)_ii`` in nats a token: H the second moment
of the inputs, g the mean squared gradient of the outputs (one where it was not measured).

Source: J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
arXiv:1503.05671 (the form). Differs from the source: the output factor is its diagonal.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pennyweight.statistics import Statistics
from pennyweight.weights import Cost, Dense, Weight


@dataclass(frozen=True)
class Prediction:
    """What a candidate is expected to cost and to do.

    Attributes:
        lever: the lever with its options; None keeps the matrix as it is.
        cost: of the whole matrix.
        damage: in nats a token.
        extra: costs beyond ``cost``, in the whole units of `pennyweight.plan.probes`.
    """

    lever: Any
    cost: Cost
    damage: float
    extra: Mapping[str, int] = field(default_factory=dict)

    @property
    def costs(self) -> dict[str, int]:
        """Every cost by resource."""
        return {"bytes": self.cost.bytes, "params": self.cost.params, "flops": self.cost.flops, **self.extra}


@runtime_checkable
class Predicts(Protocol):
    """A lever class that predicts many of its settings in one go."""

    @classmethod
    def predict(cls, settings: Sequence[Any], weight: Weight, statistics: Statistics) -> list[Prediction]:
        """One prediction for each of ``settings``, in their order."""


def damage(difference: Tensor, statistics: Statistics) -> float:
    """K-FAC damage in nats a token of adding ``difference`` (M, N) to a matrix."""
    d = difference.detach().float()
    moved = d @ statistics.second_moment if statistics.second_moment is not None else d
    per_row = (moved * d).sum(1).double().clamp_min(0)
    return 0.5 * float(per_row.sum() if statistics.gradient is None else per_row @ statistics.gradient.double())


def by_solving(settings: Sequence[Any], weight: Weight, statistics: Statistics) -> list[Prediction]:
    """Predictions of ``settings`` by solving each on the whole matrix, for levers of which some rows say nothing."""
    found = []
    for setting in settings:
        solved = setting.solve(weight, statistics)
        found.append(Prediction(setting, solved.cost(), damage(solved.dense() - weight.dense(), statistics)))
    return found


def sample(weight: Weight, statistics: Statistics, rows: int, seed: int) -> tuple[Weight, Statistics]:
    """``rows`` random rows of ``weight`` with their statistics; everything when there are no more than that."""
    matrix = weight.dense().detach()
    if rows >= matrix.shape[0]:
        return weight, statistics
    picked = torch.randperm(matrix.shape[0], generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    gradient = None if statistics.gradient is None else statistics.gradient[picked]
    return Dense(matrix[picked].clone()), replace(statistics, gradient=gradient)
