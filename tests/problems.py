"""Toy problems for levers of one matrix: correlated inputs of uneven size, some of them dead."""

import torch
from torch import Tensor

from pennyweight.statistics import Statistics


def problem(rows: int, width: int, *, dead: int = 0, tokens: int = 0, seed: int = 0) -> tuple[Tensor, Statistics]:
    """A matrix (rows, width) and the statistics of its inputs, ``dead`` of which are always zero."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) / width**0.5 + torch.eye(width)
    inputs = torch.randn(tokens or 4 * width, width, generator=g) @ mix * (2 * torch.rand(width, generator=g)).exp()
    inputs[:, torch.randperm(width, generator=g)[:dead]] = 0
    matrix = 0.02 * torch.randn(rows, width, generator=g)
    moment = inputs.T @ inputs / inputs.shape[0]
    return matrix, Statistics(
        count=inputs.shape[0],
        second_moment=moment,
        absolute_mean=inputs.abs().mean(0),
        absolute_max=inputs.abs().amax(0),
        gradient=torch.rand(rows, generator=g) + 0.1,
    )


def objective(found: Tensor, matrix: Tensor, moment: Tensor) -> float:
    """``tr(D H D^T)``, in double."""
    difference = (found.detach() - matrix).double()
    return float((difference @ moment.double() * difference).sum())
