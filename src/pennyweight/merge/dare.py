"""DARE: drop most of what each model adds at random, and scale up the rest.

Row 95. Source: L. Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", arXiv:2311.03099: delta' = mask * delta / (1 - p), then task arithmetic or TIES. Differs from the source: which
elements are dropped depends on the seed, the model's place, the tensor's name and the element alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pennyweight.lever import ANY, Check, at_least, one_of, option
from pennyweight.merge.formula import Formula, Rule, Span, Stretched, elected_mean, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Dare(Formula):
    """``base + scale * sum_e w_e mask_e (m_e - base) / density``; with ``sign: ties`` the mean of those that agree."""

    density: float = option(0.1, Check("above 0, at most 1", lambda value: 0 < value <= 1), "chance to be kept: 1 - p")
    scale: float = option(1.0, ANY, "of the sum, or of the mean, of differences")
    sign: Literal["none", "ties"] = option("none", one_of("none", "ties"), "whether signs are elected, as TIES does")
    seed: int = option(0, at_least(0), "of the draws")

    def prepare(self, tensor: Stretched) -> Rule:
        def rule(span: Span) -> Tensor:
            base, deltas = span.deltas()
            if self.density < 1:
                for place, delta in enumerate(deltas):
                    delta *= self._mask(place, tensor.name, span.start, len(delta))
                deltas /= self.density
            shares = self.shares(len(deltas))
            mixed = elected_mean(deltas, shares) if self.sign == "ties" else weighted_sum(deltas, shares)
            return mixed.mul_(self.scale).add_(base)

        return rule

    def _mask(self, place: int, name: str, start: int, count: int) -> Tensor:
        # torch's generator reads 32 bits of a seed; hashed, so that stretches and models share no draws
        digest = hashlib.sha256(f"{self.seed} {place} {start} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return torch.empty(count).bernoulli_(self.density, generator=generator)
