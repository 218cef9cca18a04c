"""Export to a plain dense checkpoint: safetensors that stock ``transformers`` opens without Pennyweight."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pennyweight.errors import FormError, OptionError
from pennyweight.export.plain import check_plain
from pennyweight.export.result import Exported
from pennyweight.model.checkpoint import Checkpoint
from pennyweight.model.model import Model
from pennyweight.model.saving import _dense_tensors, save
from pennyweight.safe_write import check_free

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def to_checkpoint(model: Model, path: Path, *, dtype: str | None, overwrite: bool) -> Exported:
    """Every matrix multiplied out; see `pennyweight.export.export`."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"export safetensors: dtype {dtype!r}; give one of {', '.join(DTYPES)}")
    module = check_plain(model, "a plain checkpoint")
    check_free(path, overwrite=overwrite)
    before = {} if dtype is None else _dense_tensors(module)
    for name, tensor in before.items():
        if tensor.is_floating_point() and not bool(tensor.to(DTYPES[str(dtype)]).isfinite().all()):
            raise FormError(f"{model.name}: {name} is beyond the range of {dtype}; give bf16 or f32")
    saved = save(model, path, dense=True, dtype=None if dtype is None else DTYPES[dtype], overwrite=overwrite)
    written = Checkpoint(path)
    kinds, loss = {}, {}
    for name in written.names():
        tensor = written.read(name)
        kinds[name] = str(tensor.dtype).removeprefix("torch.")
        if name in before and (error := relative_error(tensor, before[name])):
            loss[name] = error
    size = sum((path / file).stat().st_size for file in saved.files)
    return Exported(path, "safetensors", size, kinds, loss)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of ``wanted``; 0 when they are equal."""
    wanted = wanted.detach().double()
    off = float((found.double() - wanted).norm())
    return off / float(wanted.norm()) if off else 0.0
