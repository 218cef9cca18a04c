"""Tables of embeddings made small by the methods of the embedding benchmark that start from a trained table.

Row 114. Source: H. Zhang et al., "Experimental Analysis of Large-scale Learnable Vector Storage Compression",
arXiv:2311.15578: shared arrays, tensor trains, equal blocks, codes, widths by frequency, pruned entries. Differs from
the source: see `pennyweight.embeddings`, which has all fourteen, to train from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pennyweight.embeddings.trained import TRAINED, compress
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.solvers.inputs import matrix_of
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight

_NAME = "factorize.embedding"


@lever(
    _NAME,
    reach="weight",
    row=114,
    needs=("gradient",),
    paper="Experimental Analysis of Large-scale Learnable Vector Storage Compression, arXiv:2311.15578",
)
@dataclass(frozen=True, kw_only=True)
class EmbeddingTable:
    """A table under a budget of bytes, by one of six methods; a tied head stays tied.

    Exact for tables of the method's own kind, up to rounding to 16 bits.
    """

    #: The planner offers it to these maps alone.
    roles: ClassVar[frozenset[str]] = frozenset({"embedding"})

    method: Literal["robe", "tt", "dedup", "mgqe", "mde", "deeplight"] = option(
        "mgqe",
        one_of(*TRAINED),
        "one array; a tensor train; equal blocks; codes, fewer for rare rows; widths by frequency; largest entries",
    )
    density: float = option(0.25, between(0, 1), "bytes, as a share of the table in 16 bits")
    seed: int = option(0, at_least(0), "of every draw")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that these settings read: how often rows are looked up."""
        return frozenset({"gradient"} if self.method in ("mgqe", "mde", "dedup") else ())

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        matrix = matrix_of(weight, _NAME)
        counts = statistics.need("gradient", _NAME) if self.needs else None
        budget = int(self.density * 2 * matrix.numel())
        return compress(matrix, self.method, budget, counts=counts, seed=self.seed)
