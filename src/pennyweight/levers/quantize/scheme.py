"""One configuration for every way to quantize one linear map that the survey's taxonomy names.

Row 226. Source: A. Gholami et al., "A Survey of Quantization Methods for Efficient Neural Network Inference",
arXiv:2103.13630, sections III to V. Differs from the source: nothing; it is a survey, and each part names its own.

Shape letters: R rows of input, M out features, N in features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.levers.quantize.equalize import equalize
from pennyweight.levers.quantize.extreme import binary, powers_of_two, ternary
from pennyweight.levers.quantize.integer_only import ActivationGrid, IntegerLinear, QuantizedInputs
from pennyweight.levers.quantize.learned_step import tuned
from pennyweight.levers.quantize.ranges import Range, find_range, grid_of
from pennyweight.solvers.inputs import matrix_of
from pennyweight.statistics import Statistics
from pennyweight.weights import CompactLinear, Weight
from pennyweight.weights.codebook import Codebook, normal_float
from pennyweight.weights.grid import Grid, grouped
from pennyweight.weights.quantized import Quantized
from pennyweight.weights.vector import VectorCodebook

VALUES = ("uniform", "float", "power-of-two", "normal-float", "k-means", "vector", "ternary", "binary")
GRANULARITIES = ("tensor", "channel", "group")
RANGES = ("min-max", "percentile", "mse", "kl")
_FLOATS = {4: "e2m1", 8: "e4m3"}


@lever(
    "quantize.scheme",
    reach="weight",
    row=226,
    paper="A Survey of Quantization Methods for Efficient Neural Network Inference, arXiv:2103.13630",
)
@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Any point of the survey's taxonomy for one linear map; `layer` and `pair` reach beyond the weight."""

    bits: int = option(4, between(1, 8), "bits of a code; of a vector's code for values = vector")
    values: Literal["uniform", "float", "power-of-two", "normal-float", "k-means", "vector", "ternary", "binary"] = (
        option("uniform", one_of(*VALUES), "what the codes stand for")
    )
    symmetric: bool = option(False, one_of(False, True), "no zero point (uniform values only)")
    granularity: Literal["tensor", "channel", "group"] = option(
        "group", one_of(*GRANULARITIES), "what shares a scale or a table"
    )
    group_size: int = option(64, at_least(1), "input features of a group")
    range: Literal["min-max", "percentile", "mse", "kl"] = option(
        "min-max", one_of(*RANGES), "how the range of uniform values is found"
    )
    percentile: float = option(99.9, between(50, 100), "share of the values inside, for range = percentile")
    rounding: Literal["nearest", "stochastic"] = option("nearest", one_of("nearest", "stochastic"), "how values round")
    seed: int = option(0, at_least(0), "of stochastic rounding and of the first table of vectors")
    dimension: int = option(2, at_least(1), "numbers of a vector, for values = vector")
    activations: Literal["none", "static", "dynamic"] = option(
        "none", one_of("none", "static", "dynamic"), "rounding of inputs: never, on a calibrated range, row by row"
    )
    activation_bits: int = option(8, between(2, 8), "bits of an input")
    arithmetic: Literal["simulated", "integer"] = option(
        "simulated", one_of("simulated", "integer"), "floating point that rounds, or integers alone"
    )
    tuning: Literal["none", "aware"] = option(
        "none", one_of("none", "aware"), "learn weights and steps through rounding"
    )

    def __post_init__(self) -> None:
        uniform = self.values == "uniform"
        wrong = [
            (self.symmetric and not uniform, "symmetric means nothing", "values = uniform"),
            (self.range != "min-max" and not uniform, f"range = {self.range} means nothing", "values = uniform"),
            (self.rounding == "stochastic" and not uniform, "stochastic rounding is", "values = uniform"),
            (self.values == "float" and self.bits not in _FLOATS, f"{self.bits} bits are no format", "bits = 4 or 8"),
            (self.values == "binary" and self.bits != 1, f"binary has 1 bit, not {self.bits}", "bits = 1"),
            (self.values == "ternary" and self.bits != 2, f"ternary has 2 bits, not {self.bits}", "bits = 2"),
            (self.values == "vector" and self.granularity != "tensor", "one table serves all", "granularity = tensor"),
            (uniform and self.symmetric and self.bits < 2, "1 bit without a zero has one level", "values = binary"),
            (self.arithmetic == "integer" and not (uniform and self.symmetric), "integers need", "symmetric = true"),
            (self.arithmetic == "integer" and self.granularity == "group", "groups have scales of their own",
             "granularity = channel or tensor"),
            (self.arithmetic == "integer" and self.activations != "static", "integers need", "activations = static"),
            (self.tuning == "aware" and not (uniform and self.symmetric), "learned steps need", "symmetric = true"),
        ]  # fmt: skip
        for holds, what, remedy in wrong:
            if holds:
                raise OptionError(f"quantize.scheme: {what} with {self.values} values; give {remedy}")
        idle = [
            ("percentile", self.percentile != 99.9 and self.range != "percentile", "range = percentile"),
            ("group_size", self.group_size != 64 and self.granularity != "group", "granularity = group"),
            ("dimension", self.dimension != 2 and self.values != "vector", "values = vector"),
            (
                "seed",
                self.seed != 0 and self.values != "vector" and self.rounding != "stochastic",
                "rounding = stochastic",
            ),
        ]
        for name, holds, remedy in idle:
            if holds:
                raise OptionError(
                    f"quantize.scheme: {name} = {getattr(self, name)} has no effect; give {remedy} with it"
                )

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        """The weight alone.

        Raises:
            OptionError: options that only `layer` can act on.
        """
        beyond = [name for name in ("activations", "arithmetic", "tuning") if getattr(self, name) not in _PLAIN]
        if beyond:
            raise OptionError(
                f"quantize.scheme: {beyond[0]} needs the layer and its inputs, not the weight; use layer()"
            )
        return self.weight(matrix_of(weight, "quantize.scheme"))

    def weight(self, matrix: Tensor) -> Weight:
        """``matrix`` (M, N) as the weight axes say."""
        group = self.group_size if self.granularity == "group" else None
        if self.values == "uniform":
            grid = self.grid(matrix)
            codes = grid.codes(matrix) if self.rounding == "nearest" else self._drawn(matrix, grid)
            return Quantized.from_codes(codes, grid)
        if self.values == "float":
            whole = self.granularity == "tensor"
            return Quantized.nearest(
                matrix, bits=self.bits, format=_FLOATS[self.bits], group_size=group, per_tensor=whole
            )
        if self.values == "vector":
            generator = torch.Generator().manual_seed(self.seed)
            return VectorCodebook.nearest(matrix, bits=self.bits, dimension=self.dimension, generator=generator)
        if self.values == "k-means":
            shared: Literal["matrix", "row", "group"] = {"tensor": "matrix", "channel": "row"}.get(
                self.granularity, "group"
            )  # type: ignore[assignment]
            return Codebook.nearest(matrix, bits=self.bits, tables=shared, group_size=group)
        # one scale for all is one group of one row
        rows = matrix.reshape(1, -1) if self.granularity == "tensor" else matrix
        found = self._scaled(rows, group)
        return found if rows is matrix else _reshaped(found, matrix.shape[1])

    def grid(self, matrix: Tensor) -> Grid:
        """The uniform grid of ``matrix``."""
        if self.granularity == "tensor":
            groups = matrix.detach().float().reshape(1, 1, -1)
        else:
            # a short last group is filled with its own last entry, which changes neither range nor order
            groups, _ = grouped(matrix.detach().float(), None, self.group_size if self.granularity == "group" else None)
        rows, across = groups.shape[:2]
        low, high = find_range(
            groups.flatten(0, 1), self.range, bits=self.bits, symmetric=self.symmetric, percentile=self.percentile
        )
        return grid_of(
            low.view(rows, across), high.view(rows, across), bits=self.bits, symmetric=self.symmetric,
            group_size=self.group_size if self.granularity == "group" else None,
        )  # fmt: skip

    def layer(
        self, matrix: Tensor, bias: Tensor | None, inputs: Tensor, *, range: Range = "min-max"
    ) -> CompactLinear | QuantizedInputs | IntegerLinear:
        """A linear layer as all axes say.

        Args:
            matrix: (M, N).
            bias: (M,) or None.
            inputs: (..., N), calibration data for static activations, integer arithmetic and tuning.
            range: how the range of static activations is found.
        """
        rows = inputs.detach().float().reshape(-1, matrix.shape[1])
        weight = self.weight(matrix) if self.tuning == "none" else tuned(matrix, self.grid(matrix), rows)
        if self.activations == "none":
            return CompactLinear(weight, bias)
        if self.activations == "dynamic":
            return QuantizedInputs(weight, bias, ActivationGrid(self.activation_bits, None))
        static = ActivationGrid.static(rows, bits=self.activation_bits, range=range, percentile=self.percentile)
        if self.arithmetic == "simulated":
            return QuantizedInputs(weight, bias, static)
        assert isinstance(weight, Quantized)
        with torch.no_grad():
            reached = nn.functional.linear(static(rows), weight.dense(), bias)
        outputs = ActivationGrid.static(reached, bits=self.activation_bits, range=range, percentile=self.percentile)
        return IntegerLinear(weight, bias, static, outputs)

    def pair(self, first: Tensor, second: Tensor, bias: Tensor | None = None) -> tuple[Weight, Weight, Tensor | None]:
        """Two maps with nothing but scales between them, equalized without data and then quantized; the new bias."""
        one, two, moved = equalize(first.detach().float(), second.detach().float(), bias)
        plain = replace(self, activations="none", arithmetic="simulated", tuning="none")
        return plain.weight(one), plain.weight(two), moved

    def _drawn(self, matrix: Tensor, grid: Grid) -> Tensor:
        """Codes rounded up with the probability of the fraction: inside the range, right on the average."""
        scale, zero = grid.columns(0, matrix.shape[1])
        level = matrix.detach().float() / scale + (2 ** (self.bits - 1) if zero is None else zero)
        draw = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(self.seed))
        return (level + draw).floor().clamp(0, 2**self.bits - 1).to(torch.uint8)

    def _scaled(self, matrix: Tensor, group: int | None) -> Codebook:
        if self.values == "binary":
            return binary(matrix, group_size=group)
        if self.values == "ternary":
            return ternary(matrix, group_size=group)
        table = normal_float(self.bits) if self.values == "normal-float" else powers_of_two(self.bits)
        return Codebook.nearest(matrix, bits=self.bits, table=table, group_size=group or matrix.shape[1])


_PLAIN = ("none", "simulated")


def _reshaped(found: Codebook, columns: int) -> Codebook:
    """A codebook of one long row and one scale, as a matrix ``columns`` wide."""
    from pennyweight.weights.packing import pack

    codes = found.codes().reshape(-1, columns)
    return Codebook(pack(codes, found.bits), found.table, found.scale, bits=found.bits, columns=columns)
