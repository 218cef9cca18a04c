"""Ensembles of causal language models, and students taught by them.

Row 21. Source: K. Kim et al., "Pre-training under infinite compute", arXiv:2509.14786: members differ by seed alone,
p is proportional to exp(mean log p), and a student keeps most of the gain. The loss of the average of logits is the
mean loss of the members plus log Z, Z = sum_v exp(mean log p_v) <= 1: never above their mean. Averaging probabilities
is another thing, and here for comparison. Differs from the source: the student sees the ensemble's whole distribution
on given text, where the source trains on text the ensemble wrote.

Shape letters: B windows, T tokens, V vocabulary, K members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import OptionError
from pennyweight.train.loop import Trainer
from pennyweight.train.samples import Batch, Stream
from pennyweight.train.schedules import cosine

How = Literal["logit_avg", "prob_avg"]


class Ensemble(nn.Module):
    """Log probabilities (B, T, V) of K members together: a causal language model like each of them."""

    def __init__(self, members: Sequence[nn.Module], how: How = "logit_avg") -> None:
        if not members or how not in ("logit_avg", "prob_avg"):
            raise OptionError(
                f"ensemble: {len(members)} models, how = {how!r}; give at least one, logit_avg or prob_avg"
            )
        super().__init__()
        self.members, self.how = nn.ModuleList(members), how

    def forward(self, ids: Tensor) -> Tensor:
        """Of token ids (B, T)."""
        found = []
        for member in self.members:
            output = member(ids)
            logits = output if isinstance(output, Tensor) else output.logits
            found.append(logits.float().log_softmax(-1))
        stacked = torch.stack(found)
        if self.how == "prob_avg":
            return stacked.logsumexp(0) - math.log(len(found))
        return stacked.mean(0).log_softmax(-1)


def ensemble(models: Sequence[nn.Module], how: How = "logit_avg") -> Ensemble:
    """The models as one. ``logit_avg`` averages log probabilities (the same as logits), ``prob_avg`` probabilities.

    Raises:
        OptionError: no models, or an unknown way.
    """
    return Ensemble([one if isinstance(one, nn.Module) else one.module for one in models], how)


def from_ensemble(
    teacher: nn.Module | Sequence[nn.Module],
    student: nn.Module,
    stream: Stream,
    *,
    steps: int,
    batch: int,
    peak: float = 3e-3,
    warmup: int = 50,
    hard: float = 0.0,
) -> list[float]:
    """Train ``student`` in place on what ``teacher`` expects; the loss of every step.

    Args:
        teacher: a model, or members of a ``logit_avg`` ensemble.
        student: of the same vocabulary.
        stream: of windows (B, T).
        steps: of training.
        batch: windows a step.
        peak: rate of the cosine.
        warmup: of them.
        hard: weight of the text's own next tokens, 0 to 1.
    """
    if not 0 <= hard <= 1:
        raise OptionError(f"from_ensemble: hard = {hard}; give 0 to 1")
    whole = teacher if isinstance(teacher, nn.Module) else ensemble(teacher)
    whole.eval()

    def loss(module: nn.Module, part: Batch) -> Tensor:
        ids = part[0]
        with torch.no_grad():
            expected = whole(ids[:, :-1])
            expected = expected if isinstance(expected, Tensor) else expected.logits
            target = expected.float().softmax(-1)
        output = module(ids[:, :-1])
        logits = (output if isinstance(output, Tensor) else output.logits).float()
        soft = -(target * logits.log_softmax(-1)).sum(-1).mean()
        if not hard:
            return soft
        return (1 - hard) * soft + hard * functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    trainer = Trainer(
        student,
        torch.optim.AdamW(student.parameters(), weight_decay=0.0),
        stream,
        batch=batch,
        loss=loss,
        schedule=cosine(steps, warmup, peak=peak, floor=0.0),
        clip=1.0,
    )
    return trainer.run(steps)
