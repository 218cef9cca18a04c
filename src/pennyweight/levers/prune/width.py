"""Width pruning: the least important heads, hidden units, channels or dimensions of the stream go, and tensors shrink.

Source: S. Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", arXiv:2407.14679
(activations score all axes of width on a little data, with forward passes only). Differs from the source: dimensions
are found by tracing (`pennyweight.surgery`), so that it is for any model; magnitudes and first-order Taylor scores too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model.model import Model
from pennyweight.solvers.units import SCORES, unit_scores
from pennyweight.surgery import Dimension, Graph, remove, trace
from pennyweight.surgery.probe import probe
from pennyweight.work import Work

KINDS = ("ffn", "heads", "queries", "channels", "latent", "hidden")


@lever(
    "prune.width",
    reach="model",
    paper="Compact Language Models via Pruning and Knowledge Distillation, arXiv:2407.14679",
)
@dataclass(frozen=True, kw_only=True)
class Width:
    """Take away the least important heads, hidden units or channels: smaller and faster, no kernels needed."""

    kind: str = option("ffn", one_of(*KINDS), "what there will be fewer of")
    removed: float = option(0.2, between(0, 0.99), "share of them that goes")
    score: str = option("activation", one_of(*SCORES), "what tells the important ones")
    scope: str = option("layer", one_of("layer", "global"), "the same share of each layer, or the least of all layers")
    multiple_of: int = option(1, at_least(1), "what is left of each layer is a multiple of this")

    def change(self, model: Model, work: Work) -> None:
        inputs = inputs_of(model, work.inputs("prune.width"))
        short = probe(inputs)
        graph = trace(model.module, short)
        found = self._selected(graph, work)
        scores = unit_scores(model.module, graph, found, inputs, self.score)
        remove(model.module, graph, {one: stay.sort().values for one, stay in self._kept(scores).items()}, short)

    def _selected(self, graph: Graph, work: Work) -> list[Dimension]:
        paths = tuple(f"{one.path}." for one in work.maps)
        found = [one for one in graph.of(self.kind) if any(name.startswith(paths) for name, _ in one.places)]  # type: ignore[arg-type]
        if not found:
            there = ", ".join(dict.fromkeys(one.kind for one in graph.dimensions)) or "nothing that can be shrunk"
            raise OptionError(f"prune.width: the selected layers have no {self.kind}; the model has {there}")
        return found

    def _kept(self, scores: dict[Dimension, Tensor]) -> dict[Dimension, Tensor]:
        """Which units stay, the most important ones of each dimension."""
        if self.scope == "global":
            # a layer's scores are shares of one; its units compare with those of another by how far they are from even
            even = torch.cat([score / score.mean().clamp(min=1e-300) for score in scores.values()])
            border = even.sort().values[round(self.removed * (len(even) - 1))] if self.removed else even.min()
            counts = [int((score / score.mean().clamp(min=1e-300) >= border).sum()) for score in scores.values()]
        else:
            counts = [round((1 - self.removed) * len(score)) for score in scores.values()]
        return {
            one: score.argsort(descending=True, stable=True)[: self._whole(count, len(score))]
            for count, (one, score) in zip(counts, scores.items(), strict=True)
        }

    def _whole(self, count: int, size: int) -> int:
        """``count`` as a multiple, but not 0; a dimension that is none itself may stay whole."""
        if count >= size:
            return size
        return min(size, max(self.multiple_of, round(count / self.multiple_of) * self.multiple_of))
