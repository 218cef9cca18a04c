"""Averages of models, and of what they add to a base.

Row 95. Source: M. Wortsman et al., "Model soups", arXiv:2203.05482; G. Ilharco et al., "Editing Models with Task
Arithmetic", arXiv:2212.04089, as compared by P. Yadav et al., "What Matters for Model Merging at Scale?",
arXiv:2410.03617. Differs from the sources: sums are in float32 whatever the dtype of the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.lever import ANY, option
from pennyweight.merge.formula import Formula, Rule, Span, Stretched, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Linear(Formula):
    """``sum_e w_e m_e``, the weights made to sum to 1 unless told otherwise."""

    needs_base: ClassVar[bool] = False

    normalize: bool = option(True, ANY, "divide by the sum of the weights")

    def check(self, models: int, *, base: bool) -> None:
        super().check(models, base=base)
        _check_sum(self, models)

    def prepare(self, tensor: Stretched) -> Rule:
        def rule(span: Span) -> Tensor:
            shares = self.shares(len(span.models))
            total = sum(shares) if self.normalize else 1.0
            return weighted_sum(span.models, [share / total for share in shares])

        return rule


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Formula):
    """``base + scale * sum_e w_e (m_e - base)``; with scale 1/E the plain average."""

    scale: float = option(1.0, ANY, "of the sum of differences")
    normalize: bool = option(False, ANY, "divide by the sum of the weights")

    def check(self, models: int, *, base: bool) -> None:
        super().check(models, base=base)
        _check_sum(self, models)

    def prepare(self, tensor: Stretched) -> Rule:
        def rule(span: Span) -> Tensor:
            base, deltas = span.deltas()
            shares = self.shares(len(deltas))
            scale = self.scale / (sum(shares) if self.normalize else 1.0)
            return weighted_sum(deltas, shares).mul_(scale).add_(base)

        return rule


def _check_sum(formula: Linear | TaskArithmetic, models: int) -> None:
    shares = formula.shares(models)
    # 0.1 + 0.2 - 0.3 is 6e-17 in floats
    if formula.normalize and abs(sum(shares)) <= 1e-9 * sum(map(abs, shares)):
        raise OptionError(f"{formula.title}: weights {formula.weights} sum to 0; set normalize: false")
