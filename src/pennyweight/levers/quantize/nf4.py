"""NF4: four bits on the quantiles of a normal distribution, a scale for every block.

Source: T. Dettmers, A. Pagnoni, A. Holtzman and L. Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs",
arXiv:2305.14314, section 3, and its code (bitsandbytes), whose sixteen values are taken as they are; block by block the
largest magnitude becomes 1. With ``double`` the scales are quantized to 8 bits in blocks of 256 in turn. Differs from
the source: blocks lie within a row; scales are float16 where they are not quantized; doubly quantized scales are
uniform between minimum and maximum, in blocks of 256 rows, and the codes are the nearest under the scales as stored.

Shape letters: M out features, N in features, G blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.lever import at_least, lever, one_of, option
from pennyweight.solvers.inputs import matrix_of
from pennyweight.statistics import Statistics
from pennyweight.weights import Codebook, Dense, Quantized, Weight, check_finite
from pennyweight.weights.grid import grouped, scaled
from pennyweight.weights.packing import pack

#: As published; `pennyweight.weights.normal_float` computes the same quantiles.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SCALES = 256  # that share a scale of their own


@lever(
    "quantize.nf4",
    reach="weight",
    paper="QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314",
)
@dataclass(frozen=True, kw_only=True)
class NF4:
    """Round to the 4-bit normal float, block by block; needs no data."""

    block_size: int = option(64, at_least(1), "input features that share a scale")
    double: bool = option(True, one_of(True, False), "quantize the scales to 8 bits in turn")

    @torch.no_grad()
    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        matrix = check_finite(matrix_of(weight, "quantize.nf4"), "quantize.nf4: matrix")
        size = min(self.block_size, matrix.shape[1])
        scale = self._scale(grouped(matrix, None, size)[0].abs().amax(-1))
        table = torch.tensor(NF4_VALUES)
        x = matrix / scaled(torch.ones_like(matrix), scale.dense(), size)
        codes = torch.bucketize(x, (table[1:] + table[:-1]) / 2)
        return Codebook(pack(codes, 4), table.view(1, 1, -1), scale, bits=4, columns=matrix.shape[1], group_size=size)

    def _scale(self, largest: Tensor) -> Weight:
        """(M, G) the scales as they are stored, none of them zero."""
        tiny = torch.finfo(torch.float16).smallest_normal
        largest = torch.where(largest > 0, largest, torch.ones_like(largest)).clamp_min(tiny)
        if not self.double:
            return Dense(check_finite(largest.half(), "quantize.nf4: scale"))
        # neighbors down a column of blocks: a row seldom has 256 of them
        return Quantized.nearest(largest.T, bits=8, group_size=_SCALES, zero_kind="float").T

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[NF4]:
        yield cls(block_size=min(64, shape[1]))
