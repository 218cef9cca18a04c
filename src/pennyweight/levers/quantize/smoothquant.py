"""SmoothQuant: outliers of the activations are moved into the weights, so that 8 bits serve both.

Source: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, and its code (mit-han-lab/smoothquant): s_j = max|x_j|^a / max|w_j|^(1-a) over all maps that read the
input, folded into the norm before them; then weights are rounded with a scale for each output and activations with one
for each token. Differs from the source: any norm that the run of the model proves to be read by the maps alone
(`pennyweight.solvers.folding`) takes part; what a linear map gives is left alone, as there.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.lever import between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.solvers.folding import fold, linear_maps, sources
from pennyweight.weights import Activation, Quantized

if TYPE_CHECKING:
    from pennyweight.model.anatomy import Map
    from pennyweight.model.model import Model
    from pennyweight.work import Work

_SMALLEST = 1e-5


def smoothing(absolute_max: Tensor, matrices: Sequence[Tensor], alpha: float) -> Tensor:
    """(N,) what the inputs are divided by: of largest magnitude ``absolute_max`` (N,), read by ``matrices`` (M, N)."""
    weight = torch.stack([matrix.abs().amax(0) for matrix in matrices]).amax(0).clamp_min(_SMALLEST)
    return (absolute_max.float().pow(alpha) / weight.pow(1 - alpha)).clamp_min(_SMALLEST)


@lever(
    "quantize.smoothquant",
    reach="model",
    paper="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, arXiv:2211.10438",
)
@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Even out the inputs of maps behind norms, then round weights and activations."""

    alpha: float = option(0.5, between(0, 1), "share of the difficulty that the weights take; 0: none")
    bits: int = option(8, one_of(2, 3, 4, 5, 6, 7, 8, 16), "bits of a weight, one scale an output; 16: as they are")
    activation_bits: int = option(8, one_of(2, 3, 4, 5, 6, 7, 8, 16), "bits of an input; 16: as they are")
    granularity: str = option(
        "token", one_of("token", "tensor"), "what of the inputs shares a scale, found as it comes"
    )

    def __post_init__(self) -> None:
        if self.bits == 16 and self.activation_bits != 16:
            raise OptionError(
                "quantize.smoothquant: bits = 16 with narrow activations; give bits = 8, or activation_bits = 16 to "
                "smooth alone"
            )

    @torch.no_grad()
    def change(self, model: Model, work: Work) -> None:
        """Smooth the groups that selected maps are of, and round the linear ones of the selected maps.

        Raises:
            DataError: no calibration data.
            OptionError: no selected map is a linear layer.
            FormError: a selected map that is compact already.
        """
        windows, maps = work.inputs("quantize.smoothquant"), linear_maps(model, work.maps, "quantize.smoothquant")
        statistics = work.statistics({"absolute"})
        proven = sources(model, windows)
        groups: dict[str, list[Map]] = {}
        for one in model.anatomy.layers():
            if one.input_group in {selected.input_group for selected in maps}:
                groups.setdefault(one.input_group, []).append(one)
        scales = {}
        for group, members in groups.items():
            if group in proven and proven[group].kind != "linear":
                read_by = [anatomy.matrix(model.module, member).float() for member in members]
                largest = statistics[members[0].name].need("absolute_max", "quantize.smoothquant")
                scales[group] = smoothing(largest, read_by, self.alpha)
        if self.alpha > 0:
            fold(model, windows, scales)
        if self.bits == 16:
            return
        for done, one in enumerate(maps):
            weight = Quantized.nearest(anatomy.matrix(model.module, one).float(), bits=self.bits, symmetric=True)
            anatomy.replace(model.module, one.path, weight)
            if self.activation_bits < 16:
                model.module.get_submodule(one.path).activation = Activation(
                    bits=self.activation_bits, symmetric=True, granularity=self.granularity,  # type: ignore[arg-type]
                )  # fmt: skip
            work.report("quantize.smoothquant", done + 1, len(maps))
