"""DSEE: an update that is sparse and low-rank, tuned before and after weights or heads of the rest are pruned.

Row 142. Source: X. Chen et al., "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models",
arXiv:2111.00160, and its official implementation: queries and values get ``alpha / r * (U V + S)``, where S has a few
free entries; their places are those of the largest entries of the sparse part when the pre-trained weight is taken
apart into low rank and sparse by alternation (GreBsmo), and all values start at 0. Then weights of smallest magnitude
are pruned, or heads of smallest ``|U V + S|`` in queries and values; then the same update is tuned on.

Differs from the source: heads may be scored with the weights added (``head_score = "with_weights"``); masks can be put
on the weight alone, the update beside it, or on the sum; heads leave physically.

Shape letters: M out features, N in features, K rank, P free entries, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group
from pennyweight.solvers.masks import DTYPES, share, smallest
from pennyweight.solvers.sparse_tuning import Adapted, Tuning, check_rank, drawn, linear_maps
from pennyweight.surgery import Dimension, Graph, remove, trace
from pennyweight.weights import Dense, LowRank, Sparse, Sum, Weight
from pennyweight.work import Work

_NAME = "prune.dsee"


def low_rank_and_sparse(
    matrix: Tensor, *, rank: int, grow: int = 5, rounds: int = 100, threshold: float = 0.05, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """``matrix`` (M, N) as a sum of a matrix of low rank and a sparse one, by greedy alternation.

    Lowers ``|matrix - low - sparse|^2 / 2 + limit * sum |sparse|`` at every round, with ``limit`` the ``threshold``.

    Args:
        matrix: (M, N).
        rank: of the low-rank part in the end, at most the smaller side.
        grow: directions added at a time, once more rounds at this rank gain little.
        rounds: of alternation at most, over all ranks.
        threshold: what the sparse part's entries are shrunk by, as a share of the largest entry of ``matrix``.
        seed: of the first directions.

    Returns:
        The low-rank part and the sparse part, (M, N) each; what neither takes is left over.

    Source: T. Zhou and D. Tao, "Greedy Bilateral Sketch, Completion & Smoothing", AISTATS 2013. The official code of
    DSEE cuts entries off instead of shrinking them, which leaves nothing for the low-rank part to learn after a round.
    """
    check_rank(rank, (matrix.shape[0], matrix.shape[1]), _NAME)
    whole = matrix.detach().double()
    limit = threshold * float(whole.abs().max())
    g = torch.Generator().manual_seed(seed)
    right = torch.randn(min(grow, rank), whole.shape[1], generator=g, dtype=torch.float64)
    sparse, low, before = torch.zeros_like(whole), torch.zeros_like(whole), torch.inf
    for _ in range(rounds):
        left, _ = torch.linalg.qr((whole - sparse) @ right.T)
        right = left.T @ (whole - sparse)
        low = left @ right
        rest = whole - low
        sparse = rest.sign() * (rest.abs() - limit).clamp_min(0)
        now = float(0.5 * (rest - sparse).square().sum() + limit * sparse.abs().sum())
        if now > 0.999 * before:
            if len(right) == rank:
                break
            more = min(grow, rank - len(right))
            # new directions where the most is left over, as the greedy method has it
            right = torch.cat([right, torch.randn(more, len(rest), generator=g, dtype=torch.float64) @ rest])
        before = now if now <= 0.999 * before else torch.inf
    return low.to(matrix), sparse.to(matrix)


@lever(
    _NAME,
    reach="model",
    row=142,
    paper="DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models, arXiv:2111.00160",
)
@dataclass(frozen=True, kw_only=True)
class DSEE(Tuning):
    """Tune a sparse and low-rank update of queries and values, prune weights or heads, and tune it on."""

    rank: int = option(4, at_least(0), "rank of the update; 0: its free entries alone")
    alpha: float = option(32.0, at_least(0), "alpha / rank multiplies the update")
    free: int = option(64, at_least(0), "free entries of the update in each matrix; 0 is LoRA")
    support: Literal["grebsmo", "magnitude", "random"] = option(
        "grebsmo", one_of("grebsmo", "magnitude", "random"), "where the free entries lie"
    )
    prune: Literal["weights", "heads"] = option("weights", one_of("weights", "heads"), "what is pruned")
    sparsity: float = option(0.5, between(0, 1), "share of the weights, or of the heads of each block, that go")
    masked: Literal["weight", "sum"] = option(
        "weight", one_of("weight", "sum"), "what is sparse: the weight, its update beside it; or their sum"
    )
    head_score: Literal["update", "with_weights"] = option(
        "update", one_of("update", "with_weights"), "what heads are scored by: their update, or the weight added"
    )
    retune_steps: int = option(100, at_least(0), "steps of training after the pruning")
    dtype: str = option("float16", one_of(*DTYPES), "what kept values and factors are stored in")

    def change(self, model: Model, work: Work) -> None:
        maps, loss = linear_maps(work, _NAME), self.loss(model, _NAME)
        graph = trace(model.module, [work.text(1)]) if self.prune == "heads" else None
        g = torch.Generator().manual_seed(work.seed)
        plain = {one.path: model.module.get_submodule(one.path) for one in maps}
        layers: dict[str, Adapted] = {}
        for one in maps:
            if one.rows is not None:
                raise OptionError(f"{_NAME}: {one.path} holds several maps in one layer; split them first")
            matrix = anatomy.matrix(model.module, one)
            tuned = one.role in ("attention.query", "attention.value")
            layers[one.path] = self.layer(matrix, g, work.seed) if tuned else Adapted(matrix)
        for path, layer in layers.items():
            anatomy.replace(model.module, path, layer)
        group = Group([one for layer in layers.values() for one in layer.parameters()], self.rate)
        if not group.parameters:
            raise OptionError(f"{_NAME}: the step selects no query or value with an update to tune; select some")
        self.tune(model, work, [group], loss, stage="dsee")
        if graph is None:
            for layer in layers.values():
                self.prune_weights(layer)
        else:
            kept = self._prune_heads(graph, maps, layers)
        if self.retune_steps:
            self.tune(model, work, [group], loss, stage="dsee again", steps=self.retune_steps)
        if graph is None:
            for path, layer in layers.items():
                anatomy.replace(model.module, path, self.frozen(layer))
            return
        with torch.no_grad():
            for path, layer in layers.items():
                held: Tensor = plain[path].weight  # type: ignore[assignment]
                held.copy_(layer.dense().T if isinstance(plain[path], Conv1D) else layer.dense())
                model.module.set_submodule(path, plain[path])
        remove(model.module, graph, kept, [work.text(1)])

    def layer(self, matrix: Tensor, generator: torch.Generator, seed: int) -> Adapted:
        """What stands for ``matrix`` (M, N) while its update is tuned: the matrix itself at first."""
        rows, columns = matrix.shape
        check_rank(self.rank, (rows, columns), _NAME)
        if self.free > matrix.numel():
            raise OptionError(f"{_NAME}: free = {self.free} of the {matrix.numel()} entries of a matrix; give fewer")
        factor = self.alpha / max(1, self.rank)
        up = drawn(rows, self.rank, generator, rows**-0.5) if self.rank else None
        down = torch.zeros(self.rank, columns) if self.rank else None
        places = self.places(matrix, seed) if self.free else None
        return Adapted(matrix, up=up, down=down, factor=factor, places=places)

    def places(self, matrix: Tensor, seed: int) -> Tensor:
        """Where the free entries of ``matrix`` (M, N) lie: (P,) in scan order, sorted."""
        if self.support == "random":
            g = torch.Generator().manual_seed(seed)
            return torch.randperm(matrix.numel(), generator=g)[: self.free].sort().values
        found = matrix
        if self.support == "grebsmo":
            _, found = low_rank_and_sparse(matrix, rank=max(1, min(matrix.shape) // 4), seed=seed)
        return found.abs().flatten().topk(self.free).indices.sort().values

    def prune_weights(self, layer: Adapted) -> None:
        """Mask the share of smallest magnitude in ``layer``."""
        made = layer.matrix if self.masked == "weight" else layer.dense().detach()
        pruned = smallest(made.abs().flatten()[None], share(self.sparsity, made.numel()))[0].view(layer.shape)
        layer.mask &= ~pruned
        layer.mask_sum = self.masked == "sum"

    def _prune_heads(self, graph: Graph, maps: list[Map], layers: dict[str, Adapted]) -> dict[Dimension, Tensor]:
        """Mask the weakest heads of each block; by dimension, which stay."""
        role = {f"{one.path}.weight": one.role for one in maps}
        kept = {}
        for heads in graph.of("heads"):
            score = torch.zeros(heads.size)
            for name, dim in heads.places:
                layer = layers.get(name.removesuffix(".weight"))
                if layer is None or role[name] not in ("attention.query", "attention.value"):
                    continue
                made = layer.update() if self.head_score == "update" else layer.update().abs() + layer.matrix.abs()
                unit = graph.unit(name, dim, heads)
                score.index_add_(0, unit, made.detach().abs().sum(1))
            stay = ~smallest(score[None], min(heads.size - 1, round(self.sparsity * heads.size)))[0]
            for name, dim in heads.places:
                layer = layers.get(name.removesuffix(".weight"))
                if layer is not None and role[name] == "attention.output":
                    layer.columns_kept *= stay[graph.unit(name, dim, heads)]
            kept[heads] = stay
        if not kept:
            raise OptionError(f"{_NAME}: the model has no heads that could go; give prune = weights")
        return kept

    @torch.no_grad()
    def frozen(self, layer: Adapted) -> Weight:
        """What ``layer`` computes with: the sparse weight and its update, or their sparse sum."""
        dtype = DTYPES[self.dtype]
        if layer.mask_sum:
            return Sparse.keep(layer.dense().to(dtype), layer.mask)
        parts: list[Weight] = [
            Dense(layer.matrix.to(dtype)) if bool(layer.mask.all()) else Sparse.keep(layer.matrix.to(dtype), layer.mask)
        ]
        if layer.up is not None and layer.down is not None:
            parts.append(LowRank((layer.factor * layer.up).to(dtype), layer.down.detach().to(dtype)))
        if layer.places is not None:
            places = torch.zeros(layer.matrix.numel(), dtype=torch.bool)
            places[layer.places] = True
            parts.append(Sparse.keep(layer.free().to(dtype), places.view(layer.shape)))
        return parts[0] if len(parts) == 1 else Sum(*parts)
