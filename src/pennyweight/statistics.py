"""What the calibration walk knows of one linear map, as any lever can ask for it.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pennyweight.errors import DataError


@dataclass(frozen=True)
class Statistics:
    """Statistics of the inputs and the output gradients of one linear map; None where nobody asked for it.

    Attributes:
        count: input rows (tokens) seen.
        second_moment: (N, N) float32, the mean of ``x x^T`` over those rows.
        absolute_mean: (N,) float32, the mean of ``|x|``.
        absolute_max: (N,) float32, the largest ``|x|``.
        gradient: (M,) float32, the mean over rows of the squared gradient of the summed loss (nats) by the output:
            the diagonal of the output factor G of K-FAC.
    """

    count: int = 0
    second_moment: Tensor | None = None
    absolute_mean: Tensor | None = None
    absolute_max: Tensor | None = None
    gradient: Tensor | None = None

    def need(self, name: str, lever: str) -> Tensor:
        """The statistic ``name``, or a DataError that says how ``lever`` gets it."""
        found: Tensor | None = getattr(self, name)
        if found is None:
            raise DataError(f"{lever}: needs calibration data for its {name.replace('_', ' ')}; give some (data=...)")
        return found


#: For levers that need no data.
NO_STATISTICS = Statistics()
