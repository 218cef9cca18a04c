"""Quantized activations: layers round what they read.

Sources: Z. Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
arXiv:2206.01861 (a range for each token, found as it comes); B. Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877 (ranges from calibration data);
A. Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", arXiv:2105.03536 (the mean of the largest
values); T. Zhao et al., "MixDQ", arXiv:2405.17873 (the first token kept). Differs from them: values are rounded and
stay floating point, so that nothing gets faster here.

Shape letters: N in features, R rows (tokens, positions), S sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import DataError, OptionError
from pennyweight.evaluate.forward import looking
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.levers.quantize.ranges import find_range
from pennyweight.model.anatomy import Map
from pennyweight.model.compact import compact_layer
from pennyweight.model.model import Model
from pennyweight.weights import Activation
from pennyweight.weights.activations import FLOATS
from pennyweight.work import Work

_SAMPLED = ("percentile", "mse", "kl")


@lever(
    "quantize.activations",
    reach="model",
    paper="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers, "
    "arXiv:2206.01861",
)
@dataclass(frozen=True, kw_only=True)
class Activations:
    """Round the inputs of linear maps and convolutions; embeddings, which read indices, are passed over."""

    bits: int = option(8, between(2, 16), "bits of a value")
    format: str = option("integer", one_of("integer", *FLOATS), "what a value is rounded to")
    symmetric: bool = option(False, one_of(True, False), "integers around zero; false: a zero point")
    granularity: Literal["token", "tensor", "channel"] = option(
        "token", one_of("token", "tensor", "channel"), "what shares a range: a position, the whole input, a feature"
    )
    static: bool = option(False, one_of(True, False), "fix the ranges on calibration data; false: as values come")
    range: Literal["min-max", "mean", "percentile", "mse", "kl"] = option(
        "min-max", one_of("min-max", "mean", *_SAMPLED), "static ranges; mean: of the extremes of each window"
    )
    percentile: float = option(99.9, between(50.1, 100), "share of the values inside the range 'percentile', in %")
    samples: int = option(512, at_least(1), "rows of each input that the ranges percentile, mse and kl are taken from")
    keep_first_token: bool = option(False, one_of(True, False), "leave the first position of a sequence as it is")

    def __post_init__(self) -> None:
        Activation(bits=self.bits, format=self.format)  # refuses bits that the format does not have
        if self.format != "integer" and self.symmetric:
            raise OptionError(
                f"quantize.activations: symmetric has no effect on format {self.format}, which always is; leave it out"
            )
        if self.static and self.granularity == "token":
            raise OptionError(
                "quantize.activations: static ranges of tokens do not exist; give granularity = tensor or channel"
            )
        if not self.static and self.range != "min-max":
            raise OptionError(f"quantize.activations: range = {self.range!r} has no effect without static = true")
        if self.format != "integer" and self.range in ("mse", "kl"):
            raise OptionError(
                f"quantize.activations: range = {self.range!r} is defined on integers; give min-max, mean or percentile"
            )

    def change(self, model: Model, work: Work) -> None:
        """Give every selected layer an `Activation`, plain layers becoming compact ones that hold the same matrix.

        Raises:
            OptionError: the selection reads nothing that can be rounded, or the first of experts' tokens is to be kept.
            DataError: static ranges without data, or a layer that no input reached.
        """
        chosen = [found for found in work.maps if found.kind in _KINDS]
        if not chosen:
            raise OptionError("quantize.activations: the selection holds no linear map or convolution; widen it")
        if self.keep_first_token:
            self._check_positions(chosen)
        made = self._static(model, work, chosen) if self.static else {}
        for found in chosen:
            layer = compact_layer(model.module, found)
            layer.activation = made.get(found.name) or self._like()

    def _check_positions(self, chosen: list[Map]) -> None:
        for found in chosen:
            if found.role.startswith("moe.experts") or "conv" in _KINDS[found.kind]:
                raise OptionError(
                    f"quantize.activations: keep_first_token for {found.name}, whose inputs are not a sequence of "
                    "tokens; leave it out of the selection (where)"
                )

    def _like(self) -> Activation:
        return Activation(
            bits=self.bits, format=self.format, symmetric=self.symmetric, granularity=self.granularity,
            keep_first_token=self.keep_first_token,
        )  # fmt: skip

    def _static(self, model: Model, work: Work, chosen: list[Map]) -> dict[str, Activation]:
        observers = {
            # what reads the same is looked at once, and shares one range
            found.input_group: Observer(
                first=int(self.keep_first_token), samples=self.samples if self.range in _SAMPLED else 0, seed=work.seed
            )
            for found in chosen
        }
        first = {found.input_group: found for found in reversed(chosen)}
        observe(model, work, {found.path: observers[group] for group, found in first.items()})
        ranges = {group: self._activation(observer, first[group].name) for group, observer in observers.items()}
        return {found.name: ranges[found.input_group] for found in chosen}

    def _activation(self, seen: Observer, name: str) -> Activation:
        low, high = seen.range(name, whole=self.granularity == "tensor", mean=self.range == "mean")
        if self.range in _SAMPLED:
            rows = seen.rows()  # (S, N)
            rows = rows.T if self.granularity == "channel" else rows.reshape(1, -1)
            method: Any = self.range
            symmetric = self.symmetric or self.format != "integer"
            low, high = find_range(rows, method, bits=self.bits, symmetric=symmetric, percentile=self.percentile)
        return Activation.from_range(
            low, high, bits=self.bits, format=self.format, symmetric=self.symmetric, granularity=self.granularity,
            keep_first_token=self.keep_first_token,
        )  # fmt: skip


#: Maps whose inputs are values, and how their layers take them.
_KINDS = {"linear": "linear", "conv1d-transposed": "linear", "conv1d": "conv", "conv2d": "conv"}


@dataclass
class Observer:
    """Extremes of the inputs of one layer, and a sample of them.

    Args:
        first: positions of each sequence that are not looked at.
        samples: rows kept, drawn alike from all that came; 0 for none.
        seed: of the draw.
    """

    first: int = 0
    samples: int = 0
    seed: int = 0
    _windows: list[Tensor] = field(default_factory=list, repr=False)
    _kept: Tensor | None = field(default=None, repr=False)
    _keys: Tensor | None = field(default=None, repr=False)

    def see(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Look at an input (..., N) of one window; rows where ``mask`` (...) is 0 are left out."""
        if self.first:
            x, mask = x[..., self.first :, :], None if mask is None else mask[..., self.first :]
        rows = (x if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]).detach().float()
        rows = rows.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        self._windows.append(torch.stack([rows.amin(0), rows.amax(0)]))
        if self.samples:
            # the rows of smallest random key are a fair draw, however the rows are cut into windows
            generator = torch.Generator().manual_seed(self.seed + len(self._windows))
            keys = torch.rand(len(rows), generator=generator).to(rows.device)
            if self._kept is not None and self._keys is not None:
                rows, keys = torch.cat([self._kept, rows]), torch.cat([self._keys, keys])
            best = keys.argsort()[: self.samples]
            self._kept, self._keys = rows[best], keys[best]

    def range(self, name: str, *, whole: bool = False, mean: bool = False) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each feature (N,), or of the ``whole`` input (1,).

        ``mean``: the mean of what each window has for these.

        Raises:
            DataError: nothing came.
        """
        if not self._windows:
            raise DataError(f"quantize.activations: no input reached {name}; give more data, or leave it out (where)")
        low, high = torch.stack(self._windows, dim=1)  # (windows, N)
        if whole:
            low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        return (low.mean(0), high.mean(0)) if mean else (low.amin(0), high.amax(0))

    def rows(self) -> Tensor:
        """(S, N) sampled rows."""
        assert self._kept is not None, "asked for no samples, or saw nothing"
        return self._kept


def observe(model: Model, work: Work, observers: Mapping[str, Observer]) -> None:
    """Show every observer the inputs of the layer at its path, window by window.

    Raises:
        DataError: no windows, or inputs that the model does not take.
    """
    inputs = inputs_of(model, work.inputs("quantize.activations"))
    named = isinstance(inputs, Mapping)
    tensors: Mapping[Any, Tensor] = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    count = len(next(iter(tensors.values())))
    window: dict[Any, Tensor] = {}

    def watch(observer: Observer, channels_first: bool) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].movedim(1, -1) if channels_first else given[0]
            observer.see(x, window.get("attention_mask"))

        return hook

    hooks = []
    for path, observer in observers.items():
        layer = model.module.get_submodule(path)
        hooks.append(layer.register_forward_pre_hook(watch(observer, hasattr(layer, "kernel_size"))))
    try:
        with looking(model.module):
            for index in range(count):
                window = {name: tensor[index : index + 1] for name, tensor in tensors.items()}
                model.module(**window) if named else model.module(*window.values())
                work.report("observing activations", index + 1, count)
    finally:
        for hook in hooks:
            hook.remove()
