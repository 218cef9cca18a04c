"""OTA merging: each element averaged by the curvature its own fine-tuning saw, with Fast Fisher Grafting before it.

Row 96. Source: P. Mahdavi et al., "Harnessing Optimization Dynamics for Curvature-Informed Model Merging",
arXiv:2509.11167, and its code: ``P = (v^power + eps) * mask``, ``base + sum P (m - base) / sum P``; the mask keeps the
edits with the largest ``v (m - base)^2`` of their tensor. Differs from the source: the threshold is found for a density
in each tensor; an element whose edits are all masked falls back to the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.lever import ANY, Check, at_least, between, option
from pennyweight.merge.formula import Formula, Rule, Span, Stretched
from pennyweight.merge.sources import Source
from pennyweight.merge.ties import nth_largest, trim


@dataclass(frozen=True, kw_only=True)
class OTA(Formula):
    """``base + sum_e w_e P_e (m_e - base) / sum_e w_e P_e``; `ffg` of one model alone is its graft on the base."""

    needs_base: ClassVar[bool] = True

    power: float = option(0.5, at_least(0), "of the second moment: 0.5 is Adam's own preconditioner, 1 the Fisher")
    eps: float = option(1e-24, Check("above 0", lambda value: value > 0), "added to the powers, to weigh what has none")
    density: float = option(1.0, between(0, 1), "share of each model's edits that is grafted, by v * edit^2; 1 for all")
    normalize: bool = option(False, ANY, "divide each model's second moments by their mean in the tensor")
    moments: tuple[Source, ...] = field(default=(), repr=False, compare=False)

    def check(self, models: int, *, base: bool) -> None:
        super().check(models, base=base)
        if len(self.moments) != models:
            raise OptionError(f"{self.title}: {len(self.moments)} sets of second moments for {models} models; give all")

    def prepare(self, tensor: Stretched) -> Rule:
        for source in self.moments:
            found = source.kinds().get(tensor.name)
            if found is None or found[1] != tensor.shape:
                raise OptionError(f"{self.title}: {source.label} has no second moments of {tensor.name} {tensor.shape}")
        count = prod(tensor.shape)
        means = torch.ones(len(self.moments))
        if self.normalize:
            sums = torch.zeros(len(self.moments), dtype=torch.float64)
            for span in tensor.spans():
                sums += self._curvature(tensor.name, span).double().sum(1)
            means = (sums / count).float().clamp(min=self.eps)

        def scores() -> Iterator[Tensor]:
            for span in tensor.spans():
                _, deltas = span.deltas()
                yield _score(deltas, self._curvature(tensor.name, span))

        least = nth_largest(scores, max(1, int(self.density * count))) if self.density < 1 else None

        def rule(span: Span) -> Tensor:
            base, deltas = span.deltas()
            curvature = self._curvature(tensor.name, span)
            weights = (curvature / means[:, None]).pow_(self.power).add_(self.eps)
            weights *= torch.tensor(self.shares(len(deltas)))[:, None]
            if least is not None:
                trim(weights, _score(deltas, curvature), least)
            total = weights.sum(0)
            # the shares first: products of weights near 1e-24 and edits would leave float32
            weights /= total.masked_fill(total == 0, 1)
            return (weights * deltas).sum(0).add_(base)

        return rule

    def _curvature(self, name: str, span: Span) -> Tensor:  # (E, n)
        found = torch.empty_like(span.models)
        for source, row in zip(self.moments, found, strict=True):
            source.read(name, span.start, row)
        return found


def ffg(moments: Source, *, density: float = 0.4) -> OTA:
    """Fast Fisher Grafting of one model: its ``density`` most valuable edits on the base, the rest taken back."""
    return OTA(moments=(moments,), density=density)


def _score(deltas: Tensor, curvature: Tensor) -> Tensor:
    # the root of v * edit^2, which has the same order: v near 1e-19 times a squared edit would leave float32
    return curvature.sqrt().mul_(deltas.abs())
