"""The contract of a merging formula: what it may read of one tensor, and the rule it makes for its elements.

A formula sees one tensor of all models. It may walk through it first, as often as it needs (for a norm, a threshold),
and hands back a rule from a stretch of all models to the same stretch of the result. Stretches do not depend on how
files are laid out, and so results do not.

Shape letters: E models, n elements of a stretch.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, get_type_hints

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.lever import ANY, _is_a, option

#: Elements of a stretch: those of a few models together stay in the cache of a core.
STRETCH = 1 << 17


@dataclass
class Span:
    """A stretch of one tensor: scratch memory that a rule may overwrite.

    Attributes:
        start: its first element.
        models: (E, n) float32.
        base: (n,) float32; None where there is no base.
    """

    start: int
    models: Tensor
    base: Tensor | None

    def deltas(self) -> tuple[Tensor, Tensor]:
        """The base (n,), and what each model adds to it (E, n), in place of the models."""
        assert self.base is not None  # `Formula.check` saw to it
        self.models -= self.base
        return self.base, self.models


class Stretched(Protocol):
    """One tensor of all models, to be walked through."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def spans(self) -> Iterator[Span]: ...


#: From a stretch of all models to the result's: (n,) float32.
Rule = Callable[[Span], Tensor]


@dataclass(frozen=True, kw_only=True)
class Formula(ABC):
    """How the elements of several models become those of one.

    Raises:
        OptionError: an option outside its range.
    """

    #: whether it needs the model that all were fine-tuned from
    needs_base: ClassVar[bool] = True

    weights: tuple[float, ...] = option((), ANY, "how much each model counts; none: all the same")

    def __post_init__(self) -> None:
        check_options(self, self.title)
        if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in self.weights):
            raise OptionError(f"{self.title}: weights {self.weights}; give numbers")

    @property
    def name(self) -> str:
        """What recipes call it."""
        return re.sub("(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def title(self) -> str:
        """What errors call it."""
        return f"merge {self.name}"

    def check(self, models: int, *, base: bool) -> None:
        """Whether it can merge that many models.

        Raises:
            OptionError: no base where one is needed, or another number of weights.
        """
        if self.needs_base and not base:
            raise OptionError(f"{self.title}: works on differences to a base; give base: the model all came from")
        if not models or (self.weights and len(self.weights) != models):
            raise OptionError(f"{self.title}: {len(self.weights)} weights for {models} models; give one for each")

    def shares(self, models: int) -> list[float]:
        """The weight of each model."""
        return [float(weight) for weight in self.weights] or [1.0] * models

    @abstractmethod
    def prepare(self, tensor: Stretched) -> Rule:
        """The rule for the elements of ``tensor``."""


def check_options(instance: Any, title: str) -> None:
    """Hold the options of a dataclass against their ranges and types, see `lever.option`.

    Raises:
        OptionError: one is outside, or of another type; a list will do for a tuple.
    """
    hints = get_type_hints(type(instance))
    for one in fields(instance):
        if "check" not in one.metadata:
            continue
        check, value = one.metadata["check"], getattr(instance, one.name)
        try:
            fine = bool(check.allows(value))
        except TypeError:
            fine = False
        if not fine:
            raise OptionError(f"{title}: {one.name} = {value!r} is out of range; give {check.words}")
        if not _is_a(tuple(value) if isinstance(value, list) else value, hints[one.name]):
            raise OptionError(f"{title}: {one.name} = {value!r} is a {type(value).__name__}; give {one.type}")


def weighted_sum(parts: Tensor, weights: list[float]) -> Tensor:
    """``sum_e w_e parts_e`` of (E, n): (n,), in place of the first part."""
    total = parts[0] if weights[0] == 1 else parts[0].mul_(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def elected_mean(deltas: Tensor, weights: list[float]) -> Tensor:
    """The mean of those deltas (E, n) whose sign is the sum's, each with its weight: (n,). Overwrites ``deltas``.

    Zeros have no sign, and leave the mean as what was trimmed. Where nothing is left it is 0.
    """
    for delta, weight in zip(deltas, weights, strict=True):
        if weight != 1:
            delta.mul_(weight)
    # floats throughout: an operation that makes or takes a mask costs ten times one that does not
    sign = torch.copysign(torch.ones_like(deltas[0]), deltas.sum(0).add_(0.0))  # a sum of -0 counts as 0
    mean, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        mean.add_(delta.mul_(sign).clamp_(min=0))
        divisor.add_(delta.gt_(0), alpha=weight)
    nothing = deltas[0].copy_(divisor).eq_(0)
    return mean.div_(divisor.add_(nothing)).mul_(sign)
