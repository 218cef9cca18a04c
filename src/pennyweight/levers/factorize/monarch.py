"""Monarch matrices: the nearest product of two block-diagonals with a deal between them.

Row 125. Source: T. Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
arXiv:2204.00595, Theorem 1: the sub-blocks of a Monarch matrix are disjoint and of low rank, so that a truncated SVD of
each one gives the nearest Monarch matrix in closed form.
Differs from the source: blocks may be rectangular and sub-blocks of any rank; and nearness may be that of the outputs
on calibration data. That one is no closed form, for inputs of different blocks are correlated: the first factor is the
best one for uncorrelated blocks, and the second is then the best one for it, by least squares over all inputs.
`drawn` and `multiply_out` are for the paper's other two uses: sparse training from nothing, and reverse sparsification,
where a network trained with Monarch matrices goes on as a dense one.

Shape letters: M out features, N in features, K blocks of inputs of width P, L blocks of outputs of height S, R rank of
a sub-block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.damage import Prediction, by_solving
from pennyweight.errors import DataError, OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.solvers.inputs import matrix_of, second_moment_of
from pennyweight.solvers.low_rank import check_one_size, damped
from pennyweight.solvers.masks import DTYPES
from pennyweight.statistics import Statistics
from pennyweight.weights import CompactLinear, Dense, Monarch, Weight


@lever(
    "factorize.monarch",
    reach="weight",
    row=125,
    needs=("second_moment",),
    paper="Monarch: Expressive Structured Matrices for Efficient and Accurate Training, arXiv:2204.00595",
)
@dataclass(frozen=True, kw_only=True)
class MonarchProjection:
    """Two block-diagonals with a deal between them, nearest to the matrix or to its outputs.

    Exact for Monarch matrices of these blocks and this rank, up to rounding in ``dtype``.
    """

    blocks: int = option(4, at_least(1), "blocks of each factor; divides both sides of the matrix")
    rank: int | None = option(None, at_least(1), "rank of each sub-block; none: what density says")
    density: float | None = option(
        None, between(0, 1), "parameters of the factors, as a share of the matrix; sets the rank"
    )
    whiten: bool = option(
        True, one_of(True, False), "weight errors by the inputs' second moment; false: as in the paper, no data"
    )
    damping: float = option(1e-4, at_least(0), "added to the diagonal of the second moment, as a share of its mean")
    dtype: str = option("float16", one_of(*DTYPES), "what the factors are stored in")

    def __post_init__(self) -> None:
        check_one_size(self.rank, self.density, "factorize.monarch")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that these settings read."""
        return frozenset({"second_moment"} if self.whiten else ())

    def rank_for(self, shape: tuple[int, int]) -> int:
        """The rank of the sub-blocks of a matrix of ``shape``.

        Raises:
            OptionError: blocks that do not divide the shape, a rank beyond theirs, or a density that leaves none.
        """
        rows, columns = shape
        if rows % self.blocks or columns % self.blocks:
            raise OptionError(
                f"factorize.monarch: blocks = {self.blocks} does not divide a {rows}x{columns} matrix; "
                "give a divisor of both sides"
            )
        full = min(shape) // self.blocks
        if self.rank is not None:
            if self.rank > full:
                raise OptionError(
                    f"factorize.monarch: rank = {self.rank} for {self.blocks} blocks of a {rows}x{columns} matrix; "
                    f"give at most {full}"
                )
            return self.rank
        assert self.density is not None
        one = self.blocks * (rows + columns)  # parameters of rank 1
        rank = int(self.density * rows * columns / one + 1e-9)
        if rank == 0:
            raise OptionError(
                f"factorize.monarch: density = {self.density} leaves {self.blocks} blocks of a {rows}x{columns} matrix "
                f"no rank; give at least {one / (rows * columns):.4f}, or fewer blocks"
            )
        return min(rank, full)

    @torch.no_grad()
    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        matrix = matrix_of(weight, "factorize.monarch")
        rank = self.rank_for((matrix.shape[0], matrix.shape[1]))
        dtype = DTYPES[self.dtype]
        if self.whiten:
            moment = damped(second_moment_of(statistics, matrix.shape[1], "factorize.monarch"), self.damping)
            first, second = nearest_outputs(matrix, moment, blocks=self.blocks, rank=rank)
        else:
            found = Monarch.nearest(matrix.double(), blocks=self.blocks, rank=rank)
            first, second = found.first, found.second
        return Monarch(first.to(dtype), second.to(dtype))

    @classmethod
    def predict(cls, settings: Sequence[MonarchProjection], weight: Weight, statistics: Statistics) -> list[Prediction]:
        """Predictions from the whole matrix: blocks take strided rows, and the rank of a few of them says nothing."""
        return by_solving(settings, weight, statistics)

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[MonarchProjection]:
        rows, columns = shape
        for blocks, density in ((4, 0.3), (4, 0.5), (4, 0.7), (8, 0.5)):
            divides = not (rows % blocks or columns % blocks)
            if divides and density * rows * columns >= blocks * (rows + columns):
                yield cls(blocks=blocks, density=density)


@torch.no_grad()
def nearest_outputs(matrix: Tensor, moment: Tensor, *, blocks: int, rank: int) -> tuple[Tensor, Tensor]:
    """The factors, in double, of a Monarch weight whose outputs are near those of ``matrix``.

    Args:
        matrix: (M, N).
        moment: (N, N), positive definite: an error D counts as ``tr(D H D^T)``.
        blocks: K = L; divides M and N.
        rank: R of each sub-block.

    Returns:
        (K, R*L, P) and (L, S, K*R), as `Monarch` takes them. The second is the best one for the first.

    Raises:
        DataError: ``moment`` is not positive definite.
    """
    matrix, moment = matrix.double(), moment.double()
    (rows, columns), k, into = matrix.shape, blocks, blocks
    height, width = rows // into, columns // k
    parts = matrix.view(height, into, k, width).permute(1, 2, 0, 3)  # (L, K, S, P)
    which = torch.arange(k, device=matrix.device)
    own = moment.view(k, width, k, width)[which, :, which]  # (K, P, P): the moment of each block's inputs
    root, failed = torch.linalg.cholesky_ex(own)
    if bool(failed.any()):
        raise DataError(
            f"factorize.monarch: the second moment of {columns} inputs is not positive definite; raise damping, "
            "to 0.01 say, or give more calibration data"
        )
    left = torch.linalg.svd(parts @ root, full_matrices=False).U[..., :rank]  # (L, K, S, R)
    down = left.mT @ parts  # (L, K, R, P)
    # shared evenly with the second factor, so that neither overflows 16 bits
    down = down / down.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    seen = (down @ moment.view(k, width, columns)).reshape(into, k * rank, columns)  # middle times inputs
    among = torch.einsum("lmkp,lkrp->lmkr", seen.view(into, k * rank, k, width), down).reshape(into, k * rank, k * rank)
    wanted = matrix.view(height, into, columns).transpose(0, 1) @ seen.mT  # (L, S, K*R): outputs times middle
    # a pseudo-inverse: sub-blocks of less than rank R leave places in the middle that are always zero
    second = wanted @ torch.linalg.pinv(among, rtol=1e-13, hermitian=True)
    return down.permute(1, 2, 0, 3).reshape(k, rank * into, width), second


def drawn(shape: tuple[int, int], *, blocks: int, rank: int, size: float, generator: torch.Generator) -> Monarch:
    """A random Monarch weight of float32, to train from nothing; its entries have the root mean square ``size``."""
    rows, columns = shape
    own = (size / rank**0.5) ** 0.5  # an entry is a sum of ``rank`` products
    first = torch.randn(blocks, rank * blocks, columns // blocks, generator=generator) * own
    second = torch.randn(blocks, rows // blocks, rank * blocks, generator=generator) * own
    return Monarch(first, second)


@torch.no_grad()
def multiply_out(module: nn.Module) -> list[str]:
    """Make every Monarch weight of ``module`` dense, in place; the same function up to rounding.

    Returns:
        The paths of the layers, whose parameters are new ones: make the optimizer anew.

    Raises:
        OptionError: there is no Monarch weight.
    """
    paths = [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, CompactLinear) and isinstance(layer.weight, Monarch)
    ]
    if not paths:
        raise OptionError("factorize.monarch: no layer holds a Monarch weight; nothing is to be multiplied out")
    for path in paths:
        weight = module.get_submodule(path).weight
        assert isinstance(weight, Monarch)
        anatomy.replace(module, path, Dense(weight.dense().detach()))
    return paths
