"""The framework's layers, holding a `Weight` where they held a matrix.

Each computes what the layer it replaces computes, in the dtype of its input. A tied head is a `CompactLinear` that
holds the same `Weight` object as the `CompactEmbedding`.

Shape letters: M out features or channels, N in features, C in channels, K kernel positions; ... any leading dimensions.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import reduce, singledispatch
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import OptionError, ShapeError
from pennyweight.weights.activations import Activation
from pennyweight.weights.combine import Product, Sum
from pennyweight.weights.l_mul import LMul, Products
from pennyweight.weights.low_rank import LowRank
from pennyweight.weights.weight import Weight


def _bias(bias: Tensor | None, weight: Weight, where: str) -> nn.Parameter | None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"{where}: bias {tuple(bias.shape)} for a weight {weight.shape}; give ({weight.shape[0]},)")
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)


class CompactLinear(nn.Module):
    """``x @ W.T + bias``: (..., N) -> (..., M).

    Args:
        weight: (M, N).
        bias: (M,), or None.
        activation: what rounds the input, or None; it may be set later.
        product: how matrix products are taken, or None for torch's own; it may be set later.
    """

    activation: Activation | None

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        activation: Activation | None = None,
        product: LMul | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = _bias(bias, weight, "CompactLinear")
        self.register_module("activation", activation)
        self.product = product

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(f"CompactLinear: input {tuple(x.shape)} for a weight {self.weight.shape}; give (..., in)")
        with nullcontext() if self.product is None else Products(self.product):
            found: Tensor = self.weight(x if self.activation is None else self.activation(x))
        return found if self.bias is None else found + self.bias.to(found.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class CompactEmbedding(nn.Module):
    """Rows of W by index, times ``factor``: (...) -> (..., N).

    Args:
        weight: (M, N), a row for each entry of the vocabulary.
        padding_idx: the row that gets no gradient, as in ``nn.Embedding``.
        factor: what the model multiplies its embeddings by (Gemma: the square root of the width).
        dtype: of the output, followed by ``.to(dtype)``; None for that of ``weight``. Quantized weights compute in
            float32, which is seldom what the rest of the model does.
    """

    output: Tensor

    def __init__(
        self,
        weight: Weight,
        padding_idx: int | None = None,
        factor: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise OptionError(f"CompactEmbedding: padding_idx {padding_idx} is not one of {weight.shape[0]} rows")
        self.weight = weight
        self.padding_idx = None if padding_idx is None else padding_idx % weight.shape[0]
        self.factor = factor
        # holds nothing and is not saved: it is how .to(dtype), .half(), ... reach an output that no parameter tells
        like = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        self.register_buffer("output", like, persistent=False)

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, index: Tensor) -> Tensor:
        found = self.weight.rows(index).to(self.output.dtype)
        if self.padding_idx is not None and found.requires_grad:
            found = torch.where((index == self.padding_idx)[..., None], found.detach(), found)
        # a factor that models hold in the dtype of their embeddings is rounded as they round it
        return found if self.factor == 1.0 else found * found.new_tensor(self.factor)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, factor={self.factor}"


class _CompactConv(nn.Module):
    """What both convolutions share; W is (out_channels, in_channels / groups * K), the kernel flattened row-major."""

    dimensions: int
    activation: Activation | None

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = (self._each(v) for v in (kernel_size, stride, dilation))
        self.padding = padding if isinstance(padding, str) else self._each(padding)
        self.groups, self.padding_mode = groups, padding_mode
        name, positions = type(self).__name__, prod(self.kernel_size)
        if weight.shape[1] % positions or weight.shape[0] % groups:
            raise ShapeError(
                f"{name}: a weight {weight.shape} is not (out, in / groups * {positions}) for kernel "
                f"{self.kernel_size} in {groups} groups"
            )
        if activation is not None and activation.keep_first_token:
            raise OptionError(f"{name}: the positions of a convolution are no tokens; give keep_first_token=False")
        self.weight = weight
        self.bias = _bias(bias, weight, name)
        self.register_module("activation", activation)

    @classmethod
    def _of(cls, layer: nn.Conv1d | nn.Conv2d, weight: Weight) -> Any:
        if weight.shape != (layer.out_channels, layer.weight[0].numel()):
            there = (layer.out_channels, layer.weight[0].numel())
            raise ShapeError(f"{cls.__name__}: a weight {weight.shape} for a layer whose matrix is {there}")
        return cls(
            weight,
            layer.bias,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
        )

    def _each(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        found = (value,) * self.dimensions if isinstance(value, int) else tuple(value)
        if len(found) != self.dimensions:
            raise ShapeError(f"{type(self).__name__}: {value} has not {self.dimensions} entries")
        return found

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] // prod(self.kernel_size) * self.groups

    def forward(self, x: Tensor) -> Tensor:
        """(batch, C, *positions) -> (batch, M, *positions)."""
        if self.activation is not None:  # a token is a position, its channels the features
            x = self.activation(x.movedim(1, -1)).movedim(-1, 1)
        found = _convolve(self.weight, self._padded(x), self)
        return found if self.bias is None else found + self.bias.to(found.dtype).view(-1, *(1,) * self.dimensions)

    def _padded(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros" or self.padding == "valid":
            return x
        if self.padding == "same":
            whole = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in whole]
        else:
            sides = [(int(p), int(p)) for p in self.padding]
        flat = [side for pair in reversed(sides) for side in pair]  # `pad` starts from the last dimension
        return functional.pad(x, flat, mode=self.padding_mode)

    def kernel(self, matrix: Tensor, x: Tensor) -> Tensor:
        """``x`` (padded unless by zeros) convolved with ``matrix`` (any number of rows, N)."""
        matrix = matrix.to(x.dtype).reshape(matrix.shape[0], -1, *self.kernel_size)
        padding: Any = self.padding if self.padding_mode == "zeros" else 0
        convolution: Any = functional.conv1d if self.dimensions == 1 else functional.conv2d
        found: Tensor = convolution(x, matrix, None, self.stride, padding, self.dilation, self.groups)
        return found

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class CompactConv1d(_CompactConv):
    """``nn.Conv1d`` whose kernel, flattened to a matrix, is a `Weight`; the same settings."""

    dimensions = 1

    @classmethod
    def of(cls, layer: nn.Conv1d, weight: Weight) -> CompactConv1d:
        """``layer`` with ``weight`` in place of its kernel; the bias is shared."""
        made: CompactConv1d = cls._of(layer, weight)
        return made


class CompactConv2d(_CompactConv):
    """``nn.Conv2d`` whose kernel, flattened to a matrix, is a `Weight`; the same settings."""

    dimensions = 2

    @classmethod
    def of(cls, layer: nn.Conv2d, weight: Weight) -> CompactConv2d:
        """``layer`` with ``weight`` in place of its kernel; the bias is shared."""
        made: CompactConv2d = cls._of(layer, weight)
        return made


@singledispatch
def _convolve(weight: Weight, x: Tensor, layer: _CompactConv) -> Tensor:
    """The convolution without its bias; forms with a cheaper way than their kernel register it below."""
    return layer.kernel(weight.dense(), x)


@_convolve.register
def _(weight: Sum, x: Tensor, layer: _CompactConv) -> Tensor:
    return reduce(torch.add, (_convolve(term, x, layer) for _, term in weight.named_terms()))


@_convolve.register
def _(weight: LowRank, x: Tensor, layer: _CompactConv) -> Tensor:
    if layer.groups > 1:  # the rank is shared by all groups
        return layer.kernel(weight.dense(), x)
    found = layer.kernel(weight.down, x)
    return (found.movedim(1, -1) @ weight.up.T.to(x.dtype)).movedim(-1, 1)


@_convolve.register
def _(weight: Product, x: Tensor, layer: _CompactConv) -> Tensor:
    if layer.groups > 1:
        return layer.kernel(weight.dense(), x)
    *rest, (_, last) = weight.named_terms()
    found = _convolve(last, x, layer).movedim(1, -1)
    for _, term in reversed(rest):
        found = term.forward(found)
    return found.movedim(-1, 1)
