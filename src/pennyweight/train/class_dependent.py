"""Pruning that protects one class: the compressed network misses few of its samples.

Row 16. Source: R. Entezari and O. Saukh, "Class-dependent Compression of Deep Neural Networks", arXiv:1909.10364:
rounds of training, pruning in each tensor what grew least since an early step, and going back to that step; the loss
weighs the class, and punishes samples of it that rank below the hardest of the others. Differs from the source: its
published code detaches the scores before the ranking term and multiplies it by 0, so that it trains without it; here
the term has its gradient, and the hardest score is taken among the others alone. Biases are not pruned; gradients
are clipped, without which training may diverge. The network to keep is the sparsest whose recalls hold floors, by an
exact test.

Two classes: labels are 0 or 1 (the class to protect), a network gives one logit a sample.

Shape letters: B samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import beta
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import DataError, OptionError
from pennyweight.solvers.masks import Selection
from pennyweight.train.loop import Trainer
from pennyweight.train.masked import Masks
from pennyweight.train.samples import Batch, Samples

Criterion = Literal["increase", "magnitude"]
_LEVEL = 0.95
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True, kw_only=True)
class ClassLoss:
    """Cross-entropy that weighs class 1, and a penalty on samples of it that rank below one of class 0.

    Attributes:
        importance: weight of samples of class 1.
        ranking: of the penalty; 0 for none.
        combined: "sum": cross-entropy + ranking * penalty; "product": cross-entropy * (1 + ranking * penalty).

    With importance 1 and ranking 0 plain cross-entropy, to the bit.

    Raises:
        OptionError: a weight that is not positive, or a negative penalty.
    """

    importance: float = 1.0
    ranking: float = 0.0
    combined: Literal["sum", "product"] = "sum"

    def __post_init__(self) -> None:
        if not self.importance > 0 or self.ranking < 0 or self.combined not in ("sum", "product"):
            raise OptionError(f"{self}: give importance above 0, ranking of 0 or more, combined sum or product")

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        logits = module(batch[0]).flatten()
        labels = batch[1].to(logits.dtype)
        weight = None if self.importance == 1 else logits.new_tensor(self.importance)
        loss = functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
        if not self.ranking:
            return loss
        penalty = self.ranking * ranking_penalty(logits, labels)
        return loss + penalty if self.combined == "sum" else loss * (1 + penalty)


def ranking_penalty(scores: Tensor, labels: Tensor) -> Tensor:
    """``sum over i of class 1 of min(0, s_i - max_j s_j)^2 / (their number + 1)``, j over class 0: a bound on 1 - AUC.

    Args:
        scores: (B,).
        labels: (B,) 0 or 1; without samples of both classes the penalty is 0.
    """
    ours, others = scores[labels > 0], scores[labels <= 0]
    if not len(ours) or not len(others):
        return scores.sum() * 0
    return (ours - others.max()).clamp(max=0).square().sum() / (len(ours) + 1)


@dataclass(frozen=True)
class Ticket:
    """The network after a round.

    Attributes:
        sparsity: share of zeros in its matrices.
        module: trained, with the zeros written in.
        recall: by class, on held-out samples.
        lower: by class, the one-sided 95 % lower limit of its recall.
        auc: area under the curve of recall over false alarms.
        held: whether every floor is shown to hold.
    """

    sparsity: float
    module: nn.Module
    recall: tuple[float, float]
    lower: tuple[float, float]
    auc: float
    held: bool


def class_dependent(
    module: nn.Module,
    data: tuple[Tensor, Tensor],
    heldout: tuple[Tensor, Tensor],
    *,
    loss: ClassLoss | None = None,
    floors: Mapping[int, float] | None = None,
    rounds: int = 5,
    per_round: float = 0.5,
    criterion: Criterion = "increase",
    steps: int = 300,
    rewind: int = 30,
    batch: int = 64,
    rate: float = 1e-3,
    momentum: float = 0.9,
    clip: float | None = 1.0,
    seed: int = 0,
    paths: Collection[str] | None = None,
    report: Callable[[int, float], None] | None = None,
) -> list[Ticket]:
    """Train, prune and go back in rounds; the network after each, the whole one first.

        tickets = class_dependent(net, train, test, loss=ClassLoss(importance=4, ranking=1), floors={1: 0.97})
        smallest = [ticket for ticket in tickets if ticket.held][-1]

    Args:
        module: at its initial weights; not changed.
        data: samples and (B,) labels to train on.
        heldout: to judge by.
        loss: None for plain cross-entropy.
        floors: by class, the least recall that has to be shown.
        rounds: of pruning.
        per_round: share of what is left in each matrix that goes in a round.
        criterion: what goes: the least increase of ``|w|`` since step ``rewind``, or the least ``|w|``.
        steps: of training up to each ticket, those before ``rewind`` included.
        rewind: the step to whose weights survivors go back.
        batch: samples a step.
        rate: of SGD.
        momentum: of SGD.
        clip: largest norm of the gradient; None for any, as the source has it: the ranking penalty has no bound.
        seed: of the order of samples.
        paths: of the linear layers and convolutions to prune; None for all of them.
        report: called with the rounds done and the sparsity.

    Raises:
        OptionError: numbers out of range, or a floor on another class.
        DataError: held-out samples of one class alone.
    """
    loss, floors = loss or ClassLoss(), dict(floors or {})
    if not 0 < per_round < 1 or rounds < 0 or not 0 <= rewind < steps or criterion not in ("increase", "magnitude"):
        raise OptionError(
            f"class_dependent: rounds {rounds}, per_round {per_round}, rewind {rewind} of {steps} steps, criterion "
            f"{criterion!r}; give a share within 0 to 1, 0 <= rewind < steps, and increase or magnitude"
        )
    if unknown := [name for name in floors if name not in (0, 1)]:
        raise OptionError(f"class_dependent: a floor on class {unknown[0]!r}; there are 0 and 1 (the one to protect)")
    if len(torch.unique(heldout[1])) != 2:
        raise DataError("class_dependent: the held-out samples are of one class; give some of both")
    working = copy.deepcopy(module)
    layers = {name: part for name, part in working.named_modules() if isinstance(part, _LAYERS)}
    masks = Masks([part for name, part in layers.items() if paths is None or name in paths])

    class Keep:
        def step(self) -> None:
            masks.restore()

    def train(start: int, until: int) -> None:
        trainer = Trainer(
            working, torch.optim.SGD(working.parameters(), rate, momentum), Samples(*data, seed=seed), batch=batch,
            loss=loss, clip=clip, callbacks=[Keep()],
        )  # fmt: skip
        trainer.steps, trainer.samples = start, start * batch
        trainer.run(until)

    train(0, rewind)
    early = copy.deepcopy(working.state_dict())
    start = [matrix.clone() for matrix in masks.matrices()]
    tickets = []
    for number in range(rounds + 1):
        if number:
            scores = [
                (end.abs() - (begin.abs() if criterion == "increase" else 0)).masked_fill(~kept, -torch.inf)
                for end, begin, kept in zip(masks.matrices(), start, masks.kept(), strict=True)
            ]
            working.load_state_dict({**early, **{k: v for k, v in working.state_dict().items() if k.endswith(".mask")}})
            masks.choose([_fewer(score, kept, per_round) for score, kept in zip(scores, masks.kept(), strict=True)])
        train(rewind, steps)
        tickets.append(_ticket(module, working, masks, heldout, floors))
        if report is not None:
            report(number, tickets[-1].sparsity)
    return tickets


def _fewer(score: Tensor, kept: Tensor, per_round: float) -> Tensor:
    left = int(kept.sum())
    gone = 1 - (left - int(per_round * left)) / kept.numel()
    return Selection(sparsity=gone, nearest=True).kept([score])[0]


def _ticket(
    module: nn.Module, working: nn.Module, masks: Masks, heldout: tuple[Tensor, Tensor], floors: Mapping[int, float]
) -> Ticket:
    module = copy.deepcopy(module).eval()
    found = {}
    for name in module.state_dict():
        path, _, own = name.rpartition(".")
        found[name] = getattr(working.get_submodule(path), own).detach()  # a masked weight with its zeros
    module.load_state_dict(found)
    with torch.no_grad():
        scores = module(heldout[0]).flatten()
    right, labels = (scores > 0) == (heldout[1] > 0), heldout[1] > 0
    recall, lower = [], []
    for one in (False, True):
        mine = right[labels == one]
        recall.append(float(mine.float().mean()))
        lower.append(_lower(int(mine.sum()), len(mine)))
    held = all(lower[name] >= bound for name, bound in floors.items())
    return Ticket(masks.sparsity, module, (recall[0], recall[1]), (lower[0], lower[1]), auc(scores, labels), held)


def _lower(right: int, count: int) -> float:
    """The one-sided exact lower limit of a share (Clopper and Pearson)."""
    return float(beta.ppf(1 - _LEVEL, right, count - right + 1)) if right else 0.0


def auc(scores: Tensor, labels: Tensor) -> float:
    """Share of pairs of both classes that ``scores`` (B,) order rightly, ties counting half."""
    ours, others = scores[labels > 0], scores[labels <= 0]
    if not len(ours) or not len(others):
        raise DataError("auc: samples of one class alone; give some of both")
    ahead = (ours[:, None] > others).double() + 0.5 * (ours[:, None] == others).double()
    return float(ahead.mean())
