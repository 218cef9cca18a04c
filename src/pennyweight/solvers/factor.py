"""The triangular factor that tells column solvers how the error of one column is made good by the later ones.

With the damped second moment H = E[x x^T] + lambda I and its inverse H^-1 = U^T U (U upper triangular), rounding
column i by e_i away from where it stands is best answered by moving every later column j by -e_i U_ij / U_ii (E.
Frantar et al., "GPTQ", arXiv:2210.17323, eq. 7 and step 3; the same factor serves "SparseGPT", arXiv:2301.00774).
Differs from the source: U comes from one Cholesky factor of H with its indices reversed (H = R R^T with R upper
triangular, U = R^-1), which needs neither the inverse of H nor a second factorization.

Shape letters: N in features.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pennyweight.errors import DataError, ShapeError
from pennyweight.weights import check_finite

Order = Literal["given", "descending"]


@dataclass(frozen=True)
class Factor:
    """What a column solver needs of the second moment.

    Inputs that were zero in every calibration row count as uncorrelated with all others and of energy 1, as in the
    official codes.

    Attributes:
        lower: (N, N) float32, unit lower triangular; ``lower[j, i] = U_ij / U_ii`` is the share of the error of
            column i that column j makes good.
        diagonal: (N,) float32, ``U_ii``; an error e_i costs ``(e_i / U_ii)**2`` of the objective tr(D H D^T).
        order: (N,) the columns in the order they are solved, or None for as given. The other fields follow this order.
    """

    lower: Tensor
    diagonal: Tensor
    order: Tensor | None


def factorize(second_moment: Tensor, *, damping: float, order: Order = "given", where: str = "factor") -> Factor:
    """The factor of ``second_moment`` (N, N).

    Args:
        second_moment: (N, N), symmetric.
        damping: added to the diagonal, as a share of its mean.
        order: "descending" solves the inputs of largest second moment first.
        where: named in errors.

    Raises:
        ShapeError: not a square matrix.
        FormError: NaN or infinity.
        DataError: all zero, or not positive definite with this damping.
    """
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise ShapeError(f"{where}: a second moment of shape {tuple(second_moment.shape)} is not (in, in)")
    check_finite(second_moment, f"{where}: second moment")
    h = second_moment.detach().float()
    dead = h.diagonal() == 0
    if bool(dead.all()):
        raise DataError(f"{where}: every calibration input of this layer is zero; give data that reaches it")
    permutation: Tensor | None = None
    diagonal = torch.where(dead, 1.0, h.diagonal())
    if order == "descending":
        permutation = diagonal.argsort(descending=True, stable=True)
        h, diagonal = h[permutation][:, permutation], diagonal[permutation]
    h = h.flip(0, 1)  # a copy, mended in place
    h.diagonal().copy_((diagonal + damping * diagonal.mean()).flip(0))
    reversed_inverse = _inverse_of_cholesky(h, damping, where)  # J R^-1 J, lower triangular
    upper = reversed_inverse.flip(0, 1)
    diagonal = upper.diagonal().clone()
    lower = upper.div_(diagonal[:, None]).T.contiguous()
    return Factor(lower, diagonal, permutation)


def _inverse_of_cholesky(h: Tensor, damping: float, where: str) -> Tensor:
    # float32 does in all but the worst-conditioned cases, and takes half the time
    for dtype in (torch.float32, torch.float64):
        factor, failed = torch.linalg.cholesky_ex(h.to(dtype))
        if not failed:
            inverse: Tensor = _lower_inverse(factor).float()
            return inverse
    raise DataError(
        f"{where}: the second moment of {h.shape[0]} inputs is not positive definite with damping {damping}; "
        f"raise damping to {max(10 * damping, 0.01):g} or give more calibration data"
    )


def _lower_inverse(lower: Tensor, leaf: int = 256) -> Tensor:
    """Inverse of a lower triangular matrix, by halves: matrix products do a third of the work of a general solve."""
    size = lower.shape[0]
    if size <= leaf:
        solved: Tensor = torch.linalg.solve_triangular(lower, torch.eye(size).to(lower), upper=False)
        return solved
    half = size // 2
    first, second = _lower_inverse(lower[:half, :half], leaf), _lower_inverse(lower[half:, half:], leaf)
    inverse = torch.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, second
    torch.matmul(second @ lower[half:, :half], first, out=inverse[half:, :half])
    inverse[half:, :half].neg_()
    return inverse


@dataclass
class _Latest:
    """The factors of the second moment that was asked for last.

    Query, key and value share their inputs, and so do the settings that a planner tries on one matrix: all of them ask
    for the same factor in a row. It is dropped with the tensor it belongs to.
    """

    tensor: weakref.ref[Tensor] | None = None
    version: int = -1
    factors: dict[tuple[float, Order], Factor] = field(default_factory=dict)

    def clear(self, *_: object) -> None:
        self.tensor, self.version, self.factors = None, -1, {}

    def get(self, second_moment: Tensor, damping: float, order: Order, where: str) -> Factor:
        if second_moment.is_inference():  # its changes in place are not counted: never answer from before
            return factorize(second_moment, damping=damping, order=order, where=where)
        # the version counts changes in place, so that a moment still being accumulated is never answered from before
        if self.tensor is None or self.tensor() is not second_moment or self.version != second_moment._version:
            self.clear()
        found = self.factors.get((damping, order))
        if found is None:
            found = factorize(second_moment, damping=damping, order=order, where=where)
            self.tensor, self.version = weakref.ref(second_moment, self.clear), second_moment._version
            self.factors[damping, order] = found
        return found


_LATEST = _Latest()


def factor_of(second_moment: Tensor, *, damping: float, order: Order = "given", where: str = "factor") -> Factor:
    """`factorize`, remembering the factors of the latest second moment for as long as that tensor lives."""
    return _LATEST.get(second_moment, damping, order, where)
