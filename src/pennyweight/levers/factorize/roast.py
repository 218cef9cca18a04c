"""One small store of values for all layers: shared by random folds, trained with scaled gradients (STABLE-RPS).

Row 232. Source: A. Desai and A. Shrivastava, "In defense of parameter sharing for model-compression",
arXiv:2310.11611: all weights in one line are cut in stretches as long as the store, and each stretch takes every value
once in a random order with random signs. So all values bear the same load (within one), which the older ROAST does not
promise, and as many values as weights are the model itself. A layer's weights are its scale times the values; gradients
of values are rescaled, or the arbitrary size of the store would set the size of the steps.

Differs from the source: places are of single entries, by an affine bijection for each stretch, not of chunks; scales
are powers of two, so that nothing is rounded where nothing is shared; the scaling of gradients is the one for which
each weight moves by the mean of what plain descent would do to the weights that share its value; Adam, which undoes
any scaling of gradients, gets its rate scaled instead.

Shape letters: V shared values, W weights in all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, loss_towards, train
from pennyweight.solvers.masks import DTYPES
from pennyweight.weights import Dense, Hashed
from pennyweight.work import Work

_NAME = "factorize.roast"


@lever(
    _NAME,
    reach="model",
    row=232,
    paper="In defense of parameter sharing for model-compression, arXiv:2310.11611",
)
@dataclass(frozen=True, kw_only=True)
class Roast:
    """Let all linear layers share one store of values by random folds, and train the store.

    Embedding, head, norms and biases stay as they are. The file holds the values once, and a seed. Memory shrinks,
    multiplications do not. Exact at density 1, where ``dtype`` holds the weights.
    """

    density: float = option(0.25, between(0, 1), "values stored, as a share of the weights that share them")
    start: Literal["weights", "random"] = option(
        "weights", one_of("weights", "random"), "values at first: nearest to the weights, or drawn as large as they are"
    )
    samples: int = option(128, at_least(1), "windows to train on")
    batch: int = option(8, at_least(1), "windows a step")
    steps: int = option(0, at_least(0), "steps of training; 0: none, and no data")
    rate: float = option(1e-3, at_least(0), "learning rate of Adam, for weights of a mean scale")
    target: Literal["text", "original"] = option(
        "text", one_of("text", "original"), "what is learned: next tokens, or the original's distribution"
    )
    dtype: str = option("float16", one_of(*DTYPES), "what the values are stored in")

    def change(self, model: Model, work: Work) -> None:
        chosen = {one.path for one in work.maps if one.block is not None and one.kind != "embedding"}
        paths = [one.path for one in model.anatomy.layers() if one.path in chosen]
        if not paths:
            raise OptionError(f"{_NAME}: the step selects no linear layer of a block; select some")
        windows = loss = None
        if self.steps:
            loss, windows = loss_towards(self.target, model, _NAME), work.text(self.samples)
        held = share(model.module, paths, density=self.density, seed=work.seed, start=self.start)
        if loss is not None and windows is not None:
            train(
                model.module, [Group([held[0].values], self.rate / mean_scale(held))], windows, loss, steps=self.steps,
                batch=self.batch, warmup=0.1, clip=1.0, seed=work.seed,
                report=lambda done, all_: work.report("roast", done, all_),
            )  # fmt: skip
        stored = nn.Parameter(held[0].values.detach().to(DTYPES[self.dtype]))
        for path, weight in zip(paths, held, strict=True):
            anatomy.replace(model.module, path, _on(stored, weight))


@torch.no_grad()
def share(
    module: nn.Module,
    paths: Sequence[str],
    *,
    density: float,
    seed: int = 0,
    start: Literal["weights", "random"] = "weights",
    size: float | None = None,
) -> list[Hashed]:
    """Let the layers at ``paths`` share one float32 store of ``density`` * W values, in place.

    Args:
        module: that holds them, dense.
        paths: of its linear layers, none twice, in the order of the line.
        density: V / W; V is rounded down.
        seed: of places, signs, and values where they are drawn.
        start: "weights": the values whose weights are nearest to those there are; "random": standard normal ones times
            the size of the store, so that each layer starts as large as it is.
        size: root mean square that the store is laid out for, made a power of two; None for that of all weights.

    Returns:
        The layers' weights; all hold the same parameter.

    Raises:
        OptionError: no path, a path twice, a layer that is compact already, or a density that leaves no value.
    """
    if not paths or len(set(paths)) != len(paths):
        raise OptionError(f"{_NAME}: {len(paths)} layers, {len(set(paths))} different ones; give each once")
    by_path = {one.path: one for one in anatomy.of(module).layers()}
    for path in paths:
        if path not in by_path:
            raise OptionError(f"{_NAME}: {path} is no layer of its own that can be replaced; leave it out")
        held = module.get_submodule(path).weight
        if not isinstance(held, (Tensor, Dense)):
            raise OptionError(f"{_NAME}: {path} is {getattr(held, 'form', 'compact')} already; put this step first")
    matrices = [anatomy.matrix(module, by_path[path]).float() for path in paths]
    total = sum(matrix.numel() for matrix in matrices)
    count = int(density * total + 1e-9)
    if count < 1:
        raise OptionError(
            f"{_NAME}: density = {density} leaves {total} weights no value; give at least {1 / total:.3g}"
        )
    sizes = [float(matrix.double().square().mean().sqrt()) for matrix in matrices]
    pooled = math.sqrt(sum(s * s * m.numel() for s, m in zip(sizes, matrices, strict=True)) / total)
    unit = _power_of_two(pooled if size is None else size)
    values = nn.Parameter(torch.zeros(count, device=matrices[0].device))
    found, offset = [], 0
    for matrix, own in zip(matrices, sizes, strict=True):
        rows, columns = matrix.shape
        scale = _power_of_two(own) / unit
        found.append(Hashed(values, rows=rows, columns=columns, seed=seed, offset=offset, scale=scale))
        offset += matrix.numel()
    if start == "random":
        drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed & (2**63 - 1)))
        values.copy_(drawn * unit)
    else:
        # least squares: each weight is scale * sign * value, and no weight has two values
        wanted = sum(pulled(weight, matrix) for weight, matrix in zip(found, matrices, strict=True))
        values.copy_(wanted * scaling(found).double())
    for path, weight in zip(paths, found, strict=True):
        anatomy.replace(module, path, weight)
    return found


def scaling(shared: Sequence[Hashed]) -> Tensor:
    """(V,) what gradients of a store are multiplied by, for plain descent: 1 / the sum of its weights' squared scales.

    A weight then moves by the mean of its sharers' own steps (weighted by scale where scales differ), whatever size
    the store has; where nothing is shared, by its own step exactly.

        values.register_hook(lambda gradient: gradient * scaling(shared))
    """
    load = sum(_summed(weight, None) * weight.scale**2 for weight in shared)
    assert isinstance(load, Tensor)
    return torch.where(load > 0, 1 / load.clamp_min(torch.finfo(torch.float64).tiny), 0).to(shared[0].values.dtype)


def load(shared: Sequence[Hashed]) -> Tensor:
    """(V,) how many weights use each value: W / V, rounded down or up."""
    found = sum(_summed(weight, None) for weight in shared)
    assert isinstance(found, Tensor)
    return found.long()


def pulled(weight: Hashed, matrix: Tensor) -> Tensor:
    """(V,) in double: scale * sign * entry, summed over the entries of ``matrix`` (M, N) that use each value."""
    return _summed(weight, matrix) * weight.scale


def mean_scale(shared: Sequence[Hashed]) -> float:
    """The root mean square of the scales over all weights: what a step of a value is multiplied by in a weight."""
    total = sum(weight.shape[0] * weight.shape[1] for weight in shared)
    return math.sqrt(sum(weight.scale**2 * weight.shape[0] * weight.shape[1] for weight in shared) / total)


def _summed(weight: Hashed, matrix: Tensor | None) -> Tensor:
    """Sums over the entries of each value, of ``matrix`` times the sign, or of 1."""
    place, sign = weight.places()
    what = torch.ones_like(place, dtype=torch.float64) if matrix is None else matrix.flatten().double() * sign
    return torch.zeros(len(weight.values), dtype=torch.float64, device=place.device).index_add(0, place, what)


def _power_of_two(size: float) -> float:
    return 2.0 ** round(math.log2(size)) if size > 0 else 1.0


def _on(values: nn.Parameter, weight: Hashed) -> Hashed:
    """``weight`` on another store."""
    return Hashed(
        values, rows=weight.shape[0], columns=weight.shape[1], seed=weight.seed, offset=weight.offset,
        scale=weight.scale,
    )  # fmt: skip
