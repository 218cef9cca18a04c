"""Quantized activations: what a layer reads, rounded to a grid before it is multiplied.

The values are rounded and stay floating point ("fake quantization"): the layer computes what a kernel with narrow
inputs computes, at no gain in speed. Gradients pass through the rounding as if it were not there (straight-through),
and not through values that were clipped; a scale that is a parameter gets the gradient of LSQ (S. Esser et al.,
"Learned Step Size Quantization", arXiv:1902.08153).

Source: integer grids: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877; floating-point ones: P. Micikevicius et al., "FP8 Formats for Deep
Learning", arXiv:2209.05433. A range for each token, found as it comes: Z. Yao et al., "ZeroQuant", arXiv:2206.01861.

Shape letters: N features; ... any leading dimensions, the last of them the positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import FormError, OptionError, ShapeError, UserError
from pennyweight.weights.grid import Grid, float_levels

Granularity = Literal["token", "tensor", "channel"]
#: Bits of each floating-point format.
FLOATS = {"e4m3": 8, "e5m2": 8, "e2m1": 4, "e3m0": 4}
_NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_SETTINGS = ("bits", "format", "symmetric", "granularity", "keep_first_token")


class Activation(nn.Module):
    """Rounds inputs (..., N) to a grid: (..., N) -> (..., N), in their dtype.

    Without ``scale`` the range is that of the values themselves, of each token, of each feature, or of all that a call
    brings (then a batch is one tensor, padding and later tokens included). With ``scale`` it is fixed.

    Args:
        bits: of a value: 2 to 16, or those of ``format``.
        format: "integer", "e4m3", "e5m2", "e2m1" or "e3m0"; beyond the largest value is the largest.
        symmetric: integers around zero; else the range, which always holds zero, has a zero point. Floating-point
            formats are symmetric by themselves.
        granularity: what shares a range: "token" (each position), "channel" (each feature), "tensor" (all).
        keep_first_token: leave the first position of every sequence as it is (attention sinks, begin-of-sequence), and
            out of dynamic ranges. Calls with one position (decoding with a cache) are rounded.
        scale: (1,) for a tensor, (N,) for channels; a parameter is trained. None: dynamic.
        zero: like ``scale``, whole numbers; for integers that are not symmetric.

    Raises:
        OptionError: options that do not go together.
        ShapeError: ``scale`` or ``zero`` of another shape.
    """

    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self,
        *,
        bits: int = 8,
        format: str = "integer",
        symmetric: bool = False,
        granularity: Granularity = "token",
        keep_first_token: bool = False,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check(bits, format, granularity)
        if scale is not None and granularity == "token":
            raise OptionError("Activation: no token has a fixed range; give granularity 'tensor' or 'channel' for one")
        has_zero = format == "integer" and not symmetric and scale is not None
        if (zero is not None) != has_zero:
            there, of = "missing" if zero is None else "given", "no" if scale is None else "a"
            raise OptionError(
                f"Activation: zero is {there} for {of} scale, format {format!r}, symmetric={symmetric}; only fixed "
                "ranges of integers have one"
            )
        self.bits, self.format, self.symmetric = bits, format, symmetric
        self.granularity, self.keep_first_token = granularity, keep_first_token
        if isinstance(scale, nn.Parameter):
            self.scale = scale
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        for name, tensor in (("scale", scale), ("zero", zero)):
            if tensor is not None and (tensor.ndim != 1 or (granularity == "tensor" and len(tensor) != 1)):
                wanted = "(1,)" if granularity == "tensor" else "(features,)"
                raise ShapeError(f"Activation: {name} is {tuple(tensor.shape)} for a {granularity}; give {wanted}")
        if scale is not None and scale.device.type != "meta" and not bool((scale.isfinite() & (scale > 0)).all()):
            raise FormError("Activation: a scale is not finite and positive")

    @classmethod
    def from_range(
        cls,
        low: Tensor,
        high: Tensor,
        *,
        bits: int = 8,
        format: str = "integer",
        symmetric: bool = False,
        granularity: Granularity = "tensor",
        keep_first_token: bool = False,
    ) -> Activation:
        """A fixed grid that spans ``low`` to ``high``, (1,) or (N,) each, and zero."""
        _check(bits, format, granularity)
        scale, zero = _grid(low.detach().float(), high.detach().float(), bits, format, symmetric)
        return cls(
            bits=bits, format=format, symmetric=symmetric, granularity=granularity, keep_first_token=keep_first_token,
            scale=scale, zero=None if zero is None else zero.to(torch.int32),
        )  # fmt: skip

    @property
    def static(self) -> bool:
        """Whether the range is fixed."""
        return self.scale is not None

    def forward(self, x: Tensor) -> Tensor:
        if not self.keep_first_token:
            return self._rounded(x)
        if x.ndim < 2:
            raise ShapeError(f"Activation: an input {tuple(x.shape)} has no positions, and the first is to be kept")
        if x.shape[-2] == 1:
            return self._rounded(x)
        return torch.cat([x[..., :1, :], self._rounded(x[..., 1:, :])], dim=-2)

    def _rounded(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        if self.scale is None:
            scale, zero = self._dynamic(wide.detach())
        else:
            if len(self.scale) not in (1, x.shape[-1]):
                raise ShapeError(f"Activation: {len(self.scale)} ranges for an input {tuple(x.shape)}; calibrate anew")
            scale, zero = self.scale.to(wide.dtype), self.zero
        level = wide / scale
        if self.format != "integer":
            largest = _largest(self.format)
            level = level.clamp(-largest, largest)
            found = (level + (_nearest(level.detach(), self.format) - level.detach())) * scale
            return found.to(x.dtype)
        level = level + (level.detach().round() - level.detach())
        if zero is None:
            half = 2 ** (self.bits - 1) - 1
            return (level.clamp(-half, half) * scale).to(x.dtype)
        return (((level + zero).clamp(0, 2**self.bits - 1) - zero) * scale).to(x.dtype)

    def _dynamic(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        match self.granularity:
            case "token":
                low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            case "channel":
                rows = x.reshape(-1, x.shape[-1])
                low, high = rows.amin(0), rows.amax(0)
            case _:
                low, high = x.amin(), x.amax()
        return _grid(low, high, self.bits, self.format, self.symmetric)

    def settings(self) -> dict[str, Any]:
        """JSON-able: with the state dict, all that `rebuild` needs."""
        tensors = [name for name in ("scale", "zero") if getattr(self, name) is not None]
        return {name: getattr(self, name) for name in _SETTINGS} | ({"tensors": tensors} if tensors else {})

    @classmethod
    def rebuild(cls, found: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "activation") -> Activation:
        """The activation that `settings` and a state dict describe.

        Raises:
            FormError: settings that it does not take, or a tensor missing.
        """
        try:
            given: dict[str, Any] = {key: value for key, value in found.items() if key != "tensors"}
            given |= {name: tensors[name] for name in found.get("tensors", ())}
            return cls(**given)
        except UserError as error:
            raise type(error)(f"{where}: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise FormError(f"{where}: an activation cannot be built from what the file holds: {error}") from error

    def extra_repr(self) -> str:
        kind = f"{self.bits}-bit" if self.format == "integer" else self.format
        signs = "symmetric" if self.symmetric or self.format != "integer" else "asymmetric"
        kept = ", first token kept" if self.keep_first_token else ""
        return f"{kind}, {signs}, {'static' if self.static else 'dynamic'}, each {self.granularity}{kept}"


def _check(bits: int, format: str, granularity: str) -> None:
    if format not in ("integer", *FLOATS):
        raise OptionError(f"Activation: unknown format {format!r}; give integer, {', '.join(FLOATS)}")
    if format != "integer" and bits != FLOATS[format]:
        raise OptionError(f"Activation: bits = {bits} for format {format}; give bits = {FLOATS[format]}")
    if not 2 <= bits <= 16:
        raise OptionError(f"Activation: bits = {bits}; give 2 to 16")
    if granularity not in ("token", "tensor", "channel"):
        raise OptionError(f"Activation: unknown granularity {granularity!r}; give token, tensor or channel")


def _grid(low: Tensor, high: Tensor, bits: int, format: str, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of the grid over ``low`` to ``high`` and zero; a scale of one where there is nothing else."""
    if format != "integer" or symmetric:
        steps = 2 ** (bits - 1) - 1 if format == "integer" else _largest(format)
        return _positive(torch.maximum(high.abs(), low.abs()) / steps), None
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _positive((high - low) / (2**bits - 1))
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _positive(scale: Tensor) -> Tensor:
    # a subnormal scale would have no digits left to divide by
    floored = scale.clamp_min(torch.finfo(scale.dtype).smallest_normal)
    return torch.where(scale > 0, floored, torch.ones_like(scale))


@cache
def _largest(format: str) -> float:
    levels = float_levels(format)
    return float(levels[levels.isfinite()].max())


def _nearest(level: Tensor, format: str) -> Tensor:
    """The nearest value of ``format``, ties to the even pattern; ``level`` is within its range."""
    if format in _NATIVE:
        return level.float().to(_NATIVE[format]).to(level.dtype)
    rows = level.reshape(1, -1)
    one = torch.ones(1, 1, device=level.device)
    grid = Grid(FLOATS[format], None, one, None, "none", format)
    return grid.values(grid.codes(rows)).reshape(level.shape).to(level.dtype)
