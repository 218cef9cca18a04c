"""AWQ: channels that see large inputs are scaled up before rounding, and their inputs down.

Source: J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv:2306.00978, and its code (mit-han-lab/llm-awq): for every group of maps that read one input, s = mean|x|^a,
normalized by sqrt(max s * min s), with a out of twenty shares of one, whichever leaves the least error of the outputs
when W diag(s) is rounded; then the range of each group of weights is clipped, down to half, where that lowers the error
further (not of queries and keys). What divides the inputs is folded into the norm or linear map before. Differs from
the source: the error is that of the maps' own outputs, weighted by the second moment of all calibration inputs, not
that of the attention or feed-forward block around them on a sample; where the run of the model does not prove that a
fold is exact (`pennyweight.solvers.folding`), the division stays with the weight, as a diagonal factor of two bytes an
input.

Shape letters: M out features, N in features, G groups of a row, S features of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.solvers.folding import fold, linear_maps
from pennyweight.solvers.rounding import GridOptions
from pennyweight.weights import Diagonal, Product, Quantized, Weight
from pennyweight.weights.grid import grouped

if TYPE_CHECKING:
    from pennyweight.model.anatomy import Map
    from pennyweight.model.model import Model
    from pennyweight.statistics import Statistics
    from pennyweight.work import Work

_SMALLEST = 1e-4  # of a scale
_CLIPS, _SHRINKS = 20, 10  # ranges are drawn in by twentieths, down to a half
_UNCLIPPED = ("attention.query", "attention.key", "attention.qkv")


def candidate_scales(absolute_mean: Tensor, steps: int) -> list[Tensor]:
    """The scales (N,) that the search tries, of inputs whose mean magnitude is ``absolute_mean`` (N,); the first: ones.

    Inputs that were always zero take the smallest scale of the others.
    """
    mean = absolute_mean.float()
    alive = mean > 0
    mean = torch.where(alive, mean, mean[alive].min() if bool(alive.any()) else torch.ones(()))
    found = []
    for step in range(steps):
        scale = mean.pow(step / steps).clamp_min(_SMALLEST)
        found.append(scale / (scale.max() * scale.min()).sqrt())
    return found


def rounded(matrix: Tensor, options: GridOptions) -> Tensor:
    """``matrix`` (M, N) on the nearest codes of its own grid, float32."""
    grid = options.fit(matrix)
    return grid.values(grid.codes(matrix)).float()


def best_scale(matrices: Sequence[Tensor], statistics: Statistics, options: GridOptions, steps: int) -> Tensor:
    """(N,) the scale under which rounding moves the outputs of all ``matrices`` (M, N) together least."""
    moment, mean = (statistics.need(name, "quantize.awq") for name in ("second_moment", "absolute_mean"))

    def loss(scale: Tensor) -> float:
        moved = (rounded(matrix * scale, options) / scale - matrix for matrix in matrices)
        return sum(float(((d @ moment) * d).sum(dtype=torch.float64)) for d in moved)

    return min(candidate_scales(mean, steps), key=loss)


def clipped(matrix: Tensor, moment: Tensor, options: GridOptions) -> Tensor:
    """``matrix`` (M, N) with the range of each group drawn in to where rounding moves its outputs least.

    Args:
        matrix: already scaled.
        moment: (N, N) of the inputs that go with it.
        options: of the grid.
    """
    columns = matrix.shape[1]
    size = columns if options.group_size is None else min(options.group_size, columns)
    missing = -columns % size
    blocks = torch.nn.functional.pad(moment, (0, missing, 0, missing)).unfold(0, size, size).unfold(1, size, size)
    inner = blocks.diagonal(dim1=0, dim2=1).permute(2, 0, 1)  # (G, S, S)
    groups = grouped(matrix, None, size)[0]  # (M, G, S)
    largest = groups.abs().amax(-1, keepdim=True)
    best, found = torch.full(groups.shape[:2], torch.inf), largest
    for step in range(_SHRINKS):
        limit = largest * (1 - step / _CLIPS)
        tried = groups.clamp(-limit, limit).flatten(1)[:, :columns]
        moved = torch.nn.functional.pad(rounded(tried, options) - matrix, (0, missing)).view(groups.shape)
        error = (torch.einsum("mgs,gst->mgt", moved, inner) * moved).sum(-1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better[..., None], limit, found)
    return groups.clamp(-found, found).flatten(1)[:, :columns]


@lever(
    "quantize.awq",
    reach="model",
    paper="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv:2306.00978",
)
@dataclass(frozen=True, kw_only=True)
class AWQ:
    """Scale up the weights that large inputs meet, round to nearest, and scale the inputs down where they come from."""

    bits: int = option(4, between(1, 8), "bits of a code")
    group_size: int | None = option(128, at_least(1), "input features that share a scale; none: the whole row")
    zero: str = option("integer", one_of("none", "integer", "float"), "zero of a group; none: symmetric")
    steps: int = option(20, at_least(1), "scales tried; 1: none, plain rounding")
    clip: bool = option(True, one_of(True, False), "draw in the ranges of groups where that helps")
    fold: bool = option(True, one_of(True, False), "divide in the layer before where that is exact; false: never")

    @property
    def grid_options(self) -> GridOptions:
        return GridOptions(self.bits, self.group_size, self.zero)

    @torch.no_grad()
    def change(self, model: Model, work: Work) -> None:
        """Round the linear ones of the selected maps.

        Raises:
            DataError: no calibration data.
            OptionError: no selected map is a linear layer.
            FormError: a selected map that is compact already.
        """
        windows, maps = work.inputs("quantize.awq"), linear_maps(model, work.maps, "quantize.awq")
        statistics = work.statistics({"second_moment", "absolute"})
        groups: dict[str, list[Map]] = {}
        for one in maps:
            groups.setdefault(one.input_group, []).append(one)
        scales = {}
        for group, members in groups.items():
            matrices = [anatomy.matrix(model.module, member).float() for member in members]
            scales[group] = best_scale(matrices, statistics[members[0].name], self.grid_options, self.steps)
        folded = fold(model, windows, scales) if self.fold else set()
        for done, one in enumerate(maps):
            scale, divisor = scales[one.input_group], None
            # as it is now: its rows may have been divided for the map behind it
            matrix = anatomy.matrix(model.module, one).float()
            if one.input_group not in folded:
                divisor = (1 / scale).half()
                scale = 1 / divisor.float()
                matrix = matrix * scale
            if self.clip and one.role not in _UNCLIPPED:
                moment = statistics[one.name].need("second_moment", "quantize.awq")
                matrix = clipped(matrix, moment / torch.outer(scale, scale), self.grid_options)
            grid = self.grid_options.fit(matrix)
            weight: Weight = Quantized.from_codes(grid.codes(matrix), grid)
            if divisor is not None and self.steps > 1:
                weight = Product(weight, Diagonal(divisor))
            anatomy.replace(model.module, one.path, weight)
            work.report("quantize.awq", done + 1, len(maps))
