"""How much a weight matters: one signature for every score that pruning goes by.

A score takes a matrix and what is known of it, and gives a number for each entry; the smallest go first
(`pennyweight.solvers.masks.Selection`). Sources: M. Zhu and S. Gupta, arXiv:1710.01878 (magnitude); M. Sun et al.,
arXiv:2306.11695 (Wanda); B. Hassibi and D. Stork, "Second Order Derivatives for Network Pruning: Optimal Brain
Surgeon", 1992, on the second moment of the inputs as E. Frantar and D. Alistarh, arXiv:2301.00774, use it (SparseGPT);
L. Liu et al., "NoWag: A Unified Framework for Shape Preserving Compression of Large Language Models",
arXiv:2504.14569; Y. LeCun et al., "Optimal Brain Damage", 1989, with the Fisher diagonal in place of the Hessian's;
P. Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv:1906.10771 (Taylor). Differs from the
sources: SparseGPT's own score is that of the columns still to come, which its solver (`solvers.pruning`) uses; here
all weights are scored at once, against the inverse of the whole moment.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.errors import DataError, OptionError, ShapeError
from pennyweight.solvers.factor import factor_of
from pennyweight.solvers.inputs import second_moment_of
from pennyweight.statistics import NO_STATISTICS, Statistics


@dataclass(frozen=True)
class Gradients(Statistics):
    """Statistics of a matrix whose own gradients are known, too.

    Attributes:
        weight_gradient: (M, N), the mean gradient of the loss.
        weight_fisher: (M, N), the mean squared gradient: the diagonal of the empirical Fisher matrix.
    """

    weight_gradient: Tensor | None = None
    weight_fisher: Tensor | None = None


Score = Callable[[Tensor, Statistics, str], Tensor]


def score(name: str, weight: Tensor, statistics: Statistics = NO_STATISTICS, *, where: str = "score") -> Tensor:
    """The score (M, N) called ``name`` of ``weight`` (M, N), 0 or more; larger matters more.

    Args:
        name: "magnitude", "wanda", "sparsegpt", "nowag", "fisher" or "taylor".
        weight: (M, N) float32.
        statistics: of its inputs; `Gradients` for "fisher" and "taylor".
        where: named in errors.

    Raises:
        OptionError: no such score.
        DataError: statistics that it needs are missing.
    """
    if name not in SCORES:
        raise OptionError(f"{where}: score {name!r}; give one of {', '.join(SCORES)}")
    return SCORES[name](weight, statistics, where)


def magnitude(weight: Tensor, statistics: Statistics = NO_STATISTICS, where: str = "magnitude") -> Tensor:
    """``|w|``."""
    return weight.abs()


def wanda(weight: Tensor, statistics: Statistics, where: str = "wanda") -> Tensor:
    """``|w| * ||x||``, the norm of the input taken per token: (E x^2)^(1/2)."""
    return weight.abs() * _energy(weight, statistics, where).sqrt()


def sparsegpt(weight: Tensor, statistics: Statistics, where: str = "sparsegpt", *, damping: float = 0.01) -> Tensor:
    """``w^2 / (H^-1)_cc`` of column c: the squared error left when this weight alone goes and its row makes good.

    H is the second moment, its diagonal raised by ``damping`` times its mean. Dead inputs count as in
    `pennyweight.solvers.factor`.
    """
    factor = factor_of(second_moment_of(statistics, weight.shape[1], where), damping=damping, where=where)
    # H^-1 = U^T U with U_ij = lower_ji * diagonal_i: the diagonal of H^-1 is the sum of squares of a column of U
    inverse = (factor.lower * factor.diagonal).square().sum(1)
    return weight.square() / inverse


def nowag(weight: Tensor, statistics: Statistics, where: str = "nowag") -> Tensor:
    """``w^2 * E x^2`` of the matrix with its columns, and then its rows, brought to norm 1."""
    return normalized(weight)[0].square() * _energy(weight, statistics, where)


def normalized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``weight`` (M, N) with its columns and then its rows divided by their norms: it, those of rows, those of columns.

    ``matrix * rows * columns`` is the weight again; zeros stay zeros, their norms counted as 1.
    """
    columns = _norms(weight, 0)  # (1, N)
    rows = _norms(weight / columns, 1)  # (M, 1)
    return weight / columns / rows, rows, columns


def fisher(weight: Tensor, statistics: Statistics, where: str = "fisher") -> Tensor:
    """``w^2 * F / 2`` with F the diagonal of the empirical Fisher matrix: the loss when this weight alone goes."""
    return 0.5 * weight.square() * _gradient(weight, statistics, "weight_fisher", where)


def taylor(weight: Tensor, statistics: Statistics, where: str = "taylor") -> Tensor:
    """``|w * g|``: the change of the loss, to first order, when this weight alone goes."""
    return (weight * _gradient(weight, statistics, "weight_gradient", where)).abs()


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "nowag": nowag,
    "fisher": fisher,
    "taylor": taylor,
}


def _energy(weight: Tensor, statistics: Statistics, where: str) -> Tensor:  # (N,)
    return second_moment_of(statistics, weight.shape[1], where).diagonal()


def _norms(weight: Tensor, dim: int) -> Tensor:
    found = weight.norm(dim=dim, keepdim=True)
    return torch.where(found == 0, torch.ones_like(found), found)


def _gradient(weight: Tensor, statistics: Statistics, name: str, where: str) -> Tensor:
    found: Tensor | None = getattr(statistics, name) if isinstance(statistics, Gradients) else None
    if found is None:
        raise DataError(f"{where}: needs {name.replace('_', ' ')}s of the loss; give Gradients that hold them")
    if found.shape != weight.shape:
        raise ShapeError(
            f"{where}: {name} {tuple(found.shape)} for a weight {tuple(weight.shape)}; give the same shape"
        )
    return found
