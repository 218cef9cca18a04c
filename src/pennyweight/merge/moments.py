"""Second moments of Adam as statistics of a fine-tuned model: taken from its optimizer, compressed, saved, read.

Row 96. Source: P. Mahdavi et al., "Harnessing Optimization Dynamics for Curvature-Informed Model Merging",
arXiv:2509.11167: ``exp_avg_sq`` at the end of fine-tuning stands for the diagonal of the curvature; of a matrix its row
and column sums are enough (N. Shazeer and M. Stern, "Adafactor", arXiv:1804.04235). Differs from the source: nothing.

Shape letters: M rows, N columns, n elements of a stretch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pennyweight.errors import ModelError
from pennyweight.merge.sources import Memory, Shards, Source
from pennyweight.model.checkpoint import SINGLE
from pennyweight.model.safetensors_file import write
from pennyweight.safe_write import staged

_ROWS, _COLUMNS = "::rows", "::columns"


def second_moments(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """``exp_avg_sq`` of every parameter of ``module``, by its name, float32.

    Raises:
        ModelError: a parameter that the optimizer keeps no second moment of.
    """
    found = {}
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            raise ModelError(
                f"second moments: {type(optimizer).__name__} keeps none of {name}; train it with Adam first"
            )
        found[name] = state["exp_avg_sq"].detach().float().clone()
    return found


def compressed(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Row and column sums of each matrix (M, N), ``v ~ r c^T / sum(r)``; other tensors as they are.

    Row and column sums of what is read back are those of the original.
    """
    found = {}
    for name, moment in moments.items():
        if moment.ndim == 2:
            # second moments reach down to 1e-19: sums of them are safe in float32, squares would not be
            found[name + _ROWS], found[name + _COLUMNS] = moment.sum(1), moment.sum(0)
        else:
            found[name] = moment
    return found


def save_moments(directory: str | Path, moments: Mapping[str, Tensor], *, overwrite: bool = False) -> None:
    """Write second moments, compressed or not, for `read_moments`.

    Raises:
        OutputError: the directory holds something, or cannot be written.
    """
    with staged(directory, overwrite=overwrite) as aside:
        write(aside / SINGLE, moments)


def read_moments(given: str | Path | Mapping[str, Tensor]) -> Source:
    """Second moments as a source of elements, compressed or not.

    Args:
        given: a directory that `save_moments` wrote, or what it was given.

    Raises:
        ModelError: no such directory, or a damaged one.
    """
    return _Moments(Memory(given, "second moments") if isinstance(given, Mapping) else Shards(given))


class _Moments:
    """Elements of second moments, products of row and column sums made as they are read."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.label = inner, inner.label
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        kinds = inner.kinds()
        self._kinds = {name: kind for name, kind in kinds.items() if "::" not in name}
        for name in kinds:
            if name.endswith(_ROWS):
                stem = name.removesuffix(_ROWS)
                if stem + _COLUMNS not in kinds:
                    raise ModelError(f"{self.label}: {stem} has row sums and no column sums; save it again")
                rows, columns = (self._whole(stem + end, kinds[stem + end][1][0]) for end in (_ROWS, _COLUMNS))
                self._factors[stem] = (rows / rows.sum().clamp(min=torch.finfo(torch.float32).tiny), columns)
                self._kinds[stem] = (torch.float32, (len(rows), len(columns)))

    def _whole(self, name: str, size: int) -> Tensor:
        out = torch.empty(size)
        self.inner.read(name, 0, out)
        return out

    def kinds(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self._kinds

    def read(self, name: str, start: int, out: Tensor) -> None:
        if name not in self._factors:
            self.inner.read(name, start, out)
            return
        rows, columns = self._factors[name]
        width, end = len(columns), start + len(out)
        first, last = start // width, -(-end // width)
        product = torch.outer(rows[first:last], columns).view(-1)
        out.copy_(product[start - first * width : end - first * width])

    def close(self) -> None:
        self.inner.close()
