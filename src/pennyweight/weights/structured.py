"""Structured weights: block-diagonal, diagonal, permutation, and the Kronecker product.

Source of the nearest Kronecker product: C. Van Loan and N. Pitsianis, "Approximation with Kronecker products", in
Linear Algebra for Large Scale and Real-Time Applications, 1993: a truncated SVD of the rearranged matrix. Differs from
the source: nothing.

Shape letters: M out features, N in features, K blocks; ... any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.errors import FormError, OptionError, ShapeError
from pennyweight.weights.combine import Sum
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, check_finite, form


def held(tensor: Tensor, name: str) -> nn.Parameter:
    """``tensor`` as a parameter, itself if it is one already.

    Raises:
        FormError: NaN, infinity or whole numbers.
    """
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise FormError(f"{name} is {tensor.dtype}; give 16, 32 or 64 bits of floating point")
    check_finite(tensor, name)
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


@form("block_diagonal")
class BlockDiagonal(Weight):
    """K blocks of (m, n) along the diagonal of a matrix (K*m, K*n).

    Args:
        blocks: (K, m, n).

    Cost: K*m*n parameters, 2*K*m*n FLOPs a row. Exact for a matrix that is zero elsewhere; every matrix where K = 1.
    """

    tensors = ("blocks",)

    def __init__(self, blocks: Tensor) -> None:
        if blocks.ndim != 3:
            raise ShapeError(f"BlockDiagonal: blocks {tuple(blocks.shape)}; give (blocks, out of one, in of one)")
        super().__init__(shape=(blocks.shape[0] * blocks.shape[1], blocks.shape[0] * blocks.shape[2]))
        self.blocks = held(blocks, "BlockDiagonal: blocks")

    @classmethod
    def nearest(cls, matrix: Tensor, blocks: int) -> BlockDiagonal:
        """``matrix`` (M, N) with all but its ``blocks`` diagonal blocks left out."""
        _check_divides(matrix, (blocks, blocks), "BlockDiagonal.nearest")
        split = matrix.detach().reshape(blocks, matrix.shape[0] // blocks, blocks, -1)
        which = torch.arange(blocks, device=matrix.device)
        return cls(split[which, :, which].clone())

    def forward(self, x: Tensor) -> Tensor:
        return _each_block(x, self.blocks.to(x.dtype))

    def left(self, x: Tensor) -> Tensor:
        return _each_block(x, self.blocks.to(x.dtype).mT)

    def dense(self) -> Tensor:
        k, m, n = self.blocks.shape
        which = torch.arange(k, device=self.blocks.device)
        empty = self.blocks.new_zeros(k, k, m, n)
        return empty.index_put((which, which), self.blocks).transpose(1, 2).reshape(self.shape)

    @property
    def T(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.mT)

    def cost(self) -> Cost:
        count = self.blocks.numel()
        return Cost(count, self.blocks.nbytes, 2 * count)


def _each_block(x: Tensor, blocks: Tensor) -> Tensor:
    """(..., K*n) -> (..., K*m): each block on its own part, as one batch of matrix products."""
    k, m, n = blocks.shape
    parts = x.reshape(x.shape[:-1].numel(), k, n).transpose(0, 1)  # (K, rows, n)
    found: Tensor = torch.bmm(parts, blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], k * m)
    return found


def _check_divides(matrix: Tensor, by: tuple[int, int], where: str) -> None:
    if matrix.ndim != 2:
        raise ShapeError(f"{where}: a tensor of shape {tuple(matrix.shape)} is not a matrix; give (out, in)")
    if min(by) < 1 or matrix.shape[0] % by[0] or matrix.shape[1] % by[1]:
        raise ShapeError(f"{where}: {by} does not divide the shape {tuple(matrix.shape)}; give divisors of its sides")
    check_finite(matrix, f"{where}: matrix")


@form("monarch")
class Monarch(Weight):
    """Two block-diagonals: the outputs of the first are dealt out to the blocks of the second, whose own interleave.

    ``W[s*L + l, k*P + p] = sum of second[l, s, j] * first[k, q, p]`` over the flat middle places k*Q + q that are
    j*L + l: output l of the deal gets every L-th place.

    Source: T. Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
    arXiv:2204.00595 (M = P L P^T R) and its Theorem 1 (the projection). Differs from the source: blocks may be
    rectangular, and sub-blocks of any rank.

    Args:
        first: (K, Q, P) blocks on the inputs, N = K*P.
        second: (L, S, R) blocks on the dealt middle, L*R = K*Q and M = L*S.

    Raises:
        ShapeError: the middles differ.

    Cost: K*Q*P + L*S*R parameters, twice as many FLOPs a row. Exact for its own kind; every matrix where K = L = 1 and
    Q reaches its rank.
    """

    tensors = ("first", "second")

    def __init__(self, first: Tensor, second: Tensor) -> None:
        middle = [t.shape[0] * t.shape[at] if t.ndim == 3 else -1 for t, at in ((first, 1), (second, 2))]
        if middle[0] != middle[1] or middle[0] < 1:
            raise ShapeError(
                f"Monarch: first {tuple(first.shape)} and second {tuple(second.shape)} share no middle; "
                f"give (K, Q, P) and (L, S, R) with K*Q = L*R"
            )
        super().__init__(shape=(second.shape[0] * second.shape[1], first.shape[0] * first.shape[2]))
        self.first, self.second = held(first, "Monarch: first"), held(second, "Monarch: second")

    @classmethod
    def nearest(cls, matrix: Tensor, *, blocks: int | tuple[int, int], rank: int = 1) -> Monarch:
        """The Monarch weight nearest to ``matrix`` (M, N) in the Frobenius norm.

        Its sub-blocks ``matrix[l::L, k*P:(k+1)*P]`` are disjoint, and each takes its own truncated SVD.

        Args:
            matrix: (M, N).
            blocks: K = L, or (K, L); K divides N and L divides M.
            rank: of each sub-block, at least 1; S*P / (S + P) of it makes no saving.
        """
        k, into = (blocks, blocks) if isinstance(blocks, int) else blocks
        _check_divides(matrix, (into, k), "Monarch.nearest")
        m, n = matrix.shape
        if not 1 <= rank <= min(m // into, n // k):
            raise OptionError(f"Monarch.nearest: rank {rank} of sub-blocks {(m // into, n // k)}; give 1 to the lesser")
        parts = matrix.detach().double().view(m // into, into, k, n // k).permute(1, 2, 0, 3)  # (L, K, S, P)
        left, singular, right = torch.linalg.svd(parts, full_matrices=False)
        root = singular[..., :rank, None].sqrt()  # shared evenly: training wants both factors of one size
        down = root * right[..., :rank, :]  # (L, K, rank, P)
        up = left[..., :rank] * root.mT  # (L, K, S, rank)
        # place k*Q + q of the middle, q = i*L + l, goes to block l as its entry k*rank + i
        first = down.permute(1, 2, 0, 3).reshape(k, rank * into, n // k)
        second = up.permute(0, 2, 1, 3).reshape(into, m // into, k * rank)
        return cls(first.to(matrix), second.to(matrix))

    def forward(self, x: Tensor) -> Tensor:
        middle = _each_block(x, self.first.to(x.dtype))
        return _dealt_back(_each_block(_dealt(middle, len(self.second)), self.second.to(x.dtype)), len(self.second))

    def left(self, x: Tensor) -> Tensor:
        middle = _each_block(_dealt(x, len(self.second)), self.second.to(x.dtype).mT)
        return _each_block(_dealt_back(middle, len(self.second)), self.first.to(x.dtype).mT)

    def dense(self) -> Tensor:
        return self.left(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def cost(self) -> Cost:
        count = self.first.numel() + self.second.numel()
        return Cost(count, self.first.nbytes + self.second.nbytes, 2 * count)


def _dealt(x: Tensor, into: int) -> Tensor:
    """Deal the last dimension out to ``into`` hands: place j*into + l becomes place l*R + j."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // into, into).transpose(-1, -2).flatten(-2)


def _dealt_back(x: Tensor, into: int) -> Tensor:
    """The inverse of `_dealt`."""
    return x.reshape(*x.shape[:-1], into, x.shape[-1] // into).transpose(-1, -2).flatten(-2)


@form("kronecker")
class Kronecker(Weight):
    """``W = outer (x) inner``: the matrix (M1*M2, N1*N2) whose block i, j is ``outer[i, j] * inner``.

    Args:
        outer: (M1, N1).
        inner: (M2, N2).

    Cost: M1*N1 + M2*N2 parameters; FLOPs a row: the lesser of 2*N1*M2*(N2 + M1) (inner first) and 2*M1*N2*(N1 + M2).
    Exact for its own kind, and every matrix where one factor is of size 1.
    """

    tensors = ("outer", "inner")

    def __init__(self, outer: Tensor, inner: Tensor) -> None:
        if outer.ndim != 2 or inner.ndim != 2:
            raise ShapeError(f"Kronecker: outer {tuple(outer.shape)}, inner {tuple(inner.shape)}; give two matrices")
        super().__init__(shape=(outer.shape[0] * inner.shape[0], outer.shape[1] * inner.shape[1]))
        self.outer, self.inner = held(outer, "Kronecker: outer"), held(inner, "Kronecker: inner")

    @classmethod
    def nearest(cls, matrix: Tensor, outer: tuple[int, int]) -> Kronecker:
        """The one nearest to ``matrix`` (M, N) in the Frobenius norm, its first factor of shape ``outer``."""
        return cls._terms(matrix, outer, 1)[0]

    @classmethod
    def nearest_sum(cls, matrix: Tensor, outer: tuple[int, int], *, terms: int) -> Sum:
        """The nearest sum of ``terms`` Kronecker products; exact at ``min(M1*N1, M2*N2)`` terms."""
        if terms < 1:
            raise OptionError(f"Kronecker.nearest_sum: {terms} terms; give at least 1")
        return Sum(*cls._terms(matrix, outer, terms))

    @classmethod
    def _terms(cls, matrix: Tensor, outer: tuple[int, int], terms: int) -> list[Kronecker]:
        _check_divides(matrix, outer, "Kronecker.nearest")
        (m1, n1), (m2, n2) = outer, (matrix.shape[0] // outer[0], matrix.shape[1] // outer[1])
        # one row a block: a Kronecker product is of rank one here
        arranged = matrix.detach().double().view(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
        left, singular, right = torch.linalg.svd(arranged, full_matrices=False)
        root = singular.sqrt()
        return [
            cls((left[:, i] * root[i]).view(m1, n1).to(matrix), (root[i] * right[i]).view(m2, n2).to(matrix))
            for i in range(min(terms, len(root)))
        ]

    @property
    def _inner_first(self) -> bool:
        (m1, n1), (m2, n2) = self.outer.shape, self.inner.shape
        return n1 * m2 * (n2 + m1) <= m1 * n2 * (n1 + m2)

    def forward(self, x: Tensor) -> Tensor:
        return _both_sides(x, self.outer.to(x.dtype), self.inner.to(x.dtype), self._inner_first)

    def left(self, x: Tensor) -> Tensor:
        return _both_sides(x, self.outer.T.to(x.dtype), self.inner.T.to(x.dtype), not self._inner_first)

    def dense(self) -> Tensor:
        # torch.kron fails on some transposed arguments (views that their strides do not allow; torch 2.13)
        outer, inner = self.outer.to(self.dtype), self.inner.to(self.dtype)
        return (outer[:, None, :, None] * inner[None, :, None, :]).reshape(self.shape)

    @property
    def T(self) -> Kronecker:
        return Kronecker(self.outer.T, self.inner.T)

    def cost(self) -> Cost:
        (m1, n1), (m2, n2) = self.outer.shape, self.inner.shape
        flops = 2 * min(n1 * m2 * (n2 + m1), m1 * n2 * (n1 + m2))
        return Cost(m1 * n1 + m2 * n2, self.outer.nbytes + self.inner.nbytes, flops)


def _both_sides(x: Tensor, outer: Tensor, inner: Tensor, inner_first: bool) -> Tensor:
    """``x @ (outer (x) inner).T``, as ``outer @ X @ inner.T`` with the rows of x read as matrices X (N1, N2)."""
    square = x.reshape(x.shape[:-1].numel(), outer.shape[1], inner.shape[1])
    found = outer @ (square @ inner.T) if inner_first else (outer @ square) @ inner.T
    return found.reshape(*x.shape[:-1], outer.shape[0] * inner.shape[0])


@form("diagonal")
class Diagonal(Weight):
    """A diagonal matrix.

    Args:
        diagonal: (N,).

    Cost: N parameters, N FLOPs a row. Exact for a diagonal matrix.
    """

    tensors = ("diagonal",)

    def __init__(self, diagonal: Tensor) -> None:
        if diagonal.ndim != 1:
            raise ShapeError(f"Diagonal: a tensor of shape {tuple(diagonal.shape)}; give (features,)")
        super().__init__(shape=(diagonal.shape[0], diagonal.shape[0]))
        self.diagonal = held(diagonal, "Diagonal: diagonal")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.diagonal.to(x.dtype)

    def left(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def dense(self) -> Tensor:
        return torch.diag(self.diagonal)

    @property
    def T(self) -> Diagonal:
        return Diagonal(self.diagonal)

    def cost(self) -> Cost:
        return Cost(self.shape[0], self.diagonal.nbytes, self.shape[0])


@form("permutation")
class Permutation(Weight):
    """Features in another order: output i is input ``index[i]``.

    Args:
        index: (N,) whole numbers, each of 0 ... N-1 once; kept in 16 bits where they fit, else in 32.

    Cost: no parameters, 2 or 4 bytes a feature, no FLOPs. Exact.
    """

    tensors = ("index",)
    any_dtype = True
    index: Tensor

    def __init__(self, index: Tensor) -> None:
        if index.ndim != 1 or index.is_floating_point():
            raise ShapeError(f"Permutation: a {index.dtype} index {tuple(index.shape)}; give whole numbers (features,)")
        super().__init__(shape=(index.shape[0], index.shape[0]))
        small = index.to(torch.int16 if len(index) <= 2**15 else torch.int32)
        if index.device.type != "meta" and not torch.equal(index.long().sort().values.cpu(), torch.arange(len(index))):
            raise FormError(f"Permutation: index is not each of 0 to {len(index) - 1} once")
        self.register_buffer("index", small)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.index.long()]

    def left(self, x: Tensor) -> Tensor:
        return x[..., self.index.long().argsort()]

    def dense(self) -> Tensor:
        return torch.nn.functional.one_hot(self.index.long(), self.shape[1]).float()

    @property
    def T(self) -> Permutation:
        return Permutation(self.index.long().argsort())

    def rows(self, index: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.index.long()[index], self.shape[1]).float()

    def cost(self) -> Cost:
        return Cost(params=0, bytes=self.index.nbytes, flops=0)
