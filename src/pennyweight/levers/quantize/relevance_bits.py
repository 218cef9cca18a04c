"""Bits by explanation: layers through which more of the answer passes keep more of them.

Row 56. Source: N. Ranjan and A. Savakis, "LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise
Relevance Propagation", arXiv:2401.11243: the relevance that reaches a layer, averaged over images, is its importance,
and bits follow importance under a mean of bits. The paper's own rule of allocation is not public; here the relevance of
a layer weighs its relative rounding error at each width, and the sum over all layers is the least that the budget
allows (`pennyweight.plan.bits`, an integer program). Differs from the source: that rule; scales and zeros count.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.calibrate.relevance import relevance
from pennyweight.errors import BudgetError, OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.plan.allocation import Allocation, bits
from pennyweight.plan.choose import Offer
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense, Weight
from pennyweight.work import Work


@lever(
    "quantize.lrp",
    reach="model",
    row=56,
    paper="LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance Propagation, "
    "arXiv:2401.11243",
)
@dataclass(frozen=True, kw_only=True)
class RelevanceBits:
    """Give every layer a width by the relevance that passes through it, under a mean of bits."""

    average_bits: float = option(4.5, between(1, 16), "most mean stored bits a weight, scales and zeros included")
    least_bits: int = option(2, between(1, 8), "fewest bits of a layer")
    most_bits: int = option(8, between(1, 8), "most bits of a layer")
    group_size: int | None = option(None, at_least(1), "input features that share a scale; none: the whole row")
    search: int = option(16, at_least(0), "ranges tried for each group; 0: from minimum to maximum")
    rule: str = option("positive", one_of("positive", "plain"), "of relevance; see pennyweight.calibrate.relevance")
    windows: int = option(64, at_least(1), "images or windows whose answers are explained")

    def __post_init__(self) -> None:
        if self.least_bits > self.most_bits:
            raise OptionError(
                f"quantize.lrp: least_bits = {self.least_bits} is above most_bits = {self.most_bits}; exchange them"
            )

    def change(self, model: Model, work: Work) -> None:
        """Round the selected layers, each to the width found for it."""
        scores = self.scores(model, work)
        work.report("relevance", 1, 2)
        self.allocate(model, work.maps, scores)
        work.report("relevance", 2, 2)

    def scores(self, model: Model, work: Work) -> dict[str, float]:
        """The contribution of every layer of the model to its answers on the calibration data.

        Raises:
            OptionError: a selected layer has none (an embedding, a layer that is never called).
        """
        given = work.inputs("quantize.lrp")
        if isinstance(given, Tensor):
            given = given[: self.windows]
        else:
            given = {name: tensor[: self.windows] for name, tensor in given.items()}
        found = relevance(model, given, rule=self.rule).contributions()  # type: ignore[arg-type]
        missing = [one.name for one in work.maps if one.name not in found]
        if missing:
            raise OptionError(f"quantize.lrp: no relevance passes through {missing[0]}; leave it out (where)")
        return found

    def allocate(self, model: Model, maps: tuple[Map, ...], scores: Mapping[str, float]) -> Allocation:
        """Put ``maps`` at the widths of least ``sum scores[l] * relative rounding error`` under the mean of bits.

        Raises:
            BudgetError: a mean of bits below what the fewest bits take.
        """
        matrices = {one.name: anatomy.matrix(model.module, one) for one in maps}
        made: dict[str, list[Weight]] = {}
        offers: dict[str, list[Offer]] = {}
        for name, matrix in matrices.items():
            made[name] = [
                RTN(bits=width, group_size=self.group_size, search=self.search).solve(Dense(matrix), NO_STATISTICS)
                for width in range(self.most_bits, self.least_bits - 1, -1)
            ]
            offers[name] = [self._offer(weight, matrix, scores[name]) for weight in made[name]]
        count = sum(matrix.numel() for matrix in matrices.values())
        room, least = math.floor(self.average_bits * count), sum(o[-1].cost["bits"] for o in offers.values())
        if least > room:
            raise BudgetError(
                f"quantize.lrp: average_bits = {self.average_bits:g} cannot be met: {self.least_bits} bits with their "
                f"scales are {least / count:.3g} bits a weight; raise it, or give fewer least_bits"
            )
        found = bits(offers, {"bits": room})
        for one in maps:
            anatomy.replace(model.module, one.path, made[one.name][found.pick[one.name]])
        return found

    @staticmethod
    def _offer(weight: Weight, matrix: Tensor, score: float) -> Offer:
        lost = (weight.dense().detach() - matrix).double().square().sum() / matrix.double().square().sum().clamp_min(
            torch.finfo(torch.float64).tiny
        )
        stored = weight.cost().bytes
        return Offer(f"{getattr(weight, 'bits', 16)} bits", {"bits": 8 * stored, "bytes": stored}, score * float(lost))
