"""Round to nearest (RTN): every weight to the nearest code of its group's grid.

The plain baseline of post-training quantization, without a paper of its own; with ``search`` its grid is the weighted
least-squares fit of `pennyweight.weights.grid`, with ``importance`` weighted by the input energy, as the importance
matrix of llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.solvers.inputs import matrix_of, second_moment_of
from pennyweight.solvers.rounding import SCALE_BITS, GridOptions
from pennyweight.statistics import Statistics
from pennyweight.weights import BlockSparse, Dense, LowRank, NofM, Product, Sparse, Weight
from pennyweight.weights.quantized import Quantized


@lever("quantize.rtn", reach="weight")
@dataclass(frozen=True, kw_only=True)
class RTN:
    """Round every weight to the nearest value of its group's grid; needs no data."""

    bits: int = option(4, between(1, 8), "bits of a code")
    group_size: int | None = option(128, at_least(1), "input features that share a scale; none: the whole row")
    zero: str = option("integer", one_of("none", "integer", "float"), "zero of a group; none: symmetric")
    format: str = option("integer", one_of("integer", "e4m3", "e5m2", "e2m1"), "what a code means")
    search: int = option(0, at_least(0), "ranges tried for each group; 0: from minimum to maximum")
    scale_bits: int = option(16, one_of(*SCALE_BITS), "bits of a scale; under 16 they are quantized in turn")
    importance: Literal["none", "inputs"] = option(
        "none", one_of("none", "inputs"), "what the search weights errors by; inputs: their second moment (needs data)"
    )

    def __post_init__(self) -> None:
        self.grid_options.check("quantize.rtn")
        if self.importance != "none" and not self.search:
            raise OptionError("quantize.rtn: importance has no effect with search = 0; give search at least 1, say 16")

    @property
    def grid_options(self) -> GridOptions:
        return GridOptions(self.bits, self.group_size, self.zero, self.format, self.search, self.scale_bits)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that these settings read."""
        return frozenset({"second_moment"} if self.importance == "inputs" else ())

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        """Also of compact weights that hold dense ones: values of a sparse weight, factors of a low-rank one."""
        if isinstance(weight, LowRank):
            self._dense_only(weight)
            return Product(self._round(weight.up), self._round(weight.down))
        if isinstance(weight, Sparse | NofM | BlockSparse) and isinstance(weight.values, Dense):
            self._dense_only(weight)
            return weight.with_values(self._round(weight.values.matrix))
        matrix = matrix_of(weight, "quantize.rtn")
        importance = None
        if self.importance == "inputs":
            importance = second_moment_of(statistics, matrix.shape[1], "quantize.rtn").diagonal()
        return self._round(matrix, importance)

    def _dense_only(self, weight: Weight) -> None:
        if self.importance != "none":
            raise OptionError(
                f"quantize.rtn: importance = 'inputs' for a {weight.form} weight, whose columns are no inputs; "
                "give 'none'"
            )

    def _round(self, matrix: Tensor, importance: Tensor | None = None) -> Quantized:
        matrix = matrix.detach().float()
        grid = self.grid_options.fit(matrix, importance)
        return Quantized.from_codes(grid.codes(matrix), grid)

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[RTN]:
        # finer groups pay where codes are few: at 2 and 3 bits a scale for every 32 is cheaper than another bit
        for bits, group_size in ((2, 32), (2, 64), (3, 32), (3, 64), (4, 32), (4, 64), (5, 64), (6, 64), (8, 128)):
            yield cls(bits=bits, group_size=min(group_size, shape[1]), search=16 if bits < 6 else 0)
