"""Merges that need the models in memory, and text to run them on: fusion by transport, and learned coefficients.

What they do lies in `transport` (row 71) and `expert` (row 10); here are their options, as recipes give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pennyweight import data
from pennyweight.errors import OptionError
from pennyweight.lever import ANY, Check, at_least, between, one_of, option
from pennyweight.merge.expert import importance_chunks, merge_experts
from pennyweight.merge.formula import check_options
from pennyweight.merge.transport import fuse
from pennyweight.model.model import Model

_POSITIVE = Check("above 0", lambda value: value > 0)


@dataclass(frozen=True, kw_only=True)
class Transport:
    """The first model carried over to the second by optimal transport, then averaged; see `transport.fuse`."""

    alpha: float = option(0.5, between(0, 1), "share of the second model; 0 is the first in the second's shape")
    solver: Literal["emd", "sinkhorn"] = option("emd", one_of("emd", "sinkhorn"), "exact or soft matching")
    regularization: float = option(0.08, _POSITIVE, "of Sinkhorn, for costs of at most 1")
    text: str = option("wiki", ANY, "what both run on")
    windows: int = option(8, at_least(1), "windows of it")
    length: int = option(128, at_least(2), "tokens of a window")
    seed: int = option(0, at_least(0), "of the draw")

    def __post_init__(self) -> None:
        check_options(self, "merge transport")

    def check(self, models: int, *, base: bool) -> None:
        """Whether it can merge that many models.

        Raises:
            OptionError: not two, or a base.
        """
        if models != 2 or base:
            raise OptionError(f"merge transport: {models} models{' and a base' * base}; give two models and no base")

    def into(self, models: Sequence[Model], base: Model | None) -> Model:
        """The second model, its parameters changed."""
        one, two = models
        seen = text_of(two, self.text, self.windows, self.length, self.seed)
        fused = fuse(
            one.module, two.module, seen, alpha=self.alpha, solver=self.solver, regularization=self.regularization
        )
        return _with(two, dict(fused.named_parameters()))


@dataclass(frozen=True, kw_only=True)
class Expert:
    """Coefficients a tensor, learned so that the merge behaves like each expert on its text; see `expert`."""

    texts: tuple[str, ...] = option((), ANY, "a text for each expert, in order")
    initial: float = option(0.1, Check("above 0, below 1", lambda value: 0 < value < 1), "value of the coefficients")
    rate: float = option(0.5, _POSITIVE, "of the optimizer, in logits")
    epochs: int = option(1, at_least(1), "passes over the samples")
    batch: int = option(1, at_least(1), "windows of each text a step")
    temperature: float = option(1.0, _POSITIVE, "of the soft labels")
    hidden_weight: float = option(0.1, at_least(0), "of the error of hidden states")
    regularization: float = option(0.1, at_least(0), "of the distance to the initial value")
    chunks: float = option(0.0, at_least(0), "coefficients a tensor in the ++ stage, on average; 0 for no such stage")
    samples: int = option(5, at_least(1), "windows of each text")
    length: int = option(128, at_least(2), "tokens of a window")
    seed: int = option(0, at_least(0), "of the draw")

    def __post_init__(self) -> None:
        check_options(self, "merge expert")

    def check(self, models: int, *, base: bool) -> None:
        """Whether it can merge that many models.

        Raises:
            OptionError: no base, or not one text a model.
        """
        if not base or len(self.texts) != models:
            texts = f"{len(self.texts)} texts for {models} models"
            raise OptionError(f"merge expert: {texts}; give a base, and a text for each")

    def into(self, models: Sequence[Model], base: Model | None) -> Model:
        """The base, its parameters changed."""
        assert base is not None  # `check` saw to it
        experts = [model.module for model in models]
        samples = [text_of(base, text, self.samples, self.length, self.seed) for text in self.texts]
        count = len(list(base.module.named_parameters()))
        chunks: dict[str, int] | None = None
        for _ in range(2 if self.chunks else 1):
            learned = merge_experts(
                base.module, experts, samples, initial=self.initial, rate=self.rate, epochs=self.epochs,
                batch=self.batch, chunks=chunks, temperature=self.temperature,
                hidden_weight=self.hidden_weight, regularization=self.regularization,
            )  # fmt: skip
            if chunks is None and self.chunks:
                chunks = importance_chunks(base.module, experts, learned, budget=int(self.chunks * count))
        return _with(base, learned.tensors)


def text_of(model: Model, text: str, count: int, length: int, seed: int) -> Tensor:
    """Windows (W, T) of a text in the tokens of ``model``."""
    return data.windows(text, model.tokenizer, part="calibration", length=length, count=count, seed=seed)


def _with(model: Model, tensors: dict[str, Tensor]) -> Model:
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            parameter.copy_(tensors[name])
    return model
