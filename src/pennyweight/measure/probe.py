"""One small forward pass that shows how often each layer runs, and what the cache keeps.

FLOPs read off a module tree alone are wrong as soon as a layer runs twice (shared blocks), once a sequence (poolers),
or for some tokens only (experts). So every layer is watched on a few tokens.

Shape letters: T tokens, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError
from pennyweight.evaluate.forward import accepts, device_of, looking
from pennyweight.model.anatomy import Anatomy, Map

TOKENS = 8

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """What a model is tried on.

    Attributes:
        inputs: a tensor, positional arguments, or arguments by name.
        unit: what FLOPs are counted for: "token", "token pair" (one in, one out), "image 224x224", "sample".
        count: units in the inputs.
    """

    inputs: Inputs
    unit: str
    count: int


@dataclass
class Seen:
    """What the pass showed.

    Attributes:
        rows: by the path that `called` gives, the input rows a layer saw: positions of a convolution, look-ups of a
            table, choices of all experts of a stack.
        widest: bytes of the largest input and output of one layer together.
        cache: the cache the model handed back, or None.
    """

    rows: dict[str, int] = field(default_factory=dict)
    widest: int = 0
    cache: Any = None


def sample_for(module: nn.Module, found: Anatomy) -> Sample | None:
    """Inputs that ``module`` says it takes; None for one that does not say."""
    config, device = getattr(module, "config", None), device_of(module)
    if found.embedding is not None:
        ids = (torch.arange(TOKENS, device=device) % found.embedding.shape[0])[None]
        known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids, "use_cache": True}
        if not accepts(module, "input_ids"):
            return Sample(ids, "token", TOKENS)
        if device.type == "meta":  # a mask is looked at for zeros, and without data there is nothing to see
            del known["attention_mask"]
        named = {name: value for name, value in known.items() if accepts(module, name)}
        return Sample(named, "token pair" if "decoder_input_ids" in named else "token", TOKENS)
    if config is not None and accepts(module, "pixel_values"):
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        first = next(iter(module.parameters()))
        pixels = torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=device, dtype=first.dtype)
        return Sample({"pixel_values": pixels}, f"image {height}x{width}", 1)
    return None


def given(inputs: Inputs) -> Sample:
    """A sample of the user's own ``inputs``; the first dimension of the first tensor counts samples."""
    values: Iterable[Any] = (inputs,) if isinstance(inputs, Tensor) else _values(inputs)
    first = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
    if first is None:
        raise ModelError("cost: inputs hold no tensor with a first dimension of samples")
    return Sample(inputs, "sample", len(first))


def watch(module: nn.Module, found: Anatomy, sample: Sample) -> Seen:
    """Run ``module`` on ``sample`` and see what its layers do.

    Raises:
        ModelError: it cannot be run on them.
    """
    seen = Seen()
    with looking(module), _watching(module, found.whole, seen):
        try:
            output = call(module, sample)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"cost: {type(module).__name__} does not run on {sample.count} {sample.unit}(s) ({error}); "
                "give inputs=... that it takes"
            ) from error
    seen.cache = getattr(output, "past_key_values", None)
    return seen


def call(module: nn.Module, sample: Sample) -> Any:
    """The output of ``module`` on ``sample``."""
    if isinstance(sample.inputs, Mapping):
        return module(**sample.inputs)
    return module(*(sample.inputs if isinstance(sample.inputs, tuple) else (sample.inputs,)))


@contextmanager
def _watching(module: nn.Module, maps: Iterable[Map], seen: Seen) -> Iterator[None]:
    with ExitStack() as hooks:
        for path, found in {called(module, found): found for found in maps}.items():
            note = partial(_note, seen, path, found)
            hooks.enter_context(module.get_submodule(path).register_forward_hook(note, with_kwargs=True))
        yield


def _note(
    seen: Seen, path: str, found: Map, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    outputs = [value for value in _values(output) if isinstance(value, Tensor)]
    seen.rows[path] = seen.rows.get(path, 0) + _rows(found, tensors, outputs)
    seen.widest = max(seen.widest, sum(tensor.nbytes for tensor in (*tensors[:1], *outputs[:1])))


def called(module: nn.Module, found: Map) -> str:
    """The path of the module whose call applies ``found``: fused attention never calls its own output layer."""
    above = found.path.rpartition(".")[0]
    return above if isinstance(module.get_submodule(above), nn.MultiheadAttention) else found.path


def _rows(found: Map, tensors: list[Tensor], outputs: list[Tensor]) -> int:
    if found.kind in ("conv1d", "conv2d"):
        return outputs[0].numel() // found.shape[0]
    if found.kind == "embedding":
        return outputs[0].numel() // found.shape[1]
    if found.kind == "expert-stack":  # called with the chosen experts (T, K)
        return sum(tensor.numel() for tensor in tensors if not tensor.is_floating_point())
    return tensors[0].numel() // tensors[0].shape[-1]


def _values(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    return output if isinstance(output, (tuple, list)) else (output,)
