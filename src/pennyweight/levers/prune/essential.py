"""Essential sparsity: the smallest weights of all layers together go, as many as cost nothing.

Row 15. Source: A. Jaiswal, S. Liu, T. Chen and Z. Wang, "The Emergence of Essential Sparsity in Large Pre-trained
Models: The Weights that Matter", arXiv:2306.03805. Differs from the source: how many is measured, as the lower end of
the knee's interval on the calibration text; `pennyweight essential` shows the whole curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pennyweight.errors import OptionError
from pennyweight.essential import knee_of, layers_of, masks_for
from pennyweight.lever import between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.masks import DTYPES, sparse
from pennyweight.solvers.spread import SCOPES
from pennyweight.work import Work


@lever(
    "prune.essential",
    reach="model",
    row=15,
    paper="The Emergence of Essential Sparsity in Large Pre-trained Models, arXiv:2306.03805",
)
@dataclass(frozen=True, kw_only=True)
class Essential:
    """Zero the smallest weights of all selected layers together, up to the knee of the model's quality."""

    sparsity: float | None = option(None, between(0, 1), "share of zeros in all; none: up to the knee, measured")
    scope: str = option("global", one_of(*SCOPES), "how zeros are spread over layers")
    dtype: str = option("float16", one_of(*DTYPES), "what the kept values are stored in")

    def change(self, model: Model, work: Work) -> None:
        wanted = {one.path for one in work.maps}
        layers = tuple(one for one in layers_of(model.module, model.name) if one.path in wanted)
        if not layers:
            raise OptionError("prune.essential: none of the selected maps lies in a block; select some that do")
        sparsity = self.sparsity
        if sparsity is None:
            windows = work.inputs("prune.essential")
            if not isinstance(windows, torch.Tensor):
                raise OptionError("prune.essential: finds the knee on windows of token ids alone; give sparsity")
            sparsity = knee_of(model, layers, windows, scope=self.scope, seed=work.seed).low
        matrices = [anatomy.matrix(model.module, one).float() for one in layers]
        kept = masks_for(matrices, sparsity, criterion="magnitude", scope=self.scope)
        for one, matrix, mask in zip(layers, matrices, kept, strict=True):
            anatomy.replace(model.module, one.path, sparse(matrix, ~mask, None, self.dtype))
