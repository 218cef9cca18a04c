"""A matrix as a sparse core between two block-diagonal ones, fitted to a proxy of the output error.

The matrix W, its columns and then its rows brought to norm 1, is to be ``A S B``: A and B block-diagonal, S with N of M
kept in every run of a row. The loss is ``sum_ij (W - A S B)_ij^2 h_j``, h the energy of the inputs, as a share of that
of S = 0. In turns, A, B and the kept values are moved (by Adam, or A and B to their exact minimum), and in every pair
of blocks one run of S is solved anew for the best pattern and the best values. Blocks of the product depend on their
own block of S alone, so that all pairs move at once.

Source: L. Liu et al., "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization",
arXiv:2510.05528, and the NoWag proxy of arXiv:2504.14569. Differs from the source: A and B may be solved exactly in
place of steps of Adam (least squares: their Gram matrices are small); the best state met is kept.

Shape letters: M out features, N in features, b side of a block, I = M / b and J = N / b blocks, G runs in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.solvers.masks import patterned
from pennyweight.solvers.scores import normalized
from pennyweight.weights.pattern import choices

#: Added to a Gram matrix, as a share of the mean of its diagonal: above what float32 rounds; blocks may be singular.
_RIDGE = 1e-6
_RIDGE_OF_RUNS = 1e-9


@dataclass(frozen=True)
class Armored:
    """What a fit found: ``rows * A @ (core * mask) @ B * columns`` stands for the matrix.

    Attributes:
        left: (I, b, b), rows folded in.
        core: (M, N), zeros where nothing is kept.
        mask: (M, N) bool, True = kept.
        right: (J, b, b), columns folded in.
        losses: the relative loss at the start and after each iteration.
    """

    left: Tensor
    core: Tensor
    mask: Tensor
    right: Tensor
    losses: tuple[float, ...]


class Fit:
    """The fit of one matrix.

    Args:
        matrix: (M, N).
        energy: (N,) mean square of every input.
        kept, of: of every ``of`` neighbors in a row of the core, ``kept`` stay.
        block: b; divides M and N, and ``of`` divides it.
    """

    def __init__(self, matrix: Tensor, energy: Tensor, *, kept: int, of: int, block: int) -> None:
        m, n = matrix.shape
        assert m % block == n % block == block % of == 0, (m, n, block, of)
        self.shape, self.block, self.kept, self.of = (m, n), block, kept, of
        self.target, self.rows, self.columns = normalized(matrix)
        self.h = energy.clamp_min(0).to(matrix)
        self.mask = ~patterned(self.target.square() * self.h, kept, of)
        self.core = self.target * self.mask
        eye = torch.eye(block, dtype=matrix.dtype, device=matrix.device)
        self.left, self.right = eye.repeat(m // block, 1, 1), eye.repeat(n // block, 1, 1)
        self.whole = float((self.target.square() * self.h).sum())

    def residual(self) -> Tensor:
        """(M, N) ``A S B - W``."""
        return self._times(self.left, self._beside(self.core, self.right)) - self.target

    def loss(self) -> float:
        """The proxy, as a share of that of a zero matrix; 0 where that is 0."""
        return self._share(self.residual())

    def solve_sides(self) -> None:
        """Put B, then A, where the loss is least while everything else stays; it never rises."""
        # h weighs whole columns of B, each of which is solved on its own: it cancels
        made = self._panels(self._times(self.left, self.core))  # (J, M, b)
        gram = made.mT @ made
        self.right = self.right - _solved(gram, gram @ self.right - made.mT @ self._panels(self.target))
        made = self._beside(self.core, self.right)
        made, weighed = (one.view(-1, self.block, self.shape[1]) for one in (made, made * self.h))  # (I, b, N)
        gram = weighed @ made.mT
        step = _solved(gram, gram @ self.left.mT - weighed @ self.target.view_as(made).mT)
        self.left = self.left - step.mT

    def solve_runs(self, generator: torch.Generator) -> float:
        """In every pair of blocks solve one run of the core anew: the best pattern and its best values.

        Runs are drawn in proportion to the absolute gradient of the loss by their entries. The loss never rises; it is
        returned as it is then.
        """
        gap, of = self.residual(), self.of
        slope = self._slope(gap * self.h)
        # a product sums the few entries of a run several times as fast as sum does
        at_runs = (slope.abs().view(-1, of) @ slope.new_ones(of)).view(-1, self.shape[1] // of)  # (M, N / of)
        row, run = self._drawn(at_runs, generator)  # (I, J) of M, of N / of
        index = row[..., None], run[..., None] * of + torch.arange(of, device=row.device)
        i, j = torch.meshgrid(*(torch.arange(k, device=row.device) for k in row.shape), indexing="ij")
        a = self.left[i, :, row % self.block]  # (I, J, b), column `row` of A
        length = a.square().sum(-1).clamp_min(torch.finfo(a.dtype).tiny)
        per_row = self.block // of
        wide = self.right.view(-1, per_row, of, self.block).double()  # rows of B, run by run
        # in double: two rows may be nearly one
        gram = ((wide * self.h.view(-1, 1, 1, self.block)) @ wide.mT)[j, run % per_row]  # (I, J, of, of)
        # what the rest of the core leaves to this run, seen along a and the rows of B
        before = self.core[index]  # (I, J, of)
        wish = (gram @ before[..., None].double())[..., 0] * length[..., None] - slope[index]
        ways = choices(self.kept, of).to(row.device)  # (C, kept)
        small = gram[..., ways[:, :, None], ways[:, None, :]]  # (I, J, C, kept, kept)
        found = _solved(small, wish[..., ways][..., None], _RIDGE_OF_RUNS)[..., 0] / length[..., None, None]
        gain = (found * wish[..., ways]).sum(-1)  # (I, J, C), twice the loss taken away from an empty run, halved
        best = gain.argmax(-1)
        values = found.gather(2, best[..., None, None].expand(-1, -1, 1, self.kept))[:, :, 0].to(before.dtype)
        filled = torch.zeros_like(before).scatter_(2, ways[best], values)
        held = torch.zeros_like(before, dtype=torch.bool).scatter_(2, ways[best], True)
        # a ridge may leave the old values the better ones
        more = self._run_loss(filled, gram, wish, length) - self._run_loss(before, gram, wish, length)
        better = more <= 0
        self.core[index] = torch.where(better[..., None], filled, before)
        self.mask[index] = torch.where(better[..., None], held, self.mask[index])
        return self._share(gap) + (float(more.clamp_max(0).sum()) / self.whole if self.whole else 0.0)

    def _drawn(self, odds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A row and a run (I, J) of each pair of blocks, in proportion to ``odds`` (M, N / of)."""
        side, per_row = self.block, self.block // self.of
        pairs = odds.view(-1, side, self.shape[1] // side, per_row).transpose(1, 2).flatten(2)  # (I, J, b * per_row)
        below = pairs.double().cumsum(-1)
        at = torch.rand(below.shape[:2], generator=generator, dtype=below.dtype, device=below.device)
        found = torch.searchsorted(below, (at * below[..., -1])[..., None], right=True)[..., 0]
        found = found.clamp_max(side * per_row - 1)
        i, j = (torch.arange(k, device=found.device) for k in found.shape)
        return i[:, None] * side + found // per_row, j * per_row + found % per_row

    @staticmethod
    def _run_loss(values: Tensor, gram: Tensor, wish: Tensor, length: Tensor) -> Tensor:
        """The part of the loss that depends on one run."""
        quadratic = (values * (gram @ values[..., None].double())[..., 0]).sum(-1) * length
        return quadratic - 2 * (values * wish).sum(-1)

    def run(
        self, iterations: int, *, rate: float | None, generator: torch.Generator, patience: int = 100,
        report: Callable[[int, float], None] | None = None,
    ) -> Armored:  # fmt: skip
        """Up to ``iterations`` in turns of both steps, and the best state met.

        Args:
            iterations: at most; 0 is the NoWag pattern with the matrix's own values.
            rate: of Adam's steps on A, B and the kept values; None: A and B are solved exactly.
            generator: draws the runs.
            patience: iterations without the loss falling by a millionth after which it stops.
            report: called with the iteration and the loss.
        """
        losses = [self.loss()]
        best, left_to_wait, adam = self._state(), patience, None if rate is None else _Adam(rate)
        for iteration in range(iterations):
            if adam is None:
                self.solve_sides()
            else:
                self._adam(adam)
            losses.append(self.solve_runs(generator))
            if losses[-1] <= min(losses[:-1]):
                best = self._state()
            left_to_wait = patience if losses[-1] < (1 - 1e-6) * losses[-2] else left_to_wait - 1
            if report is not None:
                report(iteration + 1, losses[-1])
            if left_to_wait <= 0:
                break
        left, core, mask, right = best
        return Armored(
            left * self.rows.view(-1, self.block, 1),
            core,
            mask,
            right * self.columns.view(-1, 1, self.block),
            tuple(losses),
        )

    def _adam(self, adam: _Adam) -> None:
        scale = 2 / max(self.whole, torch.finfo(self.h.dtype).tiny)
        gap = self.residual() * self.h * scale
        beside = self._beside(self.core, self.right).view(-1, self.block, self.shape[1])
        slopes = (
            gap.view_as(beside) @ beside.mT,
            self._panels(self._times(self.left, self.core)).mT @ self._panels(gap),
            self._slope(gap) * self.mask,
        )
        self.left, self.right, self.core = adam.moved((self.left, self.right, self.core), slopes)
        self.core = self.core * self.mask  # the momentum of what is no longer kept

    def _state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.left.clone(), self.core.clone(), self.mask.clone(), self.right.clone()

    def _share(self, gap: Tensor) -> float:
        return float((gap.square() * self.h).sum()) / self.whole if self.whole else 0.0

    def _slope(self, weighed: Tensor) -> Tensor:
        """(M, N) ``A^T weighed B^T``: half the gradient by the core."""
        return self._times(self.left.mT, self._beside(weighed, self.right.mT))

    def _times(self, blocks: Tensor, matrix: Tensor) -> Tensor:
        """``blocks`` (I, b, b) on the diagonal, times ``matrix`` (M, N)."""
        return (blocks @ matrix.view(-1, self.block, self.shape[1])).view(self.shape)

    def _beside(self, matrix: Tensor, blocks: Tensor) -> Tensor:
        """``matrix`` (M, N) times ``blocks`` (J, b, b) on the diagonal."""
        return (self._panels(matrix) @ blocks).transpose(0, 1).reshape(self.shape)

    def _panels(self, matrix: Tensor) -> Tensor:
        """(J, M, b): ``matrix`` (M, N) by blocks of columns."""
        return matrix.view(self.shape[0], -1, self.block).transpose(0, 1)


class _Adam:
    """Adam's step on plain tensors, with the usual constants."""

    def __init__(self, rate: float) -> None:
        self.rate, self.steps = rate, 0
        self.moments: list[tuple[Tensor, Tensor]] = []

    def moved(self, values: tuple[Tensor, ...], slopes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.steps += 1
        if not self.moments:
            self.moments = [(torch.zeros_like(g), torch.zeros_like(g)) for g in slopes]
        found = []
        for value, g, (first, second) in zip(values, slopes, self.moments, strict=True):
            first.lerp_(g, 0.1)
            second.mul_(0.999).addcmul_(g, g, value=0.001)
            size = (second / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
            found.append(value - self.rate / (1 - 0.9**self.steps) * first / size)
        return tuple(found)


def _solved(gram: Tensor, right: Tensor, share: float = _RIDGE) -> Tensor:
    """``gram^-1 right`` for positive semidefinite (..., k, k) in double, with a small ridge."""
    whole = gram.double()
    ridge = share * whole.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    whole = whole + ridge[..., None, None] * torch.eye(whole.shape[-1], dtype=whole.dtype, device=whole.device)
    if whole.shape[-1] == 2:  # thousands of them: ten times as fast as a factorization each
        first, both, last = whole[..., :1, :1], whole[..., :1, 1:], whole[..., 1:, 1:]
        adjugate = torch.cat([torch.cat([last, -both], -1), torch.cat([-both, first], -1)], -2)
        return (adjugate @ right.double() / (first * last - both.square())).to(right.dtype)
    return torch.cholesky_solve(right.double(), torch.linalg.cholesky(whole)).to(right.dtype)
