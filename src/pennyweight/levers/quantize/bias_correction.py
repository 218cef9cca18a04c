"""Bias correction: the shift that rounding gives the mean output of a layer is taken out of its bias.

Source: M. Nagel, M. van Baalen, T. Blankevoort and M. Welling, "Data-Free Quantization Through Weight Equalization and
Bias Correction", arXiv:1906.04721, section 4.2: E[W x] - E[Q x] = (W - Q) E[x] is added to the bias. Differs from the
source: E[x] is measured on calibration data (its appendix D), of the model before any rounding; the maps are rounded by
the same step.

Shape letters: M out features, N in features, B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pennyweight.calibrate.walk import Windows, cast, inputs_of
from pennyweight.errors import OptionError
from pennyweight.evaluate.forward import looking
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import anatomy
from pennyweight.model.compact import dtype_of
from pennyweight.solvers.folding import linear_maps
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense

if TYPE_CHECKING:
    from pennyweight.model.anatomy import Map
    from pennyweight.model.model import Model
    from pennyweight.work import Work

_BATCH = 8


@torch.no_grad()
def mean_inputs(model: Model, windows: Windows, maps: Sequence[Map]) -> dict[str, Tensor]:
    """(N,) float64 by name: what each of ``maps`` reads on average, tokens with ``attention_mask`` 0 left out."""
    inputs = cast(inputs_of(model, windows), dtype_of(model.module))
    tensors: dict[Any, Tensor] = dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    kept: list[Tensor | None] = [None]

    def add(name: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            x, mask = args[0], kept[0]
            rows = x[mask] if mask is not None and x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])
            total[name] = total.get(name, 0) + rows.sum(0, dtype=torch.float64)
            count[name] = count.get(name, 0) + len(rows)

        return hook

    handles = [model.module.get_submodule(one.path).register_forward_pre_hook(add(one.name)) for one in maps]
    try:
        with looking(model.module):
            for start in range(0, len(next(iter(tensors.values()))), _BATCH):
                part = {name: tensor[start : start + _BATCH] for name, tensor in tensors.items()}
                mask = part.get("attention_mask")
                kept[0] = None if mask is None else mask.bool()
                model.module(**part) if isinstance(inputs, Mapping) else model.module(*part.values())
    finally:
        for handle in handles:
            handle.remove()
    return {name: found / max(1, count[name]) for name, found in total.items()}


@lever(
    "quantize.bias_correction",
    reach="model",
    paper="Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv:1906.04721",
)
@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Round maps, and put the mean of what that does to their outputs into their biases."""

    method: str = option("rtn", one_of("rtn", "gptq"), "what rounds: to nearest, or with error feedback")
    bits: int = option(4, between(1, 8), "bits of a code")
    group_size: int | None = option(128, at_least(1), "input features that share a scale; none: the whole row")
    zero: str = option("integer", one_of("none", "integer", "float"), "zero of a group; none: symmetric")

    @torch.no_grad()
    def change(self, model: Model, work: Work) -> None:
        """Round the linear ones of the selected maps; those without a bias are rounded alone.

        Raises:
            DataError: no calibration data.
            OptionError: none of the maps has a bias, or is a linear layer.
            FormError: a selected map that is compact already.
        """
        where = "quantize.bias_correction"
        windows, maps = work.inputs(where), linear_maps(model, work.maps, where)
        biased = [m for m in maps if getattr(model.module.get_submodule(m.path), "bias", None) is not None]
        if not biased:
            raise OptionError(
                f"{where}: none of the {len(maps)} selected maps has a bias to correct; use quantize.{self.method}"
            )
        mean = mean_inputs(model, windows, biased)
        rounding = {"rtn": RTN, "gptq": GPTQ}[self.method](bits=self.bits, group_size=self.group_size, zero=self.zero)
        found = work.statistics({"second_moment"}) if self.method == "gptq" else {}
        for done, one in enumerate(maps):
            matrix = anatomy.matrix(model.module, one).float().clone()
            weight = rounding.solve(Dense(matrix), found.get(one.name, NO_STATISTICS))
            anatomy.replace(model.module, one.path, weight)
            if one.name in mean:
                bias: Any = model.module.get_submodule(one.path).bias
                bias.add_(((matrix - weight.dense()).double() @ mean[one.name]).to(bias))
            work.report(where, done + 1, len(maps))
