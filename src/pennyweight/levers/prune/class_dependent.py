"""Pruning in rounds that protects one class of a classifier, down to the sparsest network that shows its floor.

Row 16. Source: R. Entezari and O. Saukh, "Class-dependent Compression of Deep Neural Networks", arXiv:1909.10364; the
method and what differs from the source are told in `pennyweight.train.class_dependent`, which this runs on labelled
inputs. The rounds start from the model as it is. Of two logits the second is of the class to protect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import DataError, OptionError, ShapeError
from pennyweight.evaluate.forward import first_tensor
from pennyweight.lever import ANY, at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.masks import DTYPES, sparse
from pennyweight.train.class_dependent import ClassLoss, class_dependent
from pennyweight.work import Work

_NAME = "prune.class_dependent"


class LogOdds(nn.Module):
    """The log odds (B,) of class 1 that ``module`` gives: its one logit, or the second minus the first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        logits = first_tensor(self.module(x))
        if logits.ndim > 2 or (logits.ndim == 2 and logits.shape[1] > 2):
            raise ShapeError(f"{_NAME}: outputs {tuple(logits.shape)}; give a classifier of two classes: (B, 1 or 2)")
        return logits[:, 1] - logits[:, 0] if logits.ndim == 2 and logits.shape[1] == 2 else logits.flatten()


@lever(
    _NAME,
    reach="model",
    row=16,
    paper="Class-dependent Compression of Deep Neural Networks, arXiv:1909.10364",
)
@dataclass(frozen=True, kw_only=True)
class ClassDependent:
    """Prune and train in rounds so that one class is missed seldom; keep the sparsest network that shows its floor."""

    labels: str = option("labels", ANY, "name of the input that is 1 for samples of the class, 0 for the others")
    importance: float = option(4.0, at_least(1e-9), "weight of samples of the class")
    ranking: float = option(0.5, at_least(0), "weight of the penalty on those that rank below one of the others")
    floor: float = option(0.0, between(0, 1), "recall of the class that held-out samples have to show at 95 %")
    heldout: float = option(0.3, between(0.01, 0.99), "share of the samples that is held out to judge by")
    rounds: int = option(5, at_least(0), "of pruning")
    per_round: float = option(0.5, between(0.01, 0.99), "share of what is left in each matrix that goes in a round")
    criterion: str = option("increase", one_of("increase", "magnitude"), "what goes: grown least, or smallest")
    steps: int = option(300, at_least(1), "of training, in each round")
    rewind: int = option(30, at_least(0), "the step to whose weights survivors go back")
    batch: int = option(64, at_least(1), "samples a step")
    rate: float = option(0.01, at_least(0), "learning rate of SGD")
    dtype: str = option("float32", one_of(*DTYPES), "what the kept values are stored in")

    def change(self, model: Model, work: Work) -> None:
        """Prune the selected maps, and train everything.

        Raises:
            DataError: inputs without labels of 0 and 1, or none held out of one class.
            OptionError: no round whose recall is shown to hold the floor.
        """
        x, labels = self._samples(model, work)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(work.seed))
        held, seen = order.tensor_split([round(self.heldout * len(order))])
        wrapped, known = LogOdds(model.module), {one.path for one in work.maps}
        tickets = class_dependent(
            wrapped, (x[seen], labels[seen]), (x[held], labels[held]),
            loss=ClassLoss(importance=self.importance, ranking=self.ranking), floors={1: self.floor},
            rounds=self.rounds, per_round=self.per_round, steps=self.steps,
            criterion=self.criterion,  # type: ignore[arg-type]  # one of its choices
            rewind=self.rewind, batch=min(self.batch, len(seen)), rate=self.rate, seed=work.seed,
            paths={f"module.{path}" for path in known},
            report=lambda done, _: work.report("pruning in rounds", done + 1, self.rounds + 1),
        )  # fmt: skip
        holding = [ticket for ticket in tickets if ticket.held]
        if not holding:
            best = max(tickets, key=lambda ticket: ticket.lower[1])
            raise OptionError(
                f"{_NAME}: no round is shown to recall {self.floor:.1%} of the class; the best shows "
                f"{best.lower[1]:.1%} at {best.sparsity:.0%} zeros; lower the floor, raise importance, or hold "
                "out more samples"
            )
        wrapped.load_state_dict(holding[-1].module.state_dict())
        for one in work.maps:
            matrix = anatomy.matrix(model.module, one).detach()
            if bool((matrix == 0).any()):
                anatomy.replace(model.module, one.path, sparse(matrix, matrix == 0, None, self.dtype))

    def _samples(self, model: Model, work: Work) -> tuple[Tensor, Tensor]:
        windows = work.inputs(_NAME)
        named = inputs_of(model, windows)
        others = [name for name in named if name != self.labels] if isinstance(named, Mapping) else []
        if not isinstance(named, Mapping) or self.labels not in named or len(others) != 1:
            there = ", ".join(named) if isinstance(named, Mapping) else "one tensor"
            raise DataError(f"{_NAME}: inputs {there}; give one input and {self.labels!r}, by name")
        labels = named[self.labels]
        if not set(labels.flatten().tolist()) <= {0, 1} or labels.ndim != 1:
            raise DataError(f"{_NAME}: {self.labels} of shape {tuple(labels.shape)}; give (samples,) of 0 and 1")
        return named[others[0]], labels
