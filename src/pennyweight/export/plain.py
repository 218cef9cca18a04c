"""What no file of plain weights can say, refused before any work."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from pennyweight.errors import ModelError
from pennyweight.model import compact
from pennyweight.model.experts import SplitExperts
from pennyweight.model.model import Model
from pennyweight.model.products import attention_arithmetic


def check_plain(model: Model, target: str) -> PreTrainedModel:
    """The module of ``model``, when weights and its configuration say all that it computes.

    Raises:
        ModelError: no ``transformers`` model; layers that round their inputs or multiply in a way of their own; layers
            of other shapes than the configuration gives them, or that it does not know.
    """
    module = model.module
    if not isinstance(module, PreTrainedModel):
        raise ModelError(f"{model.name}: export to {target} needs a transformers model, not {type(module).__name__}")
    rounding, multiplying = compact.activations(module), compact.products(module)
    if rounding:
        raise ModelError(
            f"{model.name}: {len(rounding)} layers round their inputs (the first is {next(iter(rounding))}), which "
            f"{target} does not hold; set their activation to None, or keep the model in its own form"
        )
    if multiplying or attention_arithmetic(module):
        raise ModelError(
            f"{model.name}: {len(multiplying)} layers or the attention multiply in a way of their own, which {target} "
            "does not hold; keep the model in its own form"
        )
    _check_shapes(model, module, target)
    return module


def _check_shapes(model: Model, module: PreTrainedModel, target: str) -> None:
    config = copy.deepcopy(module.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        skeleton = type(module)(config)
    weights = compact.compact_layers(module)
    split = [path for path, part in module.named_modules() if isinstance(part, SplitExperts)]

    def outside(name: str) -> bool:
        return not any(name.startswith(f"{path}.") for path in (*(f"{path}.weight" for path in weights), *split))

    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items() if outside(f"{name}.")}
    there = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if outside(name)}
    for path, weight in weights.items():
        dense = skeleton.state_dict().get(f"{path}.weight")
        if outside(path) and (dense is None or dense.numel() != weight.shape[0] * weight.shape[1]):
            asked = "nothing" if dense is None else f"{tuple(dense.shape)}"
            raise ModelError(
                f"{model.name}: {path} is {weight.shape}, the configuration asks for {asked}; {target} holds only what "
                "the configuration says"
            )
    for name in sorted({*wanted, *there}):
        if wanted.get(name) != there.get(name):
            raise ModelError(
                f"{model.name}: {name} is {there.get(name, 'missing')}, the configuration asks for "
                f"{wanted.get(name, 'nothing')}; {target} holds only what the configuration says"
            )
