"""Quantization-aware tuning of one map: weights and steps learned through the rounding.

Row 226. Sources: S. Esser et al., "Learned Step Size Quantization", arXiv:1902.08153 (the gradient of the step and its
scale); Y. Bengio et al., arXiv:1308.3432 (straight-through). Differs from them: one map is tuned against its own
outputs on calibration data, not a network against labels.

Shape letters: R rows of input, M out features, N in features, G groups, S features of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.solvers.fake_quant import learned_step
from pennyweight.weights.grid import Grid, grouped
from pennyweight.weights.quantized import Quantized


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
