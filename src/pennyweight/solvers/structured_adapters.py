"""Adapters that are pruned together with the channels of the frozen weights they adapt.

Row 239, second part. Source: L. Hedegaard, A. Alok, J. Jose and A. Iosifidis, "Structured Pruning Adapters",
arXiv:2211.10155: for channels a low-rank update (SPLoRA; in a convolution at the center of its kernel), for blocks a
sum of Kronecker products of weights of blocks with prototypes of low rank that all layers share (SPLoPA). What is
learned for a task are the masks and what they leave of the adapters; the source model stays for others. Differs from
the source: channels that depend on each other are found by tracing (`pennyweight.surgery`), and go together.

Shape letters: M out features, N in features, U units of a dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import OptionError
from pennyweight.model import anatomy
from pennyweight.solvers.masks import smallest
from pennyweight.solvers.sparse_tuning import Adapted, check_rank, drawn
from pennyweight.surgery import Dimension, Graph, remove

Kind = Literal["splora", "splopa", "none"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the adapters look like.

    Attributes:
        kind: "splora" (low rank), "splopa" (prototypes in blocks), "none": layers are trained themselves.
        rank: of "splora", or of a prototype.
        prototypes: of "splopa", shared by all layers.
        block: their side; it divides both sides of every matrix.
        spread: of the entries that do not start at 0.
    """

    kind: Kind = "splora"
    rank: int = 16
    prototypes: int = 64
    block: int = 8
    spread: float = 0.05


class StructuredAdapters:
    """Adapters on some layers of a module, and the units of it that they are pruned by; in any training loop.

        graph = trace(module, inputs)
        adapters = StructuredAdapters(module, paths, graph, graph.of("channels"), Shape(rank=8))
        ...  # train adapters.parameters
        adapters.keep(0.3)
        ...  # train on
        adapters.finish(inputs)

    Args:
        module: changed in place; its layers compute what they did until something is trained.
        paths: of layers that get an adapter; all others stay frozen or are the caller's to train.
        graph: of ``module`` as it is.
        dimensions: whose units are pruned.
        shape: of the adapters.
        seed: of their first values.
        where: named in errors.

    Attributes:
        parameters: what is trained.
        kept: by dimension, (U,) bool.
    """

    def __init__(
        self, module: nn.Module, paths: Sequence[str], graph: Graph, dimensions: Sequence[Dimension], shape: Shape, *,
        seed: int = 0, where: str = "adapters",
    ) -> None:  # fmt: skip
        if not dimensions:
            raise OptionError(f"{where}: nothing that can be shrunk was found; give another kind of units")
        self.module, self.graph, self.where = module, graph, where
        self.kept = {one: torch.ones(one.size, dtype=torch.bool) for one in dimensions}
        self._plain = {path: module.get_submodule(path) for path in paths}
        self._layers: dict[str, Adapted] = {}
        g = torch.Generator().manual_seed(seed)
        shared = None
        if shape.kind == "splopa":
            factors = [shape.spread * torch.randn(shape.prototypes, *size, generator=g)
                       for size in ((shape.block, shape.rank), (shape.rank, shape.block))]  # fmt: skip
            shared = tuple(nn.Parameter(one) for one in factors)
        for path, layer in self._plain.items():
            self._layers[path] = self._adapter(path, layer, shape, shared, g)
            anatomy.replace(module, path, self._layers[path])
        unique = {id(one): one for layer in self._layers.values() for one in layer.parameters()}
        self.parameters: list[nn.Parameter] = list(unique.values())

    def _adapter(self, path: str, layer: nn.Module, shape: Shape, shared: Any, g: torch.Generator) -> Adapted:
        matrix = _matrix(layer)
        rows, columns = matrix.shape
        positions = prod(layer.kernel_size) if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else 1
        if shape.kind == "splora":
            check_rank(shape.rank, (rows, columns // positions), f"{self.where}: {path}")
            down = drawn(shape.rank, columns // positions, g, shape.spread)
            return Adapted(matrix, up=torch.zeros(rows, shape.rank), down=down, positions=positions)
        if shape.kind == "none":
            made = Adapted(matrix)
            made.matrix = nn.Parameter(made.matrix)
            return made
        if rows % shape.block or columns % shape.block:
            raise OptionError(
                f"{self.where}: blocks of {shape.block} do not divide {path}, {rows}x{columns}; give others"
            )
        weights = torch.zeros(shape.prototypes, rows // shape.block, columns // shape.block)
        return Adapted(matrix, blocks=(weights, *shared))

    def scores(self) -> dict[Dimension, Tensor]:
        """By dimension, the norm (U,) of what each unit has in all adapted layers: weights as they are now."""
        made = {f"{path}.weight": layer.dense().detach() for path, layer in self._layers.items()}
        found = {}
        for one in self.kept:
            total = torch.zeros(one.size)
            for name, dim in one.places:
                if name in made:
                    unit = self._units(name, dim, one)
                    sizes = made[name].square().sum(1 - self._side(name, dim))
                    total.index_add_(0, unit[unit >= 0], sizes[unit >= 0])
            found[one] = total.sqrt()
        return found

    def _side(self, name: str, dim: int) -> int:
        """The side of the matrix (out, in) that dimension ``dim`` of the tensor is."""
        return 1 - dim if isinstance(self._plain[name.removesuffix(".weight")], Conv1D) else min(dim, 1)

    def _units(self, name: str, dim: int, one: Dimension) -> Tensor:
        """The unit of every row or column of the matrix, -1 for none."""
        unit = self.graph.unit(name, dim, one)
        layer = self._plain[name.removesuffix(".weight")]
        kernel = prod(layer.kernel_size) if dim == 1 and isinstance(layer, (nn.Conv1d, nn.Conv2d)) else 1
        return unit.repeat_interleave(kernel)

    def keep(self, density: float) -> None:
        """Keep this share of the units of each dimension, at least one: those of the largest `scores`; none comes back.

        Units that were pruned before have a score of 0.
        """
        for one, score in self.scores().items():
            pruned = smallest(score[None], min(one.size - 1, round((1 - density) * one.size)))[0]
            self.kept[one] &= ~pruned
        for path, layer in self._layers.items():
            for one, kept in self.kept.items():
                for name, dim in one.places:
                    if name == f"{path}.weight":
                        unit = self._units(name, dim, one)
                        side = layer.columns_kept if self._side(name, dim) else layer.rows_kept
                        side *= torch.where(unit >= 0, kept[unit.clamp_min(0)], torch.ones((), dtype=torch.bool))

    def learned(self) -> int:
        """Numbers that a task needs beside the source model: what the masks leave of the adapters."""
        total, seen = 0, set[tuple[int, int]]()
        for layer in self._layers.values():
            rows, columns = int(layer.rows_kept.sum()), int(layer.columns_kept.sum())
            if layer.up is not None and layer.down is not None:
                total += layer.up.shape[1] * (rows + columns // layer.positions)
            elif layer.block_weights is not None and layer.prototypes is not None:
                total += layer.block_weights.numel()
                seen.update((id(one), one.numel()) for one in layer.prototypes)
            else:
                total += rows * columns
        return total + sum(size for _, size in seen)

    @torch.no_grad()
    def finish(self, inputs: Any) -> float:
        """Write the sums into plain layers and take away what is masked; see `pennyweight.surgery.remove`.

        Returns:
            The largest difference of an output between the masked model and the shrunk one.
        """
        for path, layer in self._plain.items():
            made = self._layers[path].dense()
            held = layer.weight
            assert isinstance(held, nn.Parameter)
            held.copy_(made.T if isinstance(layer, Conv1D) else made.view(held.shape))
            self.module.set_submodule(path, layer.train(self.module.training))
        return remove(self.module, self.graph, self.kept, inputs)


def _matrix(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(layer, Conv1D) else weight.detach().flatten(1)
