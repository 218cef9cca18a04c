"""Saving a model: compact as it is, or dense so that plain ``transformers`` opens it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import ModelError
from pennyweight.model import compact, safetensors_file
from pennyweight.model.checkpoint import SINGLE
from pennyweight.model.experts import SplitExperts
from pennyweight.model.model import Model
from pennyweight.model.products import attention_arithmetic
from pennyweight.model.resized import resized_of
from pennyweight.safe_write import staged
from pennyweight.transformers_plugin import METHOD
from pennyweight.weights import Activation, Dense, Weight, check_finite


@dataclass(frozen=True)
class Saved:
    """A written model: where, its files, and the bytes that a budget counts (`saved_bytes`)."""

    directory: Path
    files: tuple[str, ...]
    bytes: int


def save(
    model: Model,
    directory: str | Path,
    *,
    dense: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Saved:
    """Write ``model`` to ``directory``: all of it, or nothing.

    Compact layers are written as they are; `loading.load` brings them back bit by bit. What is not compact is written
    in the narrowest of its own dtype, bfloat16 and float16 that holds it exactly.

    Args:
        model: not changed.
        directory: new or empty.
        dense: multiply every compact layer out, so that ``transformers`` opens the directory without Pennyweight.
        dtype: of what is not compact, rounding where need be; with ``dense``, of everything.
        overwrite: replace the results that are in ``directory``; other files there stay.

    Raises:
        OutputError: the directory holds something, or cannot be written; what stood there is untouched.
        FormError: NaN or infinite values.
        ModelError: a dtype that no file can hold; ``dense``, and layers that round their inputs.
    """
    module = model.module
    if dense:
        _check_plain(module, model.name)
    tensors = _dense_tensors(module) if dense else compact.stored_tensors(module)[0]
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            # 8-bit floats cannot be summed
            check_finite(tensor if tensor.dtype.itemsize > 1 else tensor.float(), f"{model.name}: {name}")
    with staged(directory, overwrite=overwrite) as aside:
        tensors = {name: _narrowed(name, tensor, module, dtype, dense) for name, tensor in tensors.items()}
        if not dense:
            tensors |= _guard(module)
        header = safetensors_file.write(aside / SINGLE, tensors)
        if not dense:
            text = compact.dump(compact.layout_of(module), {SINGLE: header.sha256})
            (aside / compact.WEIGHTS).write_text(text, encoding="utf-8")
        if isinstance(module, PreTrainedModel):
            _write_config(module, aside, None if dense else {"quant_method": METHOD, "version": compact.VERSION}, dtype)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(aside)
        files = tuple(sorted(file.name for file in aside.iterdir()))
    return Saved(Path(directory), files, saved_bytes(directory))


def saved_bytes(directory: str | Path) -> int:
    """What a byte budget means: the size of the safetensors files and of ``weights.json``.

    Raises:
        ModelError: there are none.
    """
    files = [*sorted(Path(directory).glob("*.safetensors")), Path(directory) / compact.WEIGHTS]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(f"{directory}: holds no saved model")
    return sum(sizes)


def file_bytes(model: Model | nn.Module, *, dtype: torch.dtype | None = None) -> int:
    """Exactly what `saved_bytes` will be after `save` with the same ``dtype``, without writing anything."""
    module = model.module if isinstance(model, Model) else model
    stored, _ = compact.stored_tensors(module)
    tensors = {name: _narrowed(name, tensor, module, dtype, False) for name, tensor in stored.items()} | _guard(module)
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    head = len(safetensors_file.header_bytes(kinds, safetensors_file.METADATA))
    body = sum(prod(shape) * kind.itemsize for kind, shape in kinds.values())
    text = compact.dump(compact.layout_of(module), {SINGLE: "0" * 64})
    return head + body + len(text.encode("utf-8"))


def _check_plain(module: nn.Module, name: str) -> None:
    """Refuse to write as plain weights what computes something else than they do."""
    rounding, multiplying = compact.activations(module), compact.products(module)
    remedy = "which plain weights cannot say; save without dense"
    if rounding:
        raise ModelError(
            f"{name}: {len(rounding)} layers round their inputs (the first is {next(iter(rounding))}), {remedy}, or "
            "set their activation to None"
        )
    if resized_of(module):
        raise ModelError(
            f"{name}: its layers have sizes that its configuration cannot say; save without dense, and load with "
            "pennyweight"
        )
    if multiplying or attention_arithmetic(module):
        raise ModelError(f"{name}: {len(multiplying)} layers or the attention multiply in a way of their own, {remedy}")


def _guard(module: nn.Module) -> dict[str, Tensor]:
    """An empty tensor under the name of a dense one.

    Without the plug-in ``transformers`` would fill missing tensors with random numbers and carry on; a shape that does
    not fit is an error there.
    """
    layers = compact.compact_layers(module)
    return {f"{next(iter(layers))}.weight": torch.empty(0, dtype=torch.uint8)} if layers else {}


def _narrowed(name: str, tensor: Tensor, module: nn.Module, dtype: torch.dtype | None, dense: bool) -> Tensor:
    if not tensor.is_floating_point() or (not dense and _inside_compact(name, module)):
        return tensor
    return tensor.to(dtype if dtype is not None else narrowest(tensor))


def narrowest(tensor: Tensor) -> torch.dtype:
    """The dtype that a floating-point ``tensor`` is saved in: its own, or a 16-bit one that holds it exactly."""
    for narrow in (torch.bfloat16, torch.float16):
        if tensor.dtype.itemsize > narrow.itemsize and torch.equal(tensor.to(narrow).to(tensor.dtype), tensor):
            return narrow
    return tensor.dtype


def _inside_compact(name: str, module: nn.Module) -> bool:
    *path, _ = name.split(".")
    layer: Any = module
    for part in path:
        layer = getattr(layer, part)
        if isinstance(layer, (Activation, Weight)):
            return not isinstance(layer, Dense)  # a layer whose weight is its matrix is as plain as any other
    return False


def _dense_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as if nothing in it were compact or split, tied tensors once."""
    dtype, skeleton = compact.dtype_of(module), _skeleton(module)
    stored, _ = compact.stored_tensors(module)
    found = {name: tensor for name, tensor in stored.items() if not _inside_compact(name, module)}
    first: set[int] = set()
    for path, weight in compact.compact_layers(module).items():
        if id(weight) not in first:
            first.add(id(weight))
            with torch.no_grad():
                found[f"{path}.weight"] = _as_stored(weight.dense().to(dtype), module, skeleton, path)
    for path, experts in module.named_modules():
        if isinstance(experts, SplitExperts):
            assert skeleton is not None, "only transformers models have stacked experts"
            found = _restacked(found, path, skeleton.get_submodule(path))
    return found


def _skeleton(module: nn.Module) -> nn.Module | None:
    """The dense model on the meta device: what shape and layout every tensor had."""
    if not isinstance(module, PreTrainedModel):
        return None
    config = copy.deepcopy(module.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        return type(module)(config)


def _as_stored(matrix: Tensor, module: nn.Module, skeleton: nn.Module | None, path: str) -> Tensor:
    """``matrix`` (out, in) as the dense layer at ``path`` stores it."""
    layer = module.get_submodule(path)
    kernel = getattr(layer, "kernel_size", None)
    if kernel is not None:
        return matrix.reshape(matrix.shape[0], -1, *kernel)
    try:
        dense = skeleton.get_submodule(path) if skeleton is not None else None
    except AttributeError:  # inside an expert that was split off: a plain linear
        dense = None
    return matrix.T.contiguous() if isinstance(dense, Conv1D) else matrix


def _restacked(found: dict[str, Tensor], path: str, dense: nn.Module) -> dict[str, Tensor]:
    """``found`` with the experts below ``path`` stacked again as the module ``dense`` holds them."""
    turned = getattr(dense, "is_transposed", False)
    left = {name: tensor for name, tensor in found.items() if not name.startswith(f"{path}.")}
    for name, stack in dense.named_parameters(recurse=False):
        kind = "bias" if name.endswith("_bias") else "weight"
        stem = name.removesuffix("_bias")
        parts = ["gate_proj", "up_proj"] if stem == "gate_up_proj" else [stem]
        each = [
            torch.cat([found[f"{path}.{index}.{part}.{kind}"] for part in parts]) for index in range(stack.shape[0])
        ]
        left[f"{path}.{name}"] = torch.stack([tensor.T if turned and kind == "weight" else tensor for tensor in each])
        assert left[f"{path}.{name}"].shape == stack.shape, f"{path}.{name} is not what was split"
    return left


def _write_config(
    module: PreTrainedModel, directory: Path, quantization: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> None:
    config: PreTrainedConfig = copy.deepcopy(module.config)
    config.__dict__.pop("quantization_config", None)
    found = config.to_dict()
    found["architectures"] = [type(module).__name__]
    found["dtype"] = str(dtype or compact.dtype_of(module)).removeprefix("torch.")
    if quantization is not None and not compact.layout_of(module).plain:
        found["quantization_config"] = dict(quantization)
    (directory / "config.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if module.can_generate() and module.generation_config is not None:
        module.generation_config.save_pretrained(directory)
