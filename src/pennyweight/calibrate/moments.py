"""Moments of the rows that a linear map multiplies: how they are found, and how they are summed.

A second moment is a Gram matrix summed in float32. Only the strips on and above its diagonal are computed. Rows that
come in bfloat16 may be multiplied in bfloat16 with products and sums in float32: exact, for a product of two bfloat16
numbers fits in a float32. The library then takes oneDNN in place of MKL. Measured on 16,384 rows and two cores of an
AMD EPYC with AVX-512: 576 wide 16 ms (the whole product by MKL 54 ms), 1536 wide 98 ms (381 ms), both 1.4e-7 from the
product in float64; a product that rounds its result to bfloat16 is 1.7e-3 from it, and can leave the matrix indefinite.

Shape letters: M out features, N in features, R rows, B batch, C channels, G groups of a convolution, P positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import DataError
from pennyweight.model.anatomy import Map
from pennyweight.statistics import Statistics

# rows a product and columns a strip: the fastest of 2048 to 16384 and 128 to 768 at widths of 576, 1536 and 2048
_ROWS = 2048
_STRIP = 192
_PATCH_BYTES = 1 << 26  # unfolded patches of images held at a time


class Moments:
    """Running moments of rows (R, N), in float32; taken once, by `statistics` or `second_moment`.

    Args:
        width: N.
        needs: which, out of "second_moment" and "absolute".
        device: where the rows lie.
    """

    def __init__(self, width: int, needs: Collection[str], device: torch.device) -> None:
        self.width, self.count, self.device = width, 0, device
        self._gram = torch.zeros(width, width, device=device) if "second_moment" in needs else None
        self._sum = torch.zeros(width, device=device) if "absolute" in needs else None
        self._max = torch.zeros(width, device=device) if "absolute" in needs else None

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in ``rows`` (R, N)."""
        assert rows.shape[-1] == self.width, f"rows {tuple(rows.shape)} for moments of width {self.width}"
        self.count += rows.shape[0]
        with _exact_products(rows.dtype):
            for chunk in torch.split(rows, _ROWS):
                self._add(chunk.float())

    def _add(self, rows: Tensor) -> None:
        if self._gram is not None:
            for start in range(0, self.width, _STRIP):
                strip = slice(start, start + _STRIP)
                self._gram[strip, start:].addmm_(rows[:, strip].T, rows[:, start:])
        if self._sum is not None and self._max is not None and len(rows):
            absolute = rows.abs()
            self._sum += absolute.sum(0)
            torch.maximum(self._max, absolute.amax(0), out=self._max)

    def second_moment(self) -> Tensor:
        """(N, N): the mean of ``x x^T``. The sums become it, so no rows can be added any more."""
        assert self._gram is not None, "not asked for, or taken"
        gram, self._gram = self._gram, None  # in place: of a wide layer two matrices are more than all its weights
        for start in range(0, self.width, _STRIP):
            strip, below = slice(start, start + _STRIP), slice(start + _STRIP, None)
            square = gram[strip, strip].triu()
            gram[strip, strip] = square + square.triu(1).T
            gram[below, strip] = gram[strip, below].T
        return gram.div_(max(self.count, 1))

    def statistics(self, where: str) -> Statistics:
        """The moments as `Statistics`; unit moments of no rows where none came, as for an expert nobody was sent to.

        Args:
            where: names the map in errors.

        Raises:
            DataError: the rows held NaN or infinity.
        """
        if not self.count:
            one = torch.ones(self.width, device=self.device)
            return Statistics(
                count=0,
                second_moment=None if self._gram is None else torch.diag(one),
                absolute_mean=None if self._sum is None else one,
                absolute_max=None if self._max is None else one,
            )
        found = Statistics(
            count=self.count,
            second_moment=None if self._gram is None else self.second_moment(),
            absolute_mean=None if self._sum is None else self._sum / self.count,
            absolute_max=self._max,
        )
        for tensor in (found.second_moment, found.absolute_mean):
            if tensor is not None and not torch.isfinite(tensor.sum()):
                raise DataError(
                    f"{where}: its inputs on the calibration data are NaN or infinite; the model overflows before it: "
                    "try dtype=torch.float32, or look at what was fitted before it"
                )
        return found


class Lookups:
    """How often each row of a table was looked up.

    Args:
        count: rows of the table.
        device: where indices lie.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._counts = torch.zeros(count, dtype=torch.int64, device=device)

    def add(self, index: Tensor) -> None:
        """Take in indices."""
        self._counts += torch.bincount(index.flatten(), minlength=len(self._counts))

    def statistics(self, where: str) -> Statistics:
        """``gradient`` (M,) is the share of lookups that went to each row: the output factor of a table."""
        del where
        total = int(self._counts.sum())
        return Statistics(count=total, gradient=self._counts.float() / max(total, 1))


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of values that are bfloat16 numbers run in bfloat16 with float32 sums, where it is exact."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if dtype != torch.bfloat16 or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def rows_in(found: Map, layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
    """What the map multiplies, (R, N) at a time, when its ``layer`` is called with ``x``.

    A convolution multiplies patches of its input, in each of its groups; the moments are those over all groups.

    Args:
        found: the map.
        layer: of the model that runs.
        x: (..., N), or (B, C, *positions) for a convolution.
        mask: (B, T) of the windows under way, true where a token counts; rows of other tokens are left out when ``x``
            is laid out like it.
    """
    if found.kind == "embedding":
        yield x[mask] if mask is not None and x.shape == mask.shape else x
    elif found.kind in ("conv1d", "conv2d"):
        yield from _patches(layer, x, found.shape[1])
    else:
        yield masked(x, mask).reshape(-1, found.shape[1])


def rows_out(found: Map, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """The rows (R, M) of what the layer of the map gave, or of a gradient by it."""
    if found.kind in ("conv1d", "conv2d"):
        return y.movedim(1, -1).flatten(0, -2)
    return masked(y, mask).flatten(0, -2)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (B, T, ...) or (B * T, ...) without the tokens that do not count; other layouts as they are."""
    if mask is None or bool(mask.all()):
        return x
    if x.ndim > 2 and x.shape[:2] == mask.shape:
        return x[mask]
    return x[mask.flatten()] if x.ndim == 2 and x.shape[0] == mask.numel() else x


def _patches(layer: Any, x: Tensor, width: int) -> Iterator[Tensor]:
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    x = _padded(layer, x)
    if x.ndim == 3:  # one dimension as two
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    size = prod(
        (length - d * (k - 1) - 1) // s + 1
        for length, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)
    )
    few = max(1, _PATCH_BYTES // (size * width * layer.groups * x.element_size()))
    for images in torch.split(x, few):
        found = functional.unfold(images, kernel, dilation=dilation, stride=stride)  # (B, G * N, P)
        yield found.view(len(found), layer.groups, width, -1).transpose(2, 3).reshape(-1, width)


def _padded(layer: Any, x: Tensor) -> Tensor:
    if layer.padding == "valid":
        return x
    if layer.padding == "same":
        whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in whole]
    else:
        sides = [(padding, padding) for padding in layer.padding]
    flat = [side for pair in reversed(sides) for side in pair]  # `pad` starts from the last dimension
    return functional.pad(x, flat, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
