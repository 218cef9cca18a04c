"""Pre-merged layers: factors for many rows, the matrix they stand for where measured faster for few.

Row 35. Source: X. Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward
Layers", arXiv:2406.16450, section 3.3: with few tokens at once a structured layer is slower than the dense one, so the
product is kept beside the factors. Differs from the source: how many rows are few is measured on this machine, for each
shape and form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, lever, option
from pennyweight.measure import latency
from pennyweight.model import anatomy
from pennyweight.model.compact import compact_layers
from pennyweight.model.model import Model
from pennyweight.weights import (
    BlockDiagonal,
    CompactLinear,
    Dense,
    Kronecker,
    LowRank,
    Monarch,
    Premerged,
    Product,
    Weight,
)
from pennyweight.work import Work

_NAME = "infer.premerge"
#: Forms whose products are several small ones.
_FORMS = (LowRank, Monarch, Product, BlockDiagonal, Kronecker)


@lever(
    _NAME,
    reach="model",
    row=35,
    paper="Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers, "
    "arXiv:2406.16450",
)
@dataclass(frozen=True, kw_only=True)
class Premerge:
    """Run factorized layers as matrices on few rows; files stay as they are, memory takes the matrices.

    Exact up to rounding.
    """

    max_rows: int | None = option(None, at_least(1), "rows of input that are few; none: measured here")
    limit: int = option(64, at_least(1), "rows that are measured at most")

    def change(self, model: Model, work: Work) -> None:
        chosen = {one.path for one in work.maps}
        layers = [
            (path, weight)
            for path, weight in compact_layers(model.module).items()
            if path in chosen
            and isinstance(weight, _FORMS)
            and isinstance(model.module.get_submodule(path), CompactLinear)
        ]
        if not layers:
            raise OptionError(
                f"{_NAME}: the step selects no factorized linear layer; put it behind one that makes some"
            )
        few: dict[tuple[str, tuple[int, int], int], int] = {}
        merged = 0
        for done, (path, weight) in enumerate(layers):
            kind = (weight.form, weight.shape, weight.cost().params)
            if kind not in few:
                few[kind] = faster_up_to(weight, self.limit) if self.max_rows is None else self.max_rows
            if few[kind]:
                anatomy.replace(model.module, path, Premerged(weight, max_rows=few[kind]))
                merged += 1
            work.report("premerge", done + 1, len(layers))
        if not merged:
            raise OptionError(
                f"{_NAME}: none of {len(layers)} layers is faster as a matrix on one row here; leave the step out"
            )


def faster_up_to(weight: Weight, limit: int, *, repeats: int = 10) -> int:
    """The most rows, 0 or a power of two up to ``limit``, for which and for fewer the matrix is measured faster."""
    plain, own = CompactLinear(Dense(weight.dense().detach().clone())), CompactLinear(weight)
    found, rows = 0, 1
    with torch.inference_mode():
        while rows <= limit:
            x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
            if latency.compare(lambda x=x: plain(x), lambda x=x: own(x), repeats=repeats).ratio.value <= 1:  # type: ignore[misc]
                break
            found, rows = rows, 2 * rows
    return found
