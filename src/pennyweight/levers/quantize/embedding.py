"""Quantized embeddings: rows of codes that a look-up reads one at a time.

No paper: round to nearest, for the one matrix whose inputs are tokens. A small language model keeps a third of its
parameters there, and a tied head multiplies by it.

Shape letters: M tokens of the vocabulary, N features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.solvers.inputs import matrix_of, second_moment_of
from pennyweight.solvers.rounding import SCALE_BITS, GridOptions
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight
from pennyweight.weights.quantized import Quantized


@lever("quantize.embedding", reach="weight")
@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Round the embedding to the nearest value of each group's grid; a tied head stays tied."""

    #: The planner offers it to these maps alone.
    roles: ClassVar[frozenset[str]] = frozenset({"embedding"})

    bits: int = option(8, between(1, 8), "bits of a code")
    group_size: int | None = option(64, at_least(1), "features that share a scale; none: the whole row")
    zero: str = option("integer", one_of("none", "integer", "float"), "zero of a group; none: symmetric")
    format: str = option("integer", one_of("integer", "e4m3", "e5m2", "e2m1"), "what a code means")
    search: int = option(0, at_least(0), "ranges tried for each group; 0: from minimum to maximum")
    scale_bits: int = option(16, one_of(*SCALE_BITS), "bits of a scale; under 16 they are quantized in turn")
    importance: Literal["none", "head"] = option(
        "none", one_of("none", "head"), "what the search weights errors by; head: second moment of a tied head's inputs"
    )

    def __post_init__(self) -> None:
        self.grid_options.check("quantize.embedding")
        if self.importance != "none" and not self.search:
            raise OptionError(
                "quantize.embedding: importance has no effect with search = 0; give search at least 1, say 16"
            )

    @property
    def grid_options(self) -> GridOptions:
        return GridOptions(self.bits, self.group_size, self.zero, self.format, self.search, self.scale_bits)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that these settings read."""
        return frozenset({"second_moment"} if self.importance == "head" else ())

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        matrix = matrix_of(weight, "quantize.embedding")
        importance = None
        if self.importance == "head":
            importance = second_moment_of(statistics, matrix.shape[1], "quantize.embedding").diagonal()
        grid = self.grid_options.fit(matrix, importance)
        return Quantized.from_codes(grid.codes(matrix), grid)

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[Embedding]:
        for bits, group_size in ((2, 32), (3, 32), (3, 64), (4, 32), (4, 64), (5, 64), (6, 64), (8, 128)):
            yield cls(bits=bits, group_size=min(group_size, shape[1]), search=16 if bits < 6 else 0)
