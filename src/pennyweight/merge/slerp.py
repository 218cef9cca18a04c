"""Spherical interpolation of two models, tensor by tensor.

Row 95's neighbor among practitioners. Source: K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985:
equal angles for equal steps between two directions. Differs from the source: each tensor is one long vector, lengths
are interpolated along with directions, and vectors that are nearly parallel, or nearly opposed, are mixed linearly, as
is the custom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.lever import between, option
from pennyweight.merge.formula import Formula, Rule, Span, Stretched, weighted_sum

_PARALLEL = 0.9995  # of the cosine, above which the sine of the angle is too small to divide by; mergekit's value, too


@dataclass(frozen=True, kw_only=True)
class Slerp(Formula):
    """``(sin((1-t) a) m_1 + sin(t a) m_2) / sin(a)``, a the angle between the two tensors."""

    needs_base: ClassVar[bool] = False

    t: float = option(0.5, between(0, 1), "0 is the first model, 1 the second")

    def check(self, models: int, *, base: bool) -> None:
        super().check(models, base=base)
        if models != 2 or self.weights:
            raise OptionError(f"{self.title}: {models} models, {len(self.weights)} weights; give two models and t")

    def prepare(self, tensor: Stretched) -> Rule:
        products = torch.zeros(3, dtype=torch.float64)
        for span in tensor.spans():
            one, two = span.models
            products += torch.stack([one.dot(two), one.dot(one), two.dot(two)]).double()
        dot, first, second = products.tolist()
        first, second = (length if (length := math.sqrt(square)) > 1e-8 else 1.0 for square in (first, second))
        cosine = max(-1.0, min(1.0, dot / first / second))
        weights = [1 - self.t, self.t]
        if abs(cosine) <= _PARALLEL:
            angle = math.acos(cosine)
            weights = [math.sin(share * angle) / math.sin(angle) for share in weights]

        def rule(span: Span) -> Tensor:
            return weighted_sum(span.models, weights)

        return rule
