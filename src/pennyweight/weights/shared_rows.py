"""Rows that share a smaller table: by quotient, remainder or hash of their number, or by a stored index.

Sources: H. Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation
Systems", arXiv:1909.02107 (quotient and remainder); L. Zhou et al., "Serving Deep Learning Models with Deduplication
from Relational Databases", arXiv:2201.10442 (the stored index of blocks). Differs from them: nothing in the forms.

Shape letters: M out features (rows of the table that it stands for), N in features, R rows of the table held.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pennyweight.errors import FormError, OptionError, ShapeError
from pennyweight.weights.hashed import hash32
from pennyweight.weights.ids import known_ids
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, form

Rule = Literal["stored", "quotient", "remainder", "hash"]
_RULES = ("stored", "quotient", "remainder", "hash")


@form("shared_rows")
class SharedRows(Weight):
    """``W[i] = table[place(i)]`` of shape (M, N) for a table of shape (R, N).

    Args:
        table: (R, N).
        index: (ceil(M / step),) whole numbers for the rule "stored", kept in 16 bits where they fit, else in 32.
        rows: M.
        rule: place(i) is i // step ("quotient"), i mod R ("remainder"), a hash of i ("hash"), or
            index[i // step] * step + i mod step ("stored": blocks of ``step`` rows).
        step: see ``rule``.

    Raises:
        ShapeError: an index of another length, or a table too short for a rule.
        FormError: an index that points beyond the table.
        OptionError: an unknown rule, or a step below 1.

    Cost: parameters of the table; its bytes, and 2 or 4 for each entry of an index; FLOPs a row as of the table, whose
    outputs are copied. Exact where rows are equal that share one.
    """

    tensors = ("index",)
    parts = ("table",)
    table: Weight
    index: Tensor | None

    def __init__(
        self, table: Weight, index: Tensor | None = None, *, rows: int, rule: Rule = "remainder", step: int = 1
    ) -> None:
        super().__init__(shape=(rows, table.shape[1]))
        if rule not in _RULES or step < 1:
            raise OptionError(f"SharedRows: rule {rule!r}, step {step}; give one of {', '.join(_RULES)}, and 1 or more")
        self.table, self.rule, self.step = table, rule, step
        blocks = -(-rows // step)
        if (index is not None) != (rule == "stored"):
            raise ShapeError(f"SharedRows: rule {rule!r} {'without' if index is None else 'with'} an index")
        if rule == "quotient" and (rows - 1) // step >= table.shape[0]:
            raise ShapeError(f"SharedRows: {rows} rows by {step} need {blocks} rows; the table has {table.shape[0]}")
        held = None
        if index is not None:
            if index.shape != (blocks,) or index.is_floating_point():
                raise ShapeError(f"SharedRows: a {index.dtype} index {tuple(index.shape)}; give ({blocks},) integers")
            most = table.shape[0] // step
            if index.device.type != "meta" and not 0 <= int(index.min()) <= int(index.max()) < most:
                raise FormError(
                    f"SharedRows: index reaches from {int(index.min())} to {int(index.max())} of {most} blocks"
                )
            held = index.to(torch.int16 if most <= 2**15 else torch.int32)
        self.register_buffer("index", held)

    def places(self, index: Tensor) -> Tensor:
        """Rows of the table that rows ``index`` of W are."""
        if self.rule == "remainder":
            return index % self.table.shape[0]
        if self.rule == "quotient":
            return torch.div(index, self.step, rounding_mode="floor")
        if self.rule == "hash":
            return hash32(index + 0x9E3779B9) % self.table.shape[0]
        assert self.index is not None
        block = torch.div(index, self.step, rounding_mode="floor")
        return self.index.long()[block] * self.step + index % self.step

    def _all(self) -> Tensor:
        return self.places(torch.arange(self.shape[0], device=self.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.table.forward(x)[..., self._all()]

    def dense(self) -> Tensor:
        return self.table.dense()[self._all()]

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        return self.table.rows(self.places(known_ids(index, self.shape[0], "SharedRows")))

    def settings(self) -> dict[str, Any]:
        return {"rows": self.shape[0], "rule": self.rule, "step": self.step}

    def cost(self) -> Cost:
        held = self.table.cost()
        return Cost(held.params, held.bytes + (0 if self.index is None else self.index.nbytes), held.flops)
