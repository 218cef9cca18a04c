"""Running a model to look at it: without gradients, without dropout, and leaving it as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError, OptionError
from pennyweight.model import kv_cache


@contextmanager
def looking(module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards every part is in the mode it was in.

    Args:
        module: the model.
        dtype: of matrix products (autocast); None for that of the weights. Norms, softmax and the residual stream stay
            in the dtype of the weights, and so does what a compact weight unpacks to.
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise OptionError(f"compute dtype {dtype} is none that products can run in; give float32, bfloat16 or float16")
    training = [part for part in module.modules() if part.training]
    lower = dtype in (torch.bfloat16, torch.float16)
    # no_grad and not inference_mode: a layer may keep what it unpacks, and training must be able to use it later
    with torch.no_grad(), torch.autocast(device_of(module).type, dtype) if lower else nullcontext():
        module.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True


def device_of(module: nn.Module) -> torch.device:
    """Where the first tensor of ``module`` lies; the CPU for one without tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def native_dtype(device: str) -> torch.dtype:
    """bfloat16 where a device of this type multiplies it in hardware (emulated it is slower), else float32."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        native = device == "cpu" and probe is not None and bool(probe())
    return torch.bfloat16 if native else torch.float32


def accepts(module: nn.Module, name: str) -> bool:
    """Whether ``module.forward`` names a parameter ``name``."""
    return name in inspect.signature(module.forward).parameters


def run(module: nn.Module, ids: Tensor, **options: Any) -> Any:
    """The output of ``module`` on token ids (B, T), all of them seen; without a cache unless asked.

    A model that keeps a packed cache (`kv_cache.keep`) is read through it: what the cache costs in quality shows.
    """
    setting = None if options else kv_cache.kept_setting(module)
    if setting is not None:
        return kv_cache.read(module, ids, cache=kv_cache.kv_cache(module), chunk=setting.group_size)
    options = {"use_cache": False, "attention_mask": torch.ones_like(ids), **options}
    return module(ids, **{name: value for name, value in options.items() if accepts(module, name)})


def first_tensor(output: Any, wanted: str = "logits") -> Tensor:
    """The tensor of an output that is called ``wanted``, or its first.

    Raises:
        ModelError: no tensor there.
    """
    found = getattr(output, wanted, None)
    if found is None and isinstance(output, dict):
        found = output.get(wanted, next(iter(output.values()), None))
    elif found is None:
        found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the model returns a {type(output).__name__} without {wanted}; it must return a tensor of them"
        )
    return found
