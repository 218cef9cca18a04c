"""What a model is for, as a fit measures it: a score a window, and what a ratio, a floor and a damage mean for it.

A task scores *harm*, larger is worse: the loss in nats for language models, one minus the cosine to the original's
embedding for encoders. Predicted damage is in the same unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.embedding import cosines, embed_windows
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.measure.stats import Interval, Verdict, below, bootstrap, non_inferiority, paired_ratio
from pennyweight.model.model import Model
from pennyweight.units import Floor

Report = Callable[[int, int], None]


class Task(Protocol):
    """How one kind of model is scored."""

    @property
    def metric(self) -> str:
        """The metric floors speak of."""

    @property
    def title(self) -> str:
        """What a report calls the figure."""

    @property
    def unit(self) -> str:
        """Of the figure; empty for a bare number."""

    def scores(self, module: nn.Module, ids: Tensor, *, exact: bool, report: Report | None = None) -> Tensor:
        """(W, ...) what `harm` compares: of the module on windows (W, T)."""

    def harm(self, before: Tensor, after: Tensor) -> Tensor:
        """(W,) harm of each window, from the scores of the original and of the changed model."""

    def figure(self, scores: Tensor) -> float | None:
        """The figure of one model alone; None where it only compares."""

    def effect(self, before: Tensor, after: Tensor) -> Interval:
        """The harm as people read it (a ratio of perplexities, a mean cosine), with its paired interval."""

    def effect_of(self, harm: float) -> float:
        """Mean harm as people read it."""

    def check(self, floor: Floor) -> None:
        """OptionError where ``floor`` is on another metric."""

    def harm_of(self, floor: Floor, before: Tensor) -> float:
        """The mean harm that ``floor`` just allows."""

    def judge(self, floor: Floor, before: Tensor, after: Tensor) -> Verdict:
        """The one-sided test of ``floor``."""


@dataclass(frozen=True)
class LanguageModeling:
    """Perplexity of a causal language model."""

    metric: str = "perplexity"
    title: str = "perplexity on held-out text"
    unit: str = ""

    def scores(self, module: nn.Module, ids: Tensor, *, exact: bool, report: Report | None = None) -> Tensor:
        return token_losses(module, ids, dtype=None if exact else torch.bfloat16, report=report).mean(1)

    def harm(self, before: Tensor, after: Tensor) -> Tensor:
        return after - before

    def figure(self, scores: Tensor) -> float | None:
        return math.exp(float(scores.double().mean()))

    def effect(self, before: Tensor, after: Tensor) -> Interval:
        return paired_ratio(before, after)

    def effect_of(self, harm: float) -> float:
        return math.exp(harm)

    def check(self, floor: Floor) -> None:
        if floor.metric not in ("perplexity", "loss"):
            raise OptionError(f"floor {floor}: a language model is fitted against perplexity; give {Floor.example()}")

    def harm_of(self, floor: Floor, before: Tensor) -> float:
        figure = math.exp(float(before.double().mean()))
        if floor.metric == "loss":
            return floor.limit_for(math.log(figure)) - math.log(figure)
        return math.log(floor.limit_for(figure) / figure)

    def judge(self, floor: Floor, before: Tensor, after: Tensor) -> Verdict:
        return non_inferiority(before, after, math.exp(self.harm_of(floor, before)))


@dataclass(frozen=True)
class Embedding:
    """Sentence embeddings of an encoder: mean over tokens, length one, compared with the original's by cosine."""

    metric: str = "cosine"
    title: str = "mean cosine to the original's embeddings"
    unit: str = ""

    def scores(self, module: nn.Module, ids: Tensor, *, exact: bool, report: Report | None = None) -> Tensor:
        return embed_windows(module, ids, dtype=None if exact else torch.bfloat16, report=report)

    def harm(self, before: Tensor, after: Tensor) -> Tensor:
        return 1 - cosines(before, after)

    def figure(self, scores: Tensor) -> float | None:
        return None

    def effect(self, before: Tensor, after: Tensor) -> Interval:
        return bootstrap(cosines(before, after))

    def effect_of(self, harm: float) -> float:
        return 1 - harm

    def check(self, floor: Floor) -> None:
        if floor.metric != "cosine":
            raise OptionError(f"floor {floor}: an encoder is fitted against its own embeddings; give cosine>=0.99")

    def harm_of(self, floor: Floor, before: Tensor) -> float:
        return 1 - floor.bound

    def judge(self, floor: Floor, before: Tensor, after: Tensor) -> Verdict:
        return below(self.harm(before, after), self.harm_of(floor, before))


def task_of(model: Model) -> Task:
    """The task of ``model`` by its kind.

    Raises:
        ModelError: a kind that `fit` cannot judge by itself.
    """
    if model.kind == "causal-lm":
        return LanguageModeling()
    if model.kind == "encoder":
        return Embedding()
    raise ModelError(
        f"{model.name}: fit judges causal language models and encoders, not a {model.kind}; apply a recipe instead "
        "(`pennyweight apply`)"
    )
