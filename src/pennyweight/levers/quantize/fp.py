"""ZeroQuant-FP: 4-bit floating-point weights whose scales differ by shifts, and what rounding lost as a low-rank part.

Row 131. Source: X. Wu, Z. Yao and Y. He, "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using
Floating-Point Formats", arXiv:2307.09782: GPTQ onto an E2M1 or E3M0 grid with a scale for each group; scales
constrained so that a 4-bit weight becomes an 8-bit one by shifting its exponent, either to powers of two ("power", the
paper's M1) or to one free scale a row over powers of two ("ratio", its M2); low-rank compensation on top. Its FP8
activations are `quantize.activations` with format e4m3. Differs from the source: M2 divides the largest scale of a row
by ``2**floor(log2(S_max / S))``. With the ceiling, as the paper has it, a scale is up to two times too small for its
group and clips the largest weights: 0.029 of the power of Gaussian weights in groups of 128 is lost then, 0.013 with
the floor (``shift = "ceil"`` is there to compare). Constrained scales are stored as what they are, in 4 or 8 bits.

Shape letters: M out features, N in features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pennyweight.errors import FormError, OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.levers.quantize.lorc import compensation
from pennyweight.solvers.columns import solve_columns
from pennyweight.solvers.factor import factor_of
from pennyweight.solvers.inputs import matrix_of, second_moment_of, without_dead
from pennyweight.solvers.low_rank import damped
from pennyweight.solvers.rounding import FLOATS, GridOptions, Rounding
from pennyweight.statistics import Statistics
from pennyweight.weights import Grid, Sum, Weight
from pennyweight.weights.quantized import Quantized

Constraint = Literal["free", "power", "ratio"]
Shift = Literal["floor", "ceil"]


def constrained(grid: Grid, constraint: Constraint, shift: Shift = "floor") -> Grid:
    """``grid`` with its positive scales (M, G) under a constraint, held in as few bits as that takes.

    Args:
        grid: of a floating-point format, its scales positive.
        constraint: "power": the next power of two, which clips nothing; "ratio": the largest scale of the row over a
            power of two; "free" changes nothing.
        shift: which power of two a ratio is rounded to: "floor" keeps every scale at least as large as it was.

    Raises:
        FormError: scales too far apart for the bits of an exponent.
    """
    if constraint == "free":
        return grid
    scale = grid.scale.float()
    if constraint == "power":
        top, exponent = torch.ones(1, 1), _log2(scale, "ceil")
    else:
        top = scale.amax(1, keepdim=True)
        exponent = -_log2(top / scale, shift)
    stored = _powers(exponent, top.to(grid.scale.dtype), in_all=constraint == "power")
    return replace(grid, scale=stored.dense().detach(), stored_scale=stored)


def _log2(x: Tensor, shift: Shift) -> Tensor:
    """The binary logarithm of positive ``x``, rounded down or up, exactly."""
    fraction, exponent = torch.frexp(x)  # in [1/2, 1)
    return exponent - 1 if shift == "floor" else torch.where(fraction == 0.5, exponent - 1, exponent)


def _powers(exponent: Tensor, top: Tensor, *, in_all: bool) -> Quantized:
    """``top * 2**exponent`` as codes of powers of two: (M, G) exponents over one scale, or one a row (M, 1)."""
    for format in ("e3m0", "e5m2"):
        # the codes' own range need not be where the exponents are: their scale is a power of two as well
        low, high = (-2, 4) if format == "e3m0" else (-16, 15)
        last = exponent.amax() if in_all else exponent.amax(1, keepdim=True)
        if int((last - exponent).max()) <= high - low:
            scale = top.float() * torch.exp2((last - high).float())
            narrow = scale.half()
            scale = narrow if torch.equal(narrow.float(), scale) else scale
            grid = Grid(FLOATS[format], None, scale, None, "none", format)
            wanted = top.float() * torch.exp2(exponent.float())
            found = Quantized.from_codes(grid.codes(wanted), grid)
            assert torch.equal(found.dense(), wanted)
            return found
    raise FormError("quantize.fp: scales that differ by more than 2^31; scale the weights, or leave the matrix dense")


@lever(
    "quantize.fp",
    reach="weight",
    row=131,
    needs=("second_moment",),
    paper="ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats, "
    "arXiv:2307.09782",
)
@dataclass(frozen=True, kw_only=True)
class FloatingPoint:
    """Round to a floating-point grid whose scales differ by shifts, and give back a low-rank part of the error.

    Exact for matrices that lie on such a grid, their inputs uncorrelated or ``method`` "rtn".
    """

    format: Literal["e2m1", "e3m0", "e4m3", "e5m2"] = option("e2m1", one_of(*FLOATS), "what a code means")
    group_size: int | None = option(256, at_least(1), "input features that share a scale; none: the whole row")
    scales: Literal["free", "power", "ratio"] = option(
        "ratio", one_of("free", "power", "ratio"), "power: powers of two (M1); ratio: one a row over powers of two (M2)"
    )
    shift: Literal["floor", "ceil"] = option(
        "floor", one_of("floor", "ceil"), "rounding of M2's powers of two; ceil clips, as in the paper"
    )
    method: Literal["gptq", "rtn"] = option("gptq", one_of("gptq", "rtn"), "how the weight is rounded")
    rank: int = option(0, at_least(0), "directions of the rounding error that are given back (LoRC); 0: none")
    factor_bits: int = option(16, one_of(8, 16), "bits of a factor's entry; 8: integers, one scale a direction")
    weighted: bool = option(
        True, one_of(True, False), "give back what the outputs miss most; false: what the matrix misses most"
    )
    act_order: bool = option(True, one_of(True, False), "settle the inputs of largest second moment first (gptq)")
    damping: float = option(0.01, between(0, 10), "added to the diagonal of the second moment, as a share of its mean")

    def __post_init__(self) -> None:
        if self.shift != "floor" and self.scales != "ratio":
            raise OptionError(f"quantize.fp: shift has no effect on scales = {self.scales!r}; give scales = 'ratio'")
        if self.scales == "ratio" and self.group_size is None:
            raise OptionError(
                "quantize.fp: scales = 'ratio' with one group a row leaves nothing to constrain; give a group_size, or "
                "scales = 'free'"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that these settings read."""
        return frozenset({"second_moment"} if self.method == "gptq" or (self.rank and self.weighted) else ())

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        """The rounded weight, plus its compensation where ``rank`` asks for one.

        Raises:
            OptionError: a rank beyond the smaller side.
        """
        return self.solve_group([weight], statistics)[0]

    @torch.no_grad()
    def solve_group(self, weights: Sequence[Weight], statistics: Statistics) -> list[Weight]:
        """Several weights that read the same inputs, rounded in one pass over their stacked rows."""
        matrices = [matrix_of(weight, "quantize.fp") for weight in weights]
        for matrix in matrices:
            if self.rank > min(matrix.shape):
                raise OptionError(
                    f"quantize.fp: rank = {self.rank} for a {matrix.shape[0]}x{matrix.shape[1]} matrix; "
                    f"give at most {min(matrix.shape)}"
                )
        moment = None
        if self.needs:
            moment = second_moment_of(statistics, matrices[0].shape[1], "quantize.fp")
            matrices = without_dead(matrices, moment.diagonal())
        bases = self._rounded(matrices, moment)
        if not self.rank:
            return list(bases)
        metric = damped(moment, self.damping) if self.weighted and moment is not None else None
        parts = [
            compensation(m - b.dense(), self.rank, moment=metric, factor_bits=self.factor_bits, where="quantize.fp")
            for m, b in zip(matrices, bases, strict=True)
        ]
        return [Sum(base, part) for base, part in zip(bases, parts, strict=True)]

    def _rounded(self, matrices: Sequence[Tensor], moment: Tensor | None) -> list[Quantized]:
        options = GridOptions(FLOATS[self.format], self.group_size, "none", self.format)
        grids = [constrained(options.fit(matrix), self.scales, self.shift) for matrix in matrices]
        if self.method == "rtn" or moment is None:
            return [Quantized.from_codes(g.codes(m), g) for m, g in zip(matrices, grids, strict=True)]
        order: Literal["descending", "given"] = "descending" if self.act_order else "given"
        factor = factor_of(moment, damping=self.damping, order=order, where="quantize.fp")
        columns = torch.cat(list(matrices)).T  # (N, M)
        columns = columns.contiguous() if factor.order is None else columns[factor.order]
        heights = [matrix.shape[0] for matrix in matrices]
        rule = Rounding(options, heights, len(columns), grids=grids, order=factor.order, device=columns.device)
        solve_columns(columns, factor.lower, rule)
        return [Quantized.from_codes(codes, grid) for codes, grid in rule.results()]

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[FloatingPoint]:
        for group_size in (32, 64, 256):
            if group_size < shape[1]:
                yield cls(group_size=group_size)
