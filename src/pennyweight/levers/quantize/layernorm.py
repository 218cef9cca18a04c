"""Activations behind LayerNorms, quantized channel by channel with clipped ranges at the price of one range.

Row 56. Sources: N. Ranjan and A. Savakis, "LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise
Relevance Propagation", arXiv:2401.11243 (clipping each channel); Z. Li et al., "RepQ-ViT: Scale Reparameterization for
Post-Training Quantization of Vision Transformers", arXiv:2212.08254 (the folding).

Channels behind a LayerNorm differ in range by far: one range for all wastes most levels on most of them, but a scale
for each cannot be taken out of a product of integers. So, for channel c with scale s_c and zero point z_c, and s and z
their means (z rounded), ``x'_c = s / s_c * x_c + s (z_c - z)`` is what the norm gives once its own weight and bias have
taken the change up, and the layers behind it take it back in theirs. One range (s, z) for x' then rounds x exactly
as a range for each channel would. Without rounding the function is the same.

Differs from the sources: the paper's clipping is not public in detail; here each channel is cut at the percentile, out
of several, that rounds it with the least squared error (RepQ-ViT does so from 99.9 % on; the lower ones clip).

Shape letters: N features behind a norm, M out features of a layer behind it; ... leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import OptionError
from pennyweight.evaluate.forward import first_tensor, looking
from pennyweight.lever import between, lever, one_of, option
from pennyweight.model.anatomy import Map
from pennyweight.model.compact import compact_layer
from pennyweight.model.model import Model
from pennyweight.weights import Activation, Dense
from pennyweight.work import Work

#: Percentiles tried for each channel down to the one that is asked for.
_PERCENTILES = (100.0, 99.99, 99.9, 99.5, 99.0, 98.0, 95.0)


@lever(
    "quantize.layernorm",
    reach="model",
    row=56,
    paper="LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance Propagation, "
    "arXiv:2401.11243",
)
@dataclass(frozen=True, kw_only=True)
class ClippedLayerNorm:
    """Round what LayerNorms give to linear layers: a clipped range for each channel, folded into norm and layer."""

    bits: int = option(4, between(2, 8), "bits of a value")
    percentile: float = option(
        99.9, between(90, 100), "least share of a channel's values inside its range, in %; 100: nothing is clipped"
    )
    granularity: Literal["channel", "tensor"] = option(
        "channel", one_of("channel", "tensor"), "what has a range of its own; tensor: one for all, and nothing to fold"
    )

    def change(self, model: Model, work: Work) -> None:
        """Fold the norms whose output nothing else reads than selected layers, and give these their `Activation`.

        Raises:
            OptionError: no such norm.
            DataError: no calibration data.
        """
        readers = _readers(model, work)
        if not readers:
            raise OptionError(
                "quantize.layernorm: no LayerNorm gives its output to selected linear layers alone; select all that "
                "read it, or round inputs with quantize.activations"
            )
        seen = _outputs(model, work, list(readers))
        for done, (path, maps) in enumerate(readers.items(), 1):
            scale, zero = self.ranges(seen[path])
            self._fold(model, model.module.get_submodule(path), maps, scale, zero)
            work.report("folding norms", done, len(readers))

    def ranges(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel, (N,) each, for outputs ``rows`` (..., N) of a norm."""
        values = rows.reshape(-1, rows.shape[-1]).float()
        values = values.reshape(-1, 1) if self.granularity == "tensor" else values
        best, scale, zero = None, torch.zeros(0), torch.zeros(0)
        for percentile in sorted({self.percentile, *(p for p in _PERCENTILES if p >= self.percentile)}, reverse=True):
            low, high = _quantile(values, 1 - percentile / 100), _quantile(values, percentile / 100)
            tried = Activation.from_range(low, high, bits=self.bits, granularity="channel")
            assert tried.scale is not None
            assert tried.zero is not None
            loss = (tried(values) - values).square().mean(0)
            better = torch.ones_like(loss, dtype=torch.bool) if best is None else loss < best
            best = loss if best is None else torch.where(better, loss, best)
            scale = tried.scale if not len(scale) else torch.where(better, tried.scale, scale)
            zero = tried.zero.float() if not len(zero) else torch.where(better, tried.zero.float(), zero)
        return scale, zero

    def _fold(self, model: Model, norm: nn.Module, maps: Sequence[Map], scale: Tensor, zero: Tensor) -> None:
        mean, middle = scale.mean(), zero.mean().round()
        if self.granularity == "channel":
            ratio, shift = scale / mean, mean * (zero - middle)  # x' = x / ratio + shift
            reparametrize(norm, [compact_layer(model.module, one) for one in maps], ratio, shift)
        for one in maps:
            layer = compact_layer(model.module, one)
            layer.activation = Activation(
                bits=self.bits, granularity="tensor", scale=mean[None].clone(), zero=middle[None].to(torch.int32)
            )


@torch.no_grad()
def reparametrize(norm: Any, layers: Sequence[Any], ratio: Tensor, shift: Tensor) -> None:
    """Make ``norm`` give ``x / ratio + shift`` instead of x, and the ``layers`` that read it take that back.

    Args:
        norm: with weight and bias (N,).
        layers: compact ones of dense weights (M, N); one without a bias gets one.
        ratio: (N,), above zero.
        shift: (N,).
    """
    for layer in layers:
        matrix = layer.weight.dense().detach()
        wide = matrix.double() * ratio.double()
        taken = (wide @ shift.double()).to(matrix.dtype)
        layer.weight = Dense(wide.to(matrix.dtype))
        layer.bias = nn.Parameter(-taken if layer.bias is None else layer.bias - taken)
    norm.weight.copy_(norm.weight / ratio)
    norm.bias.copy_(norm.bias / ratio + shift)


def _quantile(values: Tensor, share: float) -> Tensor:
    """(N,) of ``values`` (R, N), between the two nearest rows; `torch.quantile` refuses large inputs."""
    ordered = values.sort(0).values
    place = share * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def _readers(model: Model, work: Work) -> dict[str, list[Map]]:
    """The LayerNorms whose output goes to selected linear layers and nowhere else, with these layers."""
    module = model.module
    linear = {one.path: one for one in work.maps if one.kind == "linear" and one.replaceable and one.tied_to is None}
    found: dict[str, list[Map]] = {}
    given: dict[str, Tensor] = {}
    norms = [p for p in model.anatomy.norms if _has_affine(module.get_submodule(p))]

    def gives(path: str) -> Callable[..., None]:
        return lambda _, __, output: given.__setitem__(path, output)

    def reads(one: Map) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for path, output in given.items():
                if inputs and inputs[0] is output:
                    found.setdefault(path, []).append(one)

        return hook

    hooks = [module.get_submodule(path).register_forward_hook(gives(path)) for path in norms]
    hooks += [module.get_submodule(path).register_forward_pre_hook(reads(one)) for path, one in linear.items()]
    try:
        with looking(module):
            _call(model, work, 1)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: found[path] for path in norms if path in found and not _leaks(model, work, path, found[path])}


def _has_affine(norm: nn.Module) -> bool:
    return all(isinstance(getattr(norm, name, None), nn.Parameter) for name in ("weight", "bias")) and isinstance(
        norm, nn.LayerNorm
    )


def _leaks(model: Model, work: Work, path: str, maps: Sequence[Map]) -> bool:
    """Whether something else reads the norm: what is added behind it and taken away before ``maps`` then shows."""
    module = model.module
    with looking(module):
        before = _call(model, work, 1)
        norm = module.get_submodule(path)
        # differs from channel to channel: the next norm would not see a constant
        extra = torch.linspace(-1, 1, norm.weight.numel()).to(norm.weight)  # type: ignore[operator, arg-type]
        hooks = [norm.register_forward_hook(lambda _, __, output: output + extra)]
        for one in maps:
            layer = module.get_submodule(one.path)
            hooks.append(layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] - extra, *inputs[1:])))
        try:
            after = _call(model, work, 1)
        finally:
            for hook in hooks:
                hook.remove()
    return bool((after - before).abs().max() > 1e-3 * before.abs().max())


def _outputs(model: Model, work: Work, paths: Sequence[str]) -> dict[str, Tensor]:
    """All outputs of the norms at ``paths`` on the calibration data, (R, N) each."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str) -> Callable[..., None]:
        return lambda _, __, output: seen[path].append(output.detach().flatten(0, -2))

    hooks = [model.module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        with looking(model.module):
            _call(model, work, None)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def _call(model: Model, work: Work, count: int | None) -> Tensor:
    inputs = inputs_of(model, work.inputs("quantize.layernorm"))
    if isinstance(inputs, Mapping):
        return first_tensor(model.module(**{name: tensor[:count] for name, tensor in inputs.items()}))
    return first_tensor(model.module(*(tensor[:count] for tensor in inputs)))
