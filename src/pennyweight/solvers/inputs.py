"""What levers of one matrix accept: the matrix itself, and statistics that fit it.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pennyweight.errors import FormError, ShapeError
from pennyweight.statistics import Statistics
from pennyweight.weights import Dense, NofM, Sparse, Weight


def matrix_of(weight: Weight, where: str) -> Tensor:
    """The matrix (M, N) of a dense weight in float32, a new tensor or a read-only view.

    Raises:
        FormError: the weight is compact already, and making it dense would throw away what made it so.
    """
    if not isinstance(weight, Dense):
        raise FormError(
            f"{where}: the weight is {weight.form} already, {weight.shape[0]}x{weight.shape[1]}; "
            "give the dense weight, or put this step first"
        )
    return weight.matrix.detach().float()


def prunable(weight: Weight, where: str) -> Tensor:
    """The matrix (M, N) of a dense weight, or of one that is sparse already: its zeros are the first to go again.

    Raises:
        FormError: another form, whose structure pruning would throw away.
    """
    if isinstance(weight, (Sparse, NofM)) and (weight.values is None or isinstance(weight.values, Dense)):
        return weight.dense().detach().float()
    return matrix_of(weight, where)


def second_moment_of(statistics: Statistics, width: int, where: str) -> Tensor:
    """The second moment (N, N) of inputs ``width`` wide.

    Raises:
        DataError: there is none.
        ShapeError: it is of other inputs.
    """
    found = statistics.need("second_moment", where)
    if found.shape != (width, width):
        raise ShapeError(
            f"{where}: a second moment of shape {tuple(found.shape)} for {width} inputs; give ({width}, {width})"
        )
    return found


def without_dead(matrices: Sequence[Tensor], energy: Tensor) -> list[Tensor]:
    """``matrices`` (M, N) with zeros for the inputs of no ``energy`` (N,): nothing is known of them, nothing depends
    on them.

    As the official codes of GPTQ and SparseGPT do.
    """
    dead = energy == 0
    return [matrix.masked_fill(dead, 0) for matrix in matrices] if bool(dead.any()) else list(matrices)
