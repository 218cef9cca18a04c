"""Fold batch normalization into the convolution or linear layer before it, for deployment.

Row 203. Source: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", arXiv:1712.05877, section 3.2: in evaluation a batch norm is a scale and a shift of each channel, which the
weights before it can take up. Differs from the source: pairs are found by running the model, not by their names.

Shape letters: M out channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError
from pennyweight.evaluate.forward import looking

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def fold_norms(module: nn.Module, *inputs: Tensor) -> list[tuple[str, str]]:
    """Fold, in place, every batch norm that reads the output of one layer which nothing else reads.

    Args:
        module: in evaluation mode it then computes what it did, to rounding; folded norms become ``nn.Identity``.
        inputs: what to run it on; a few samples are enough.

    Returns:
        (path of the layer, path of the norm), in the order in which they ran.

    Raises:
        ModelError: no batch norm follows a layer that can take it up.
    """
    pairs = _pairs(module, inputs)
    folded = []
    with looking(module):
        before = _flat(module(*inputs))
        for layer_path, norm_path in pairs:
            layer, norm = module.get_submodule(layer_path), module.get_submodule(norm_path)
            kept = {name: None if t is None else t.data.clone() for name, t in _held(layer).items()}
            _fold(layer, norm)
            module.set_submodule(norm_path, nn.Identity())
            after = _flat(module(*inputs))
            same = all(_near(a, b) for a, b in zip(before, after, strict=True))
            if same:
                folded.append((layer_path, norm_path))
                continue
            # something else reads the layer, too
            module.set_submodule(norm_path, norm)
            for name, value in kept.items():
                setattr(layer, name, None if value is None else nn.Parameter(value))
    if not folded:
        raise ModelError(
            f"fold_norms: no batch norm of {type(module).__name__} follows a convolution or linear layer alone; "
            "there is nothing to fold"
        )
    return folded


def _pairs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[str, str]]:
    given: list[tuple[str, Tensor]] = []
    found: list[tuple[str, str]] = []
    runs: Counter[str] = Counter()

    def gives(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            runs[path] += 1
            given.append((path, output))

        return hook

    def reads(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            runs[path] += 1
            found.extend((layer, path) for layer, output in given if args and args[0] is output)

        return hook

    hooks = []
    for path, part in module.named_modules():
        if isinstance(part, _LAYERS):
            hooks.append(part.register_forward_hook(gives(path)))
        elif isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            hooks.append(part.register_forward_pre_hook(reads(path)))
    try:
        with looking(module):
            module(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return [(layer, norm) for layer, norm in found if runs[layer] == 1 and runs[norm] == 1]


def _held(layer: Any) -> dict[str, Tensor | None]:
    return {"weight": layer.weight, "bias": layer.bias}


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    weight = layer.weight
    one = torch.ones_like(norm.running_var)
    gain = (one if norm.weight is None else norm.weight).double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = (torch.zeros_like(one) if norm.bias is None else norm.bias).double() - norm.running_mean.double() * gain
    if layer.bias is not None:
        shift = shift + layer.bias.double() * gain
    layer.weight = nn.Parameter((weight.double() * gain.view(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype))
    layer.bias = nn.Parameter(shift.to(weight.dtype))


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values if isinstance(value, (Tensor, tuple, list, dict)) for tensor in _flat(value)]


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max().clamp_min(1e-6))
