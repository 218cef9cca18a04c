"""How little a run of blocks changes what passes through it.

Sources: A. Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv:2403.17887 (the angular
distance between the inputs of block l and block l + n, at the last token); X. Men et al., "ShortGPT: Layers in Large
Language Models are More Redundant Than You Expect", arXiv:2403.03853 (block influence, one minus the cosine, over all
tokens). Differs from the sources: nothing.

Shape letters: L blocks, B windows, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_iter

from pennyweight.errors import DataError, ModelError
from pennyweight.model import anatomy
from pennyweight.surgery.trace import run

Metric = Literal["angular", "influence"]


def streams(module: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> list[Tensor]:
    """What goes into each block, and what comes out of the last: L + 1 tensors (B, T, D).

    Raises:
        ModelError: blocks that are not run once each, one after the other, on one stream.
    """
    blocks = anatomy.of(module).blocks
    into: list[Tensor] = []
    out: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        into.append(next(one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)).detach())

    def after(_: nn.Module, args: Any, found: Any) -> None:
        out.append((found[0] if isinstance(found, (tuple, list)) else found).detach())

    layers = [module.get_submodule(block.path) for block in blocks]
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers[-1:]]
    try:
        run(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = [*into, *out]
    if len(into) != len(blocks) or len(out) != 1 or len({one.shape for one in found}) != 1:
        raise ModelError(
            f"depth: {len(blocks)} blocks of {type(module).__name__} do not pass one stream on to each other; select "
            "those of one stack"
        )
    return found


def distance(one: Tensor, other: Tensor, metric: Metric = "angular") -> float:
    """Mean distance of the rows of two streams (B, T, D): 0 where they point the same way.

    Args:
        one: going in.
        other: coming out.
        metric: "angular" is arccos(cosine) / pi of the last token, "influence" 1 - cosine of every token.
    """
    if one.shape != other.shape or one.ndim < 2:
        raise DataError(f"depth: streams {tuple(one.shape)} and {tuple(other.shape)} do not compare")
    if metric == "angular" and one.ndim > 2:
        one, other = one[:, -1], other[:, -1]
    cosine = functional.cosine_similarity(one.double(), other.double(), dim=-1).clamp(-1, 1)
    return float(((cosine.arccos() / math.pi) if metric == "angular" else 1 - cosine).mean())


def distances(found: Sequence[Tensor], count: int, metric: Metric = "angular") -> Tensor:
    """(L - count + 1,) distances across each run of ``count`` blocks, by its first block."""
    return torch.tensor(
        [distance(found[start], found[start + count], metric) for start in range(len(found) - count)],
        dtype=torch.float64,
    )


def redundant(found: Sequence[Tensor], count: int, *, metric: Metric = "angular", contiguous: bool = True) -> list[int]:
    """The ``count`` blocks that change the stream least, as one run or one by one."""
    if count < 1:
        return []
    if contiguous:
        first = int(distances(found, count, metric).argmin())
        return list(range(first, first + count))
    return sorted(distances(found, 1, metric).argsort()[:count].tolist())
