"""Compute in bits: multiply-accumulates, each counted by the width of what it multiplies.

Row 124. Source: A. Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", arXiv:2105.03536, and its
code (google/aqt, compute_cost_utils): "quadratic" counts the bits of the weight times the bits of the input, what a
multiplier takes in silicon; "linear" the wider of the two, rounded up to the 4, 8 or 16 bits that units come in.
Differs from the source: products of two activations (attention) are left out; wider values count as 16 bits.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from pennyweight.errors import ModelError, OptionError
from pennyweight.measure.cost import cost
from pennyweight.measure.probe import Inputs
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.weights import Quantized

Mode = Literal["quadratic", "linear"]
_FLOAT = 16
_UNITS = (4, 8, 16)


@dataclass(frozen=True)
class BitMacs:
    """Compute of one unit (a token, an image).

    Attributes:
        total: MACs times bits.
        layers: the same by map name.
        macs: multiply-accumulates alone.
        of_bf16: ``total`` over what 16-bit weights and inputs would count.
    """

    total: float
    layers: Mapping[str, float]
    macs: float
    of_bf16: float


def bit_macs(
    model: Model | nn.Module,
    mode: Mode = "quadratic",
    *,
    inputs: Inputs | None = None,
    widths: Mapping[str, tuple[int, int]] | None = None,
) -> BitMacs:
    """Count ``model``; widths are read off compact layers, 16 bits where there are none.

    Args:
        model: a `Model` or any module; it is run once.
        mode: "quadratic" or "linear".
        inputs: what to run it on; see `pennyweight.measure.cost`.
        widths: map name -> (bits of the weight, bits of the input), for layers that are yet to get them.

    Raises:
        OptionError: an unknown mode, or widths of a layer that is not there.
        ModelError: the model does not say what it takes; give inputs.
    """
    if mode not in ("quadratic", "linear"):
        raise OptionError(f"bit_macs: mode = {mode!r}; give quadratic or linear")
    module = model.module if isinstance(model, Model) else model
    costs = cost(model, inputs=inputs)
    maps = {one.name: one for one in anatomy.of(module).whole}
    given = dict(widths or {})
    if unknown := sorted(set(given) - set(maps)):
        raise OptionError(
            f"bit_macs: {unknown[0]!r} is no layer of this model; there are {', '.join(list(maps)[:4])} ..."
        )
    layers: dict[str, float] = {}
    macs = 0.0
    for layer in costs.layers:
        one = maps[layer.name]
        if one.kind == "embedding":
            continue
        if layer.rows is None:
            raise ModelError("bit_macs: this model does not say what it takes; give inputs=...")
        found = layer.rows * layer.shape[0] * layer.shape[1]
        macs += found
        layers[layer.name] = found * _price(*(given.get(layer.name) or _widths(module, one.path)), mode)
    total = sum(layers.values())
    return BitMacs(total, layers, macs, total / (macs * _price(_FLOAT, _FLOAT, mode)) if macs else 0.0)


def _widths(module: nn.Module, path: str) -> tuple[int, int]:
    layer = module.get_submodule(path)
    weight, activation = getattr(layer, "weight", None), getattr(layer, "activation", None)
    return weight.bits if isinstance(weight, Quantized) else _FLOAT, getattr(activation, "bits", _FLOAT)


def _price(weight: int, values: int, mode: Mode) -> int:
    weight, values = min(weight, _FLOAT), min(values, _FLOAT)
    if mode == "quadratic":
        return weight * values
    return next(unit for unit in _UNITS if max(weight, values) <= unit)
