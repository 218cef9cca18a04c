"""What levers share that tune a few numbers of a model while they prune it: options, and weights under training.

Rows 140, 142, 147 and 239. The weights stand in compact layers while they are trained; they are never saved, and
`Weight.cost` is that of the matrix they make.

Shape letters: M out features, N in features, C in channels of a group, K kernel positions, R rank, P free entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, one_of, option
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, loss_towards, train
from pennyweight.train.loop import Callback, Loss
from pennyweight.weights import Cost, Dense, Weight
from pennyweight.weights.transposed import Transposed
from pennyweight.work import Work


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The options of training that these levers have in common."""

    samples: int = option(256, at_least(1), "windows to train on")
    batch: int = option(8, at_least(1), "windows a step")
    steps: int = option(200, at_least(1), "steps of training")
    rate: float = option(1e-3, at_least(0), "learning rate at its peak")
    warmup: float = option(0.1, between(0, 1), "share of the steps in which rates rise")
    target: Literal["text", "original"] = option(
        "text", one_of("text", "original"), "what is learned: next tokens, or the original's distribution"
    )

    def loss(self, model: Model, where: str) -> Loss:
        """Of ``model`` as it is now; see `loss_towards`."""
        return loss_towards(self.target, model, where)

    def tune(
        self, model: Model, work: Work, groups: Sequence[Group], loss: Loss, *, stage: str, steps: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:  # fmt: skip
        """Train ``groups`` in place."""
        train(
            model.module, groups, work.text(self.samples), loss, steps=self.steps if steps is None else steps,
            batch=self.batch, warmup=self.warmup, clip=1.0, seed=work.seed, callbacks=callbacks,
            report=lambda done, all_: work.report(stage, done, all_),
        )  # fmt: skip


def linear_maps(work: Work, where: str) -> list[Map]:
    """The linear layers of blocks that a step selects.

    Raises:
        OptionError: there are none.
    """
    found = [one for one in work.maps if one.block is not None and one.kind in ("linear", "conv1d-transposed")]
    if not found:
        raise OptionError(f"{where}: the step selects no linear layer of a block; select some")
    return found


def drawn(rows: int, columns: int, generator: torch.Generator, deviation: float = 1.0) -> Tensor:
    """A normal (rows, columns)."""
    return deviation * torch.randn(rows, columns, generator=generator)


def check_rank(rank: int, shape: tuple[int, int], where: str) -> None:
    """Refuse a rank that a matrix of ``shape`` does not have."""
    if rank > min(shape):
        raise OptionError(f"{where}: rank = {rank} for a {shape[0]}x{shape[1]} matrix; give at most {min(shape)}")


class Trained(Weight):
    """A weight under training; abstract. `dense` is what it stands for."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    @property
    def T(self) -> Weight:
        return Transposed(self)

    def cost(self) -> Cost:
        return Dense(self.dense().detach()).cost()

    @property
    def learned(self) -> int:
        """Numbers that are trained."""
        return sum(one.numel() for one in self.parameters())


class Adapted(Trained):
    """``(W * mask + factor * (up @ down + S)) * rows * columns``: W stays as it is, the update is trained.

    Args:
        matrix: W, (M, N).
        up: (M, R), zeros to start at W itself; None for no low-rank part.
        down: (R, N), or (R, C) where the update lies at the center of a kernel.
        factor: of the update.
        positions: K, of a kernel; 1 for a linear layer.
        places: (P,) where S has free entries, in scan order; they start at 0.
        blocks: (K', M / b, N / b), how much of each prototype lies in each block of b times b, and (K', b, r) and
            (K', r, b), the factors of the prototypes, which layers may share; None for none.

    Attributes:
        mask: (M, N) bool, of W; of the sum where ``mask_sum``.
        rows_kept, columns_kept: (M,) and (N,), of the sum.
    """

    matrix: Tensor
    mask: Tensor
    rows_kept: Tensor
    columns_kept: Tensor
    places: Tensor | None

    def __init__(
        self, matrix: Tensor, *, up: Tensor | None = None, down: Tensor | None = None, factor: float = 1.0,
        positions: int = 1, places: Tensor | None = None,
        blocks: tuple[Tensor, nn.Parameter, nn.Parameter] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(shape=(matrix.shape[0], matrix.shape[1]))
        self.factor, self.positions, self.mask_sum = factor, positions, False
        self.register_buffer("matrix", matrix.detach().float().clone())
        self.register_buffer("mask", torch.ones(self.shape, dtype=torch.bool))
        self.register_buffer("rows_kept", torch.ones(self.shape[0]))
        self.register_buffer("columns_kept", torch.ones(self.shape[1]))
        self.register_buffer("places", places)
        self.up = None if up is None else nn.Parameter(up)
        self.down = None if down is None else nn.Parameter(down)
        self.values = None if places is None else nn.Parameter(torch.zeros(len(places)))
        self.block_weights = None if blocks is None else nn.Parameter(blocks[0])
        self.prototypes = None if blocks is None else nn.ParameterList(blocks[1:])

    def low_rank(self) -> Tensor:
        """``factor * up @ down`` in its place, (M, N)."""
        if self.up is None or self.down is None:
            return torch.zeros_like(self.matrix)
        found = self.factor * (self.up @ self.down)
        if self.positions == 1:
            return found
        whole = found.new_zeros(*found.shape, self.positions)
        center = torch.arange(self.positions) == self.positions // 2
        return torch.where(center, found[..., None], whole).flatten(1)

    def free(self) -> Tensor:
        """``factor * S``, (M, N)."""
        if self.values is None or self.places is None:
            return torch.zeros_like(self.matrix)
        flat = self.matrix.new_zeros(self.matrix.numel())
        return flat.index_copy(0, self.places, self.factor * self.values).view(self.shape)

    def patterned(self) -> Tensor:
        """The sum of Kronecker products of block weights and prototypes, (M, N)."""
        if self.block_weights is None or self.prototypes is None:
            return torch.zeros_like(self.matrix)
        each = self.prototypes[0] @ self.prototypes[1]  # (K', b, b)
        return torch.einsum("kij,kab->iajb", self.block_weights, each).reshape(self.shape)

    def update(self) -> Tensor:
        """All that is added to W, (M, N)."""
        return self.low_rank() + self.free() + self.patterned()

    def dense(self) -> Tensor:
        if self.mask_sum:
            made = torch.where(self.mask, self.matrix + self.update(), torch.zeros(()))
        else:
            made = torch.where(self.mask, self.matrix, torch.zeros(())) + self.update()
        return made * self.rows_kept[:, None] * self.columns_kept
