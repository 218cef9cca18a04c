"""Quantization-aware tuning of one map: weights and steps learned through the rounding.

Row 226. Sources: S. Esser et al., "Learned Step Size Quantization", arXiv:1902.08153 (the gradient of the step and its
scale); Y. Bengio et al., arXiv:1308.3432 (straight-through). Differs from them: one map is tuned against its own
outputs on calibration data, not a network against labels.

Shape letters: R rows of input, M out features, N in features, G groups, S features of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.weights.grid import Grid, grouped
from pennyweight.weights.quantized import Quantized


class _LearnedStep(torch.autograd.Function):
    """``round(clamp(x / step)) * step``, with the gradients of the source (eq. 3 and 5)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        level = x / step
        ctx.save_for_backward(level)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        return level.clamp(low, high).round() * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        (level,) = ctx.saved_tensors
        inside = (level > ctx.low) & (level < ctx.high)
        slope = torch.where(inside, level.round() - level, level.clamp(ctx.low, ctx.high))
        return gradient * inside, (gradient * slope).sum(-1, keepdim=True) * ctx.gradient_scale, None, None, None


def learned_step(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """``x`` (..., S) rounded to whole multiples of ``step`` (..., 1) that ``bits`` bits tell apart; differentiable.

    The gradient passes ``x`` unchanged inside the range and stops outside; that of the step is scaled by
    1 / sqrt(S * 2**(bits - 1)), so that steps and weights learn at like rates.
    """
    high = 2 ** (bits - 1) - 1
    found: Tensor = _LearnedStep.apply(  # type: ignore[no-untyped-call]
        x, step, -high - 1, high, (x.shape[-1] * max(1, high)) ** -0.5
    )
    return found


def tuned(matrix: Tensor, grid: Grid, inputs: Tensor, *, steps: int = 100, learning_rate: float = 0.03) -> Quantized:
    """``matrix`` (M, N) on the grid that gives the outputs of ``inputs`` (R, N) best after ``steps`` of Adam.

    Starts from ``grid``, and hands back the best of what it passed through, the start included. The learning rate is a
    share of the spread of the weights, and of the mean step.

    Raises:
        OptionError: a grid with a zero: the source's steps have none.
    """
    if grid.zero_kind != "none" or grid.format != "integer":
        raise OptionError("learned steps: give symmetric uniform values")
    if grid.scale.shape[0] != matrix.shape[0]:
        grid = Grid(grid.bits, None, grid.scale.expand(matrix.shape[0], 1).clone(), None, "none")
    original, x = matrix.detach().float(), inputs.detach().float().reshape(-1, matrix.shape[1])
    wanted = x @ original.T
    weight = original.clone().requires_grad_()
    # the sign of a scale means nothing to a grid that is learned
    step = grid.scale.float().abs().clone().requires_grad_()
    adam = torch.optim.Adam([{"params": [weight], "lr": learning_rate * float(original.std())},
                             {"params": [step], "lr": learning_rate * float(step.detach().mean())}])  # fmt: skip
    best, found = torch.inf, Quantized.from_codes(grid.codes(original), grid)
    with torch.enable_grad():
        for number in range(steps + 1):
            stored = Grid(grid.bits, grid.group_size, step.detach().to(torch.float16), None, "none")
            reached = Quantized.from_codes(stored.codes(weight.detach()), stored) if number else found
            with torch.no_grad():
                loss = float((reached(x) - wanted).square().mean())
            if loss < best:
                best, found = loss, reached
            entries, _ = grouped(weight, None, grid.group_size)
            rounded = learned_step(entries, step[..., None], grid.bits).flatten(1)[:, : matrix.shape[1]]
            adam.zero_grad()
            (x @ rounded.T - wanted).square().mean().backward()  # type: ignore[no-untyped-call]
            adam.step()
            with torch.no_grad():
                step.clamp_min_(1e-6)
    return found
