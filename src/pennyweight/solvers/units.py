"""How much each head, hidden unit, channel or dimension of a stream matters, so that the least can be taken away.

Sources: S. Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", arXiv:2407.14679
(activations); P. Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv:1906.10771 (Taylor).
Differs from the sources: an activation counts as the energy that its readers' weights make of it, as a share of the
whole, so that scores of several layers compare.

Shape letters: U units, M out features, N in features, B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import DataError
from pennyweight.surgery import Dimension, Graph
from pennyweight.surgery.trace import run, tensors_of
from pennyweight.train.loop import next_token_loss

SCORES = ("activation", "magnitude", "taylor")
Inputs = Mapping[str, Any] | Sequence[Any]


def unit_scores(
    module: nn.Module, graph: Graph, dimensions: Iterable[Dimension], inputs: Inputs, score: str
) -> dict[Dimension, Tensor]:
    """(U,) scores of the units of each of ``dimensions``, in double; larger matters more.

    Args:
        module: as it was traced.
        graph: of ``module``.
        dimensions: to score.
        inputs: what the model is run on; for "taylor" (B, T) token ids, by name or alone.
        score: "activation" (share of the energy E|w x|^2 that its readers get, summed over readers), "magnitude"
            (root of the summed squares of its weights) or "taylor" (size of the summed products of weights and
            gradients).

    Raises:
        DataError: no reader whose inputs can be seen, or no token ids to differentiate a loss by.
    """
    found = list(dimensions)
    held = tensors_of(module)
    match score:
        case "magnitude":
            return {
                one: _summed(graph, one, held, lambda name: held[name].detach().double() ** 2).sqrt() for one in found
            }
        case "taylor":
            with _gradients(module, inputs):
                products = {
                    name: tensor.detach().double() * tensor.grad.double()
                    for name, tensor in held.items()
                    if tensor.grad is not None
                }
            return {one: _summed(graph, one, products, products.__getitem__).abs() for one in found}
    energies = _energies(module, graph, found, inputs)
    return {one: _energy_of(graph, one, energies) for one in found}


def _summed(graph: Graph, dimension: Dimension, held: Mapping[str, Any], values: Callable[[str], Tensor]) -> Tensor:
    """``values`` of every entry of a unit's weights, added up."""
    found = torch.zeros(dimension.size, dtype=torch.float64)
    for name, dim in dimension.places:
        if name in held and isinstance(held[name], Tensor) and held[name].is_floating_point():
            entries = values(name).movedim(dim, 0).reshape(held[name].shape[dim], -1).sum(1)
            units = graph.unit(name, dim, dimension)
            found.index_add_(0, units[units >= 0], entries[units >= 0])
    return found


@contextmanager
def _gradients(module: nn.Module, inputs: Inputs) -> Iterator[None]:
    ids = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
    if ids.is_floating_point() or ids.ndim != 2:
        raise DataError("taylor: needs token ids (windows, tokens), to differentiate the loss of the next ones")
    module.zero_grad(set_to_none=True)
    next_token_loss(module, (ids,)).backward()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        module.zero_grad(set_to_none=True)


def _reader(layer: nn.Module, dim: int) -> int | None:
    """Which dimension of its input the layer multiplies with dimension ``dim`` of its weight; None where with none."""
    match layer:
        case nn.Linear():
            return -1 if dim == 1 else None
        case Conv1D():
            return -1 if dim == 0 else None
        case nn.Conv1d() | nn.Conv2d():
            return 1 if dim == 1 and layer.groups == 1 else None
    return None


def _energies(
    module: nn.Module, graph: Graph, dimensions: Iterable[Dimension], inputs: Inputs
) -> dict[tuple[str, int], Tensor]:
    """By tensor and dimension that reads: E(x_j^2) * |w_j|^2 for each input j, as shares of their sum."""
    wanted = {
        (name, dim): module.get_submodule(name.rpartition(".")[0])
        for one in dimensions
        for name, dim in one.places
        if name.endswith(".weight")
    }
    squares: dict[tuple[str, int], Tensor] = {}

    def watch(key: tuple[str, int], over: int) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach().double().movedim(over, -1)
            seen = (x * x).flatten(0, -2).mean(0)
            squares[key] = squares[key] + seen if key in squares else seen

        return hook

    handles = []
    for key, layer in wanted.items():
        over = _reader(layer, key[1])
        if over is not None:
            handles.append(layer.register_forward_pre_hook(watch(key, over)))
    try:
        run(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for (name, dim), square in squares.items():
        weight = wanted[name, dim].weight
        assert isinstance(weight, Tensor)
        energy = square * (weight.detach().double() ** 2).movedim(dim, 0).flatten(1).sum(1)
        found[name, dim] = energy / energy.sum().clamp(min=1e-300)
    return found


def _energy_of(graph: Graph, dimension: Dimension, energies: Mapping[tuple[str, int], Tensor]) -> Tensor:
    read = [place for place in dimension.places if place in energies]
    if not read:
        raise DataError(f"activation: nothing that reads {dimension.name} can be watched; give score: magnitude")
    found = torch.zeros(dimension.size, dtype=torch.float64)
    for name, dim in read:
        units = graph.unit(name, dim, dimension)
        found.index_add_(0, units[units >= 0], energies[name, dim][units >= 0])
    return found
