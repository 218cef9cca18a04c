"""GPTQ: rounding column by column, each error made good by the columns still to come.

Source: E. Frantar, S. Ashkboos, T. Hoefler and D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", arXiv:2210.17323. Inputs that are zero throughout the calibration data get weight zero, as
in the official code. Differs from the source: groups that do not start a block of 128 columns are fitted to columns
in which *all* earlier errors are made good (the official code leaves out those of the same block); the grid may be
searched, weighted by the inputs; activation order keeps groups of neighbors, fitted beforehand (``static_groups``),
so that rows are stored in their order.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.solvers.columns import solve_columns
from pennyweight.solvers.factor import factor_of
from pennyweight.solvers.inputs import matrix_of, second_moment_of, without_dead
from pennyweight.solvers.rounding import SCALE_BITS, GridOptions, Rounding
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight
from pennyweight.weights.quantized import Quantized


@lever(
    "quantize.gptq",
    reach="weight",
    needs=("second_moment",),
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv:2210.17323",
)
@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Round column by column; the columns still to come make good each error on the calibration data.

    Equal to `quantize.rtn` where the inputs are uncorrelated and equally large.
    """

    bits: int = option(4, between(1, 8), "bits of a code")
    group_size: int | None = option(128, at_least(1), "input features that share a scale; none: the whole row")
    zero: str = option("integer", one_of("none", "integer", "float"), "zero of a group; none: symmetric")
    format: str = option("integer", one_of("integer", "e4m3", "e5m2", "e2m1"), "what a code means")
    search: int = option(0, at_least(0), "ranges tried for each group; 0: from minimum to maximum")
    scale_bits: int = option(16, one_of(*SCALE_BITS), "bits of a scale; under 16 they are quantized in turn")
    importance: Literal["none", "inputs"] = option(
        "none", one_of("none", "inputs"), "what the search weights errors by; inputs: their second moment"
    )
    act_order: bool = option(True, one_of(True, False), "settle the inputs of largest second moment first")
    static_groups: bool = option(True, one_of(True, False), "fit all groups before the first column, not on the way")
    damping: float = option(0.01, at_least(0), "added to the diagonal of the second moment, as a share of its mean")

    def __post_init__(self) -> None:
        self.grid_options.check("quantize.gptq")
        if self.importance != "none" and not self.search:
            raise OptionError("quantize.gptq: importance has no effect with search = 0; give search at least 1, say 16")
        if self.group_size is not None and not self.static_groups:
            if self.act_order:
                raise OptionError(
                    "quantize.gptq: act_order with static_groups = False would scatter each group over the row, which "
                    "no stored row holds; set static_groups = True or act_order = False"
                )
            if self.scale_bits != 16:
                raise OptionError(
                    f"quantize.gptq: scale_bits = {self.scale_bits} with static_groups = False: scales can be "
                    "quantized only when all are known; set static_groups = True or scale_bits = 16"
                )

    @property
    def grid_options(self) -> GridOptions:
        return GridOptions(self.bits, self.group_size, self.zero, self.format, self.search, self.scale_bits)

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        return self.solve_group([weight], statistics)[0]

    @torch.no_grad()
    def solve_group(self, weights: Sequence[Weight], statistics: Statistics) -> list[Weight]:
        """Several weights that read the same inputs, solved in one pass over their stacked rows.

        The same result as `solve` on each.
        """
        matrices = [matrix_of(weight, "quantize.gptq") for weight in weights]
        moment = second_moment_of(statistics, matrices[0].shape[1], "quantize.gptq")
        factor = factor_of(
            moment, damping=self.damping, order="descending" if self.act_order else "given", where="quantize.gptq"
        )
        energy = moment.diagonal()
        matrices = without_dead(matrices, energy)
        importance = energy if self.importance == "inputs" else None
        grids = None
        if self.static_groups or self.group_size is None:
            grids = [self.grid_options.fit(matrix, importance) for matrix in matrices]
        columns = torch.cat(matrices).T  # (N, M)
        columns = columns.contiguous() if factor.order is None else columns[factor.order]
        rule = Rounding(
            self.grid_options,
            [matrix.shape[0] for matrix in matrices],
            columns.shape[0],
            grids=grids,
            order=factor.order,
            importance=importance,
            device=columns.device,
        )
        solve_columns(columns, factor.lower, rule)
        return [Quantized.from_codes(codes, grid) for codes, grid in rule.results()]

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[GPTQ]:
        for bits, group_size in ((2, 32), (2, 64), (3, 32), (3, 64), (4, 32), (4, 64), (5, 64), (6, 64), (8, 128)):
            yield cls(bits=bits, group_size=min(group_size, shape[1]))
