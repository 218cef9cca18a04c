"""Rounding that can be trained through: what quantization-aware methods differentiate, group by group at once.

* `affine`: integer zeros, as M. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language
  Models", arXiv:2407.11062 and its official code (``quantize/quantizer.py``).
* `stepped`: a step and an offset, as H. Jeon et al., "L4Q: Parameter Efficient Quantization-Aware Training on Large
  Language Models via LoRA-wise LSQ", arXiv:2402.04902.
* `learned_step`: a step alone, as S. Esser et al., "Learned Step Size Quantization", arXiv:1902.08153.

All pass the gradient straight through rounding (Y. Bengio et al., arXiv:1308.3432) and stop that of an entry where its
code is clamped. Backward passes recompute what they need from the inputs: nothing of the size of a weight is saved but
the weight itself.

Shape letters: M out features, N in features, G groups of a row, S features of a group, R rows of input; ... any leading
dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pennyweight.weights.grid import group_count


def in_groups(matrix: Tensor, group_size: int | None) -> Tensor:
    """``matrix`` (M, N) as (M, G, S), a short last group filled up with zeros; a view where it needs none."""
    rows, columns = matrix.shape
    count = group_count(columns, group_size)
    missing = 0 if group_size is None else count * group_size - columns
    return (functional.pad(matrix, (0, missing)) if missing else matrix).reshape(rows, count, -1)


def out_of_groups(entries: Tensor, columns: int) -> Tensor:
    """The inverse of `in_groups`: (M, G, S) -> (M, N)."""
    return entries.flatten(1)[:, :columns]


def stored(scale: Tensor, floor: float) -> Tensor:
    """``scale`` as float16 holds it, at least ``floor``, in its own dtype; the gradient passes unchanged."""
    with torch.no_grad():
        held = scale.clamp(floor, torch.finfo(torch.float16).max).half().to(scale.dtype)
    return scale + (held - scale).detach()


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, highest: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.highest = highest
        whole = zero.round().clamp(0, highest)
        return (x / scale).round_().add_(whole).clamp_(0, highest).sub_(whole).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (gradient,) = gradients
        x, scale, zero = ctx.saved_tensors
        whole = zero.round().clamp(0, ctx.highest)
        level = x / scale
        code = level.round().add_(whole)
        inside = (code >= 0) & (code <= ctx.highest)
        outside = (gradient * ~inside).sum(-1, keepdim=True)
        slope = torch.where(inside, code - whole - level, code.clamp(0, ctx.highest) - whole)
        return gradient * inside, (gradient * slope).sum(-1, keepdim=True), -outside * scale, None


def affine(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``scale * (clamp(round(x / scale) + round(zero)) - round(zero))``, codes and zeros of ``bits`` bits.

    Rounding, and the clamping of zeros to the range of codes, are straight-through; the clamping of codes is not: an
    entry outside the range has no gradient, and the zero has one from such entries alone.

    Args:
        x: (..., S).
        scale: (..., 1), positive.
        zero: (..., 1), any numbers.
        bits: of a code.
    """
    found: Tensor = _Affine.apply(x, scale, zero, 2**bits - 1)  # type: ignore[no-untyped-call]
    return found


class _Stepped(torch.autograd.Function):
    """See `stepped`; ``open`` counts entries on the very ends of the range as clamped, as LSQ does (eq. 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, low: int, high: int, factor: float, open: bool
    ) -> Tensor:
        ctx.save_for_backward(x, step, offset)
        ctx.low, ctx.high, ctx.factor, ctx.open = low, high, factor, open
        level = (x if offset is None else x - offset) / step
        found = level.clamp_(low, high).round_().mul_(step)
        return found if offset is None else found.add_(offset)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, step, offset = ctx.saved_tensors
        level = (x if offset is None else x - offset) / step
        if ctx.open:
            inside = (level > ctx.low) & (level < ctx.high)
        else:
            inside = (level >= ctx.low) & (level <= ctx.high)
        passed = gradient * inside
        slope = torch.where(inside, level.round() - level, level.clamp(ctx.low, ctx.high))
        of_step = (gradient * slope).sum(-1, keepdim=True) * ctx.factor
        of_offset = None if offset is None else (gradient - passed).sum(-1, keepdim=True)
        return passed, of_step, of_offset, None, None, None, None


def stepped(x: Tensor, step: Tensor, offset: Tensor | None, low: int, high: int) -> Tensor:
    """``round(clamp((x - offset) / step, low, high)) * step + offset``.

    The step has the gradient of the source: inside the range ``level - x / step`` an entry, outside ``low`` or
    ``high``; the offset has one from entries outside alone.

    Args:
        x: (..., S).
        step: (..., 1), positive.
        offset: (..., 1), or None for 0.
        low: the lowest level.
        high: the highest level.
    """
    found: Tensor = _Stepped.apply(x, step, offset, low, high, 1.0, False)  # type: ignore[no-untyped-call]
    return found


def learned_step(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """``x`` (..., S) rounded to whole multiples of ``step`` (..., 1) that ``bits`` bits tell apart; differentiable.

    The gradient passes ``x`` unchanged inside the range and stops outside; that of the step is scaled by
    1 / sqrt(S * (2**(bits - 1) - 1)), so that steps and weights learn at like rates.
    """
    high = 2 ** (bits - 1) - 1
    factor = (x.shape[-1] * max(1, high)) ** -0.5
    found: Tensor = _Stepped.apply(x, step, None, -high - 1, high, factor, True)  # type: ignore[no-untyped-call]
    return found


class _Flushed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x_here = x.to(dtype)
        ctx.save_for_backward(x_here, *parameters)
        ctx.make, ctx.dtype = make, x.dtype
        return functional.linear(x_here, make(*parameters).to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, *parameters = ctx.saved_tensors
        leaves = [
            p.detach().requires_grad_(needed) for p, needed in zip(parameters, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad():
            matrix = ctx.make(*leaves)
        of_x = (gradient @ matrix.detach().to(gradient.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        if not trained:
            return of_x, None, *(None for _ in leaves)
        # the one tensor of the weight's shape that a backward makes, and it ends with this function
        of_matrix = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(matrix.dtype)
        found = iter(torch.autograd.grad(matrix, trained, of_matrix))
        return of_x, None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


def flushed(x: Tensor, make: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``x @ make(*parameters).T``, whose backward makes the matrix anew, and drops its gradient once it is used.

    Neither the matrix nor its gradient outlives the call that needs it: what is saved is ``x`` and the parameters (L4Q,
    section 3.2). In the dtype of autocast where that is on.

    Args:
        x: (..., N).
        make: the matrix (M, N) from the parameters, differentiable.
        parameters: all tensors that it is made of; gradients go to those that want one.
    """
    found: Tensor = _Flushed.apply(x, make, *parameters)  # type: ignore[no-untyped-call]
    return found
