"""The inverse of the empirical Fisher matrix in diagonal blocks, and what it says of pruning weights.

With m gradients g of the loss the matrix is ``F = damping * I + (1/m) sum g g^T``; blocks of B neighbors in a flattened
tensor are kept, as their inverses. To second order, taking out the weights Q of a block costs
``rho = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`` in loss once the rest of the block makes good what it can, by
``-[F^-1]_{:,Q} ([F^-1]_QQ)^-1 w_Q``. Blocks do not see each other.

Source: E. Kurtic et al., "The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language
Models", arXiv:2203.07259 (algorithm 1, equations 2 to 6). Differs from the source: gradients enter several at once
(Woodbury's identity of that rank, the same matrix); weights of a block may be taken out jointly.

Shape letters: D weights of a tensor, B of a block, K blocks (the last one filled up with weights that nothing moves),
R gradients, Q weights of a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import OptionError, ShapeError

_ENTRIES = 2**24  # of the inverse, worked on at a time


class BlockFisher:
    """The block-diagonal inverse of an empirical Fisher matrix.

    Args:
        size: D.
        block: B; memory is D*B numbers.
        samples: m, the gradients that will be added in all; each counts 1/m.
        damping: above 0, added to the diagonal: the inverse before any gradient is ``I / damping``.
        dtype: of the inverse. With float32 its largest entries are good to about 1e-3 where damping is a thousandth of
            the mean squared gradient.
        device: of the inverse.

    Exact (up to rounding) for the matrix of its blocks, after m gradients.
    """

    def __init__(
        self,
        size: int,
        *,
        block: int,
        samples: int,
        damping: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        if min(size, block, samples) < 1 or not damping > 0:
            raise OptionError(
                f"BlockFisher: size {size}, block {block}, samples {samples}, damping {damping}; give positive numbers"
            )
        self.size, self.block, self.samples = size, min(block, size), samples
        eye = torch.eye(self.block, dtype=dtype, device=device) / damping
        #: (K, B, B)
        self.inverse = eye.repeat(-(-size // self.block), 1, 1)

    @torch.no_grad()
    def add(self, gradients: Tensor) -> None:
        """Take in ``gradients`` (R, D)."""
        if gradients.ndim != 2 or gradients.shape[1] != self.size:
            raise ShapeError(f"BlockFisher: gradients {tuple(gradients.shape)}; give (gradients, {self.size})")
        for rows in torch.split(
            gradients, self.block
        ):  # of a higher rank than the block the inner system would be the larger
            columns = self._in_blocks(rows).permute(1, 2, 0)  # (K, B, R)
            for part in self._parts():
                inverse, g = self.inverse[part], columns[part]
                moved = inverse @ g
                inner = g.mT @ moved
                inner.diagonal(dim1=1, dim2=2).add_(self.samples)
                half = _divided(inner, moved.mT)  # (K', R, B)
                inverse.baddbmm_(half.mT, half, alpha=-1)

    def diagonal(self) -> Tensor:
        """(D,) ``[F^-1]_ii``."""
        return self.inverse.diagonal(dim1=1, dim2=2).flatten()[: self.size]

    def saliency(self, weights: Tensor, run: int = 1) -> Tensor:
        """(D / run,) loss that taking out each run of ``run`` neighbors of ``weights`` (D,) costs.

        Raises:
            OptionError: runs that blocks or the tensor do not hold whole.
        """
        if run == 1:
            return weights.to(self.inverse).square() / (2 * self.diagonal())
        w = self._runs(weights, run)
        rho = 0.5 * (w * self._solved_runs(w, run)).sum(-1)
        return rho.flatten()[: self.size // run]

    def without(self, weights: Tensor, pruned: Tensor, *, joint: bool = True, run: int = 1) -> Tensor:
        """``weights`` (D,) with zeros where ``pruned`` (D,) bool, the others moved to make good for them.

        Args:
            weights: (D,).
            pruned: (D,) bool; with ``run`` above 1, whole runs.
            joint: solve for all that a block loses together, the least of the quadratic model; False adds up what each
                weight (or run) asks for alone, as the source does, which is the same where a block loses one.
            run: neighbors that are taken out together.
        """
        w, out = self._in_blocks(weights[None])[0], self._in_blocks(pruned[None])[0]  # (K, B)
        lost = w * out
        if not joint and run > 1:
            asked = self._solved_runs(lost.view(len(lost), -1, run), run).reshape(lost.shape)
        elif not joint:
            asked = lost / self.inverse.diagonal(dim1=1, dim2=2)
        else:
            asked = torch.empty_like(lost)
        moved = torch.empty_like(lost)
        for part in self._parts():
            inverse = self.inverse[part]
            if joint:
                # identity rows for what stays: the system of the pruned alone, in the shape of the whole block
                among = out[part][:, :, None] * inverse * out[part][:, None, :]
                among.diagonal(dim1=1, dim2=2).add_(1 - out[part])
                asked[part] = torch.cholesky_solve(lost[part][..., None], torch.linalg.cholesky(among))[..., 0]
            moved[part] = (inverse @ asked[part][..., None])[..., 0]
        kept = torch.where(out > 0, torch.zeros_like(w), w - moved)
        return kept.flatten()[: self.size].to(weights.dtype)

    def _in_blocks(self, rows: Tensor) -> Tensor:
        """(R, D) -> (R, K, B), filled up with zeros."""
        missing = self.inverse.shape[0] * self.block - self.size
        filled = torch.nn.functional.pad(rows.to(self.inverse), (0, missing))
        return filled.view(len(rows), -1, self.block)

    def _runs(self, weights: Tensor, run: int) -> Tensor:
        if self.block % run or self.size % run:
            raise OptionError(
                f"BlockFisher: runs of {run} in blocks of {self.block}, {self.size} weights; give divisors"
            )
        return self._in_blocks(weights[None])[0].view(len(self.inverse), -1, run)

    def _solved_runs(self, runs: Tensor, run: int) -> Tensor:
        """``([F^-1]_QQ)^-1 w_Q`` of ``runs`` (K, B / Q, Q)."""
        split = self.inverse.view(len(self.inverse), self.block // run, run, self.block // run, run)
        own = split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (K, B / Q, Q, Q)
        found: Tensor = torch.linalg.solve(own, runs[..., None])[..., 0]
        return found

    def _parts(self) -> list[slice]:
        each = max(1, _ENTRIES // self.block**2)
        return [slice(start, start + each) for start in range(0, len(self.inverse), each)]


def _divided(inner: Tensor, right: Tensor) -> Tensor:
    """``L^-1 right`` with ``inner = L L^T``, (K, R, R) and (K, R, B)."""
    if inner.shape[1] == 1:  # millions of systems of one equation: not a library call each
        return right / inner.sqrt()
    found: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), right, upper=False)
    return found
