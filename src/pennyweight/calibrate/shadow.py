"""A model's own code without its weights: they are put in where they are needed, in the dtype it computes in.

The walk runs the model's own forward on such a shadow, so that masks, positions and whatever stands between blocks are
the model's business; and since a block is filled when it is entered and emptied when it is left, one block's weights
are in memory at a time, wherever they come from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pennyweight.evaluate.forward import native_dtype
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.weights import Dense, Weight
from pennyweight.weights.layers import CompactEmbedding


class Source(Protocol):
    """Where weights come from."""

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer ``name`` of the model, in the dtype it is kept in."""

    def weight(self, found: Map) -> Weight:
        """What the layer of a map holds."""


class Memory:
    """The weights of a model in memory."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        layer = self.module.get_submodule(path)
        # a compact layer's shadow holds the matrix of its weight
        held = layer.dense() if isinstance(layer, Weight) else getattr(layer, leaf)
        assert isinstance(held, Tensor)
        return held.detach()

    def weight(self, found: Map) -> Weight:
        held = getattr(self.module.get_submodule(found.path), found.parameter)
        return held if isinstance(held, Weight) else Dense(anatomy.matrix(self.module, found))


def hollow(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with parameters on the meta device, compact weights as dense ones; buffers are copied."""
    stands_for: dict[int, object] = {}
    for layer in module.modules():
        if isinstance(layer, Weight):
            with torch.device("meta"):
                stands_for[id(layer)] = Dense(torch.empty(layer.shape))
    for parameter in module.parameters():
        stands_for[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(module, stands_for)


class Shadow:
    """A hollow module, and the source that fills it.

    Args:
        module: hollow; it is the shadow's own from now on.
        source: of its tensors.
        dtype: what it computes in; parameters are put in as this.
    """

    def __init__(self, module: nn.Module, source: Source, dtype: torch.dtype) -> None:
        self.module, self.source, self.dtype = module.eval(), source, dtype
        self._holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
        self._meta: dict[int, nn.Parameter] = {}
        self._name_of: dict[str, int] = {}
        # some tensors are kept in float32 by decree, and batch normalization mixes dtypes by itself
        pinned = getattr(module, "_keep_in_fp32_modules_strict", None) or ()
        self._pinned = re.compile("|".join(map(re.escape, pinned))) if pinned else None
        self._batch_norms = tuple(
            f"{path}." for path, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        )
        for path, layer in module.named_modules(remove_duplicate=False):
            for leaf, parameter in layer._parameters.items():
                if parameter is not None:
                    name = f"{path}.{leaf}" if path else leaf
                    self._holders.setdefault(id(parameter), []).append((name, layer, leaf))
                    self._meta[id(parameter)] = parameter
                    self._name_of[name] = id(parameter)
        self._settle_buffers()
        for layer in module.modules():  # an encoder and a decoder have configurations of their own
            config: Any = getattr(layer, "config", None)
            if getattr(config, "use_cache", False):
                config.use_cache = False

    def _settle_buffers(self) -> None:
        for path, layer in self.module.named_modules():
            for leaf, buffer in layer._buffers.items():
                if buffer is None or not buffer.is_floating_point():
                    continue
                name = f"{path}.{leaf}" if path else leaf
                # what is computed from the configuration (frequencies of positions) keeps its precision
                computed = leaf in layer._non_persistent_buffers_set and not isinstance(layer, CompactEmbedding)
                layer._buffers[leaf] = buffer if computed else buffer.to(self._dtype_of(name))

    def _dtype_of(self, name: str) -> torch.dtype:
        keep = name.startswith(self._batch_norms) or (self._pinned is not None and self._pinned.search(name))
        return max(self.dtype, torch.float32, key=lambda dtype: dtype.itemsize) if keep else self.dtype

    def names(self) -> tuple[str, ...]:
        """Names of all parameters; a tied one under each of its names."""
        return tuple(self._name_of)

    @torch.no_grad()
    def fill(self, names: Iterable[str]) -> None:
        """Put the parameters ``names`` in; a tensor that is in already under another name is shared with it."""
        for name in names:
            key = self._name_of[name]
            holders = self._holders[key]
            here = [
                layer._parameters[leaf] for _, layer, leaf in holders if layer._parameters[leaf] is not self._meta[key]
            ]
            if not here:
                tensor = self.source.tensor(holders[0][0])
                here = [nn.Parameter(tensor.to(self._dtype_of(name)), requires_grad=False)]
            for held, layer, leaf in holders:
                if held == name:
                    layer._parameters[leaf] = here[0]

    def empty(self, names: Iterable[str]) -> None:
        """Take the parameters ``names`` out."""
        for name in names:
            key = self._name_of[name]
            for held, layer, leaf in self._holders[key]:
                if held == name:
                    layer._parameters[leaf] = self._meta[key]

    @torch.no_grad()
    def put(self, found: Map, weight: Weight) -> None:
        """Let the layer of a map, which is filled, and every layer tied to it, compute with ``weight``."""
        layer = self.module.get_submodule(found.path)
        held = getattr(layer, found.parameter)
        name = f"{found.path}.{found.parameter}" if found.path else found.parameter
        parameter = held.matrix if isinstance(held, Dense) else held
        name = f"{name}.matrix" if isinstance(held, Dense) else name
        matrix = weight.dense().detach()
        matrix = matrix.T if found.kind == "conv1d-transposed" else matrix
        new = nn.Parameter(matrix.reshape(parameter.shape).to(parameter.dtype), requires_grad=False)
        key = self._name_of[name]
        for _, layer, leaf in self._holders[key]:
            if layer._parameters[leaf] is parameter:
                layer._parameters[leaf] = new


def compute_dtype(module: nn.Module) -> torch.dtype:
    """What calibration computes in: float64 for a float64 model, bfloat16 where the device has it, else float32."""
    parameter = next(module.parameters(), torch.empty(0))
    if parameter.dtype == torch.float64:
        return torch.float64
    return native_dtype(parameter.device.type)
