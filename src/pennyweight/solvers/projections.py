"""Feed-forwards that one linear map could stand for, found by least squares on what they are given.

Row 24, the width part. Source: "Pluggable Pruning with Contiguous Layer Distillation for Diffusion Transformers"
(PPCL), arXiv:2511.16156, and its released model (one linear layer with a bias, as wide as the stream, where a part of a
block was). Differs from the source: parts are feed-forwards, or any that the caller names, such as those of a text
stream; the layer starts from its least squares; which parts go is told by how well that follows them, where the source
has it in words alone.

Shape letters: R rows (tokens of all windows), M outputs, N inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError
from pennyweight.model import anatomy
from pennyweight.solvers.probes import alignment
from pennyweight.surgery.trace import run

_DAMPING = 1e-6  # of the mean square of an input


@dataclass(frozen=True)
class Projection:
    """A linear map that stands for a part of a block.

    Attributes:
        path: of the part: a module from one tensor (..., N) to another (..., M).
        matrix: (M, N), double.
        bias: (M,), double.
        alignment: of what it gives with what the part gives, 1 where the part is linear.
    """

    path: str
    matrix: Tensor
    bias: Tensor
    alignment: float

    def layer(self, like: Tensor) -> nn.Linear:
        """As a layer, of the dtype and on the device of ``like``."""
        made = nn.Linear(self.matrix.shape[1], self.matrix.shape[0], device=like.device, dtype=like.dtype)
        with torch.no_grad():
            made.weight.copy_(self.matrix)
            made.bias.copy_(self.bias)
        return made


def feed_forwards(module: nn.Module) -> list[str]:
    """Paths of the feed-forwards, in order: of each block the smallest module that holds those of its maps.

    Blocks whose feed-forward is no module of its own, such as BERT's, have none.
    """
    found = anatomy.of(module)
    paths: list[str] = []
    for index, block in enumerate(found.blocks):
        parts = [one.path.split(".") for one in found.layers() if one.block == index and one.role.startswith("ffn.")]
        common = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
        path = ".".join(names[0] for names in common)
        if len(parts) > 1 and len(path) > len(block.path):
            paths.append(path)
    return paths


def fitted(into: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix (M, N) and bias (M,) of the affine map nearest to rows ``out`` (R, M) of rows ``into`` (R, N), double."""
    x, y = into.double(), out.double()
    mean, level = x.mean(0), y.mean(0)
    x, y = x - mean, y - level
    gram = x.mT @ x
    gram = gram + _DAMPING * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=x.dtype)
    matrix: Tensor = torch.linalg.solve(gram, x.mT @ y).mT
    return matrix, level - matrix @ mean


def projections(
    module: nn.Module, inputs: Mapping[str, Any] | Sequence[Any], paths: Sequence[str] | None = None
) -> list[Projection]:
    """A linear map for each part of ``module``, in order.

    Args:
        module: in eval mode.
        inputs: to fit on.
        paths: of the parts; None for all feed-forwards.

    Raises:
        ModelError: a part that does not make one tensor of one, row by row as many.
    """
    chosen = feed_forwards(module) if paths is None else list(paths)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            tensors = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor)
            if not tensors or args[0].shape[:-1] != out.shape[:-1]:
                raise ModelError(f"plugs: {path} does not make one tensor of one; no linear layer can stand for it")
            seen[path] = (args[0].detach().flatten(0, -2), out.detach().flatten(0, -2))

        return hook

    handles = [module.get_submodule(path).register_forward_hook(watch(path)) for path in chosen]
    try:
        run(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for path in chosen:
        if path not in seen:
            raise ModelError(f"plugs: {path} is not called when the model runs; no linear layer can stand for it")
        into, out = seen[path]
        matrix, bias = fitted(into, out)
        found.append(Projection(path, matrix, bias, alignment(into.double() @ matrix.mT + bias, out)))
    return found
