"""A loaded model: the module, its tokenizer, and what kind of model it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from pennyweight.errors import DataError
from pennyweight.model import anatomy, compact
from pennyweight.weights import Activation, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Kind = Literal["causal-lm", "masked-lm", "encoder", "seq2seq", "image-classifier", "classifier", "module"]

_WORDS: dict[str, Kind] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForConditionalGeneration": "seq2seq",
    "ForImageClassification": "image-classifier",
    "ForSequenceClassification": "classifier",
    "ForTokenClassification": "classifier",
}


def kind_of(architecture: str) -> Kind:
    """The kind of model that the class name ``architecture`` tells; "module" when it tells none."""
    bare: Kind = "encoder" if architecture.endswith("Model") else "module"
    return next((kind for word, kind in _WORDS.items() if word in architecture), bare)


@dataclass
class Model:
    """A model in memory.

    Attributes:
        module: in eval mode.
        tokenizer: None when there is none; `need_tokenizer` says why.
        name: what the user called it.
        kind: what it does.
        config: the ``transformers`` configuration; None for a plain module.
        no_tokenizer: why ``tokenizer`` is None.
    """

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    kind: Kind
    config: PreTrainedConfig | None = None
    no_tokenizer: str = "none was given"

    @cached_property
    def anatomy(self) -> anatomy.Anatomy:
        """Its blocks and the role of every linear map, as they were when first asked for."""
        return anatomy.of(self.module)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors as they are now, and how inputs are rounded."""
        digest = hashlib.sha256(compact.behavior(self.module).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def need_tokenizer(self) -> Any:
        """The tokenizer, or a DataError that says why there is none."""
        if self.tokenizer is None:
            raise DataError(f"{self.name}: text needs a tokenizer, and {self.no_tokenizer}; give token ids instead")
        return self.tokenizer


def parameters(module: nn.Module) -> int:
    """Distinct parameters: a tied tensor counts once, a compact weight as its matrix, ranges of inputs not at all."""
    seen: set[int] = set()
    return _count(module, seen)


def _count(module: nn.Module, seen: set[int]) -> int:
    if id(module) in seen:
        return 0
    seen.add(id(module))
    if isinstance(module, Weight):
        return module.shape[0] * module.shape[1]
    if isinstance(module, Activation):
        return 0
    own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
    seen.update(map(id, own))
    return sum(parameter.numel() for parameter in own) + sum(_count(child, seen) for child in module.children())


def bf16_bytes(model: Model | nn.Module) -> int:
    """The reference size of a model ("100 %"): 2 bytes for every distinct parameter."""
    return 2 * parameters(model.module if isinstance(model, Model) else model)
