"""Filters of convolutions taken out, by beta-rank or by their size.

Row 134. Source: "Beta-Rank: A Robust Convolutional Filter Pruning Method For Imbalanced Medical Image Analysis",
arXiv:2304.07461; see `pennyweight.solvers.filters` for the score, and for the mistake of the published code that is
mended there. Differs from the source: the same share of every layer, where the source gives shares by hand; nothing is
trained afterwards (that is the caller's). What is left is a smaller network of plain layers.

Shape letters: B images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model.model import Model
from pennyweight.solvers.filters import beta_rank, l1
from pennyweight.solvers.masks import share
from pennyweight.surgery import Dimension, Graph, remove, trace
from pennyweight.work import Work

_NAME = "prune.filters"


@lever(
    _NAME,
    reach="model",
    row=134,
    paper="Beta-Rank: A Robust Convolutional Filter Pruning Method For Imbalanced Medical Image Analysis, "
    "arXiv:2304.07461",
)
@dataclass(frozen=True, kw_only=True)
class Filters:
    """Take the least filters out of convolutions, so that the network gets smaller and faster.

    Channels that a residual stream carries stay. With no share the identity.
    """

    sparsity: float = option(0.5, between(0, 1), "share of the filters that goes, in each layer; rounded down")
    score: str = option("beta_rank", one_of("beta_rank", "l1"), "what counts: the mean size, times what passes through")
    fewest: int = option(1, at_least(1), "filters that a layer keeps in any case")

    def change(self, model: Model, work: Work) -> None:
        """Shrink the convolutions among the selected maps.

        Raises:
            OptionError: none of them can lose filters.
            DataError: no images.
            ModelError: the shrunk network is not the masked one; it is left as it was.
        """
        inputs = inputs_of(model, work.inputs(_NAME))
        model.module.eval()
        graph = trace(model.module, inputs)
        scores = filter_scores(model.module, graph, inputs, self.score, {one.path for one in work.maps})
        if not scores:
            raise OptionError(
                f"{_NAME}: no convolution that the step selects can lose filters by itself; select others"
            )
        kept = {
            dimension: found.argsort(descending=True, stable=True)[
                : max(self.fewest, len(found) - share(self.sparsity, len(found)))
            ]
            for dimension, found in scores.items()
        }
        remove(model.module, graph, kept, inputs)


def filter_scores(
    module: nn.Module, graph: Graph, inputs: Mapping[str, Any] | tuple[Any, ...], score: str, paths: set[str]
) -> dict[Dimension, Tensor]:
    """The score of every filter, by dimension; of several convolutions that share their filters, the sum.

    Args:
        module: as traced, in eval mode.
        graph: of it.
        inputs: that it runs on once.
        score: "beta_rank" or "l1".
        paths: of the convolutions that are looked at.
    """
    layers = {path: part for path, part in module.named_modules() if isinstance(part, nn.Conv2d) and path in paths}
    found: dict[str, Tensor] = {}

    def look(path: str) -> Any:
        def hook(layer: nn.Conv2d, given: tuple[Tensor, ...], out: Tensor) -> None:
            found[path] = l1(layer) if score == "l1" else beta_rank(layer, given[0], out)

        return layers[path].register_forward_hook(hook)

    hooks = [look(path) for path in layers]
    try:
        with torch.no_grad():
            module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    scores: dict[Dimension, Tensor] = {}
    for dimension in graph.of("channels"):
        of = [found[name.removesuffix(".weight")] for name, dim in dimension.places if dim == 0 and _holds(name, found)]
        if of:
            scores[dimension] = torch.stack(of).sum(0)
    return scores


def _holds(name: str, found: Mapping[str, Tensor]) -> bool:
    return name.endswith(".weight") and name.removesuffix(".weight") in found
