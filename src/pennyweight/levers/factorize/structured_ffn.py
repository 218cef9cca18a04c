"""Structured feed-forward layers: low rank, two shuffled block-diagonals, or one with a thin dense factor.

Row 35. Source: X. Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward
Layers", arXiv:2406.16450, and its code (CLAIRE-Labo/StructuredFFN): LowRank, BlockShuffle (a Monarch matrix whose
lesser factor is square blocks) and BlockDense in place of the feed-forward layers of all blocks but the first, trained
from nothing with a dense guide (`pennyweight.train.guided`). Random factors: low rank from the decomposition of a
random matrix, blocks orthonormal.
Differs from the source: factors may start nearest to a trained matrix, each in closed form, with that matrix as the
guide; random ones are scaled so that the product is as large as the matrix it replaces.

Shape letters: M out features, N in features, R rank, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, loss_towards, train
from pennyweight.solvers.low_rank import check_one_size
from pennyweight.solvers.masks import DTYPES
from pennyweight.train.guided import SelfGuided
from pennyweight.weights import BlockDiagonal, Dense, LowRank, Monarch, Product, Weight
from pennyweight.work import Work

_NAME = "factorize.structured_ffn"
Kind = Literal["low_rank", "block_shuffle", "block_dense"]


@lever(
    _NAME,
    reach="model",
    row=35,
    paper="Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers, "
    "arXiv:2406.16450",
)
@dataclass(frozen=True, kw_only=True)
class StructuredFFN:
    """Structured matrices for the feed-forward layers, trained with a dense guide that fades out.

    With ``steps = 0`` layers are put in and left as they are, to be trained elsewhere. Exact then, up to rounding in
    ``dtype``, where matrices are of the structure.
    """

    kind: Literal["low_rank", "block_shuffle", "block_dense"] = option(
        "low_rank",
        one_of("low_rank", "block_shuffle", "block_dense"),
        "two thin factors; two block-diagonals with a deal between; or a block-diagonal and a thin factor",
    )
    rank: int | None = option(None, at_least(1), "of low_rank and block_dense; none: what density says")
    density: float | None = option(
        None, between(0, 1), "parameters as a share of each matrix; sets the rank; block_shuffle has about 1 / blocks"
    )
    blocks: int = option(4, at_least(1), "of block_shuffle and block_dense")
    start: Literal["weights", "random"] = option(
        "weights", one_of("weights", "random"), "factors at first: nearest to the matrices, or as for new models"
    )
    keep_first: bool = option(True, one_of(True, False), "leave the first block's layers as they are")
    guided: float = option(0.5, between(0, 1), "share of the steps with a guide; 0: none")
    sparing: bool = option(False, one_of(True, False), "run guides only as often as they count")
    trained: Literal["ffn", "all"] = option("ffn", one_of("ffn", "all"), "the new factors alone, or the whole model")
    samples: int = option(128, at_least(1), "windows to train on")
    batch: int = option(8, at_least(1), "windows a step")
    steps: int = option(0, at_least(0), "steps of training; 0: none, and no data")
    rate: float = option(1e-3, at_least(0), "learning rate of AdamW")
    target: Literal["text", "original"] = option(
        "text", one_of("text", "original"), "what is learned: next tokens, or the original's distribution"
    )
    dtype: str = option("float16", one_of(*DTYPES), "what the factors are stored in")

    def __post_init__(self) -> None:
        if self.kind != "block_shuffle":
            check_one_size(self.rank, self.density, _NAME)
        elif self.rank is not None or self.density is not None:
            raise OptionError(f"{_NAME}: the size of block_shuffle follows from blocks; leave rank and density out")

    def change(self, model: Model, work: Work) -> None:
        first = 0 if self.keep_first else -1
        chosen = {
            one.path
            for one in work.maps
            if one.block is not None and one.block > first and one.role.startswith("ffn.") and one.kind != "embedding"
        }
        layers = [one for one in model.anatomy.layers() if one.path in chosen]
        if not layers:
            but = " but the first" if self.keep_first else ""
            raise OptionError(f"{_NAME}: the step selects no feed-forward layer of a block{but}; select some")
        loss = loss_towards(self.target, model, _NAME) if self.steps else None
        windows = work.text(self.samples) if self.steps else None
        generator = torch.Generator().manual_seed(work.seed)
        guides = {}
        for one in layers:
            held = model.module.get_submodule(one.path).weight
            if not isinstance(held, (Tensor, Dense)):
                raise OptionError(
                    f"{_NAME}: {one.path} is {getattr(held, 'form', 'compact')} already; put this step first"
                )
            matrix = anatomy.matrix(model.module, one).float().clone()
            if self.start == "weights":
                guides[one.path] = matrix
            made = self.structured(matrix, generator, one.path)
            anatomy.replace(model.module, one.path, made)
        paths = [one.path for one in layers]
        if loss is not None and windows is not None:
            guide = self._guide(model.module, paths, guides, work.seed)
            kept = [p for path in paths for p in model.module.get_submodule(path).parameters() if p.ndim > 1]
            train(
                model.module, [Group(list(model.module.parameters()) if self.trained == "all" else kept, self.rate)],
                windows, loss, steps=self.steps, batch=self.batch, warmup=0.1, clip=1.0, seed=work.seed,
                report=lambda done, all_: work.report("structured", done, all_),
                callbacks=[] if guide is None else [guide],
            )  # fmt: skip
            if guide is not None:
                guide.finish()
        for path in paths:
            weight = model.module.get_submodule(path).weight
            assert isinstance(weight, Weight)
            anatomy.replace(model.module, path, weight.to(DTYPES[self.dtype]))

    def _guide(self, module: nn.Module, paths: list[str], guides: dict[str, Tensor], seed: int) -> SelfGuided | None:
        if not self.guided:
            return None
        return SelfGuided(
            module, paths, steps=self.steps, part=self.guided, sparing=self.sparing, guides=guides, seed=seed
        )

    def structured(self, matrix: Tensor, generator: torch.Generator, where: str = "a matrix") -> Weight:
        """A float32 weight of this structure for ``matrix`` (M, N): nearest to it, or random and as large.

        Raises:
            OptionError: blocks that do not divide its sides, or a size that leaves no rank, in the words of ``where``.
        """
        if self.start == "random" and self.kind == "low_rank":
            matrix = torch.randn(matrix.shape, generator=generator).to(matrix) * matrix.square().mean().sqrt()
        rows, columns = matrix.shape
        if self.kind == "low_rank":
            return LowRank.nearest(matrix, self._rank(rows, columns, 1, where))
        if columns % self.blocks or (self.kind == "block_shuffle" and (rows % self.blocks or self._odd(rows, columns))):
            raise OptionError(
                f"{_NAME}: {where} ({rows}x{columns}) is not divided by {self.blocks} blocks"
                + (", nor its lesser side by their square" if self.kind == "block_shuffle" else "")
                + "; give other blocks"
            )
        if self.kind == "block_shuffle":
            found = Monarch.nearest(matrix, blocks=self.blocks, rank=min(rows, columns) // self.blocks**2)
            if self.start == "weights":
                return found
            parts = [_orthonormal(part, generator) for part in (found.first.detach(), found.second.detach())]
            return _scaled(Monarch(*parts), matrix)
        rank = self._rank(rows, columns, self.blocks, where)
        up, blocks = block_dense(matrix, self.blocks, rank)
        if self.start == "weights":
            return Product(Dense(up), BlockDiagonal(blocks))
        drawn = Product(Dense(_orthonormal(up[None], generator)[0]), BlockDiagonal(_orthonormal(blocks, generator)))
        return _scaled(drawn, matrix)

    def _odd(self, rows: int, columns: int) -> bool:
        # only factors from matrices need it, as a rank of sub-blocks; random ones are kept to the same shapes
        return bool(min(rows, columns) % self.blocks**2)

    def _rank(self, rows: int, columns: int, blocks: int, where: str) -> int:
        """The rank, a multiple of ``blocks``."""
        one = rows + columns // blocks  # parameters of rank 1
        asked = self.rank if self.rank is not None else int((self.density or 0) * rows * columns / one + 1e-9)
        most = min(rows, columns // blocks) * blocks if blocks > 1 else min(rows, columns)
        rank = min(asked, most) // blocks * blocks
        if not rank or (self.rank is not None and self.rank != rank):
            raise OptionError(
                f"{_NAME}: rank {asked} of {where} ({rows}x{columns}) in {blocks} blocks; give a multiple of "
                f"{blocks} up to {most}"
            )
        return rank


@torch.no_grad()
def block_dense(matrix: Tensor, blocks: int, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (M, R) and (B, R/B, N/B) whose product is nearest to ``matrix`` (M, N) in the Frobenius norm.

    Columns of a block have R/B columns of the first factor to themselves: each block takes its own truncated SVD.
    """
    rows, columns = matrix.shape
    parts = matrix.double().view(rows, blocks, columns // blocks).transpose(0, 1)  # (B, M, N/B)
    left, singular, right = torch.linalg.svd(parts, full_matrices=False)
    each = rank // blocks
    root = singular[:, :each].sqrt()
    up = (left[..., :each] * root[:, None]).transpose(0, 1).reshape(rows, rank)
    return up.to(matrix), (root[..., None] * right[:, :each]).to(matrix)


def _orthonormal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random blocks of the shape of ``like`` (B, m, n) with orthonormal rows or columns."""
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    found: Tensor = (left @ right).to(like)
    return found


@torch.no_grad()
def _scaled(weight: Weight, matrix: Tensor) -> Weight:
    """``weight``, its entries as large as those of ``matrix``, both factors alike."""
    ratio = matrix.square().mean() / weight.dense().square().mean()
    for factor in weight.parameters():
        factor.mul_(ratio**0.25)
    return weight
