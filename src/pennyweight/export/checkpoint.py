"""Export to a plain dense checkpoint: safetensors that stock ``transformers`` opens without Pennyweight."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pennyweight.errors import FormError, OptionError
from pennyweight.export.plain import check_plain
from pennyweight.export.result import Exported
from pennyweight.model import compact
from pennyweight.model.checkpoint import Checkpoint
from pennyweight.model.model import Model
from pennyweight.model.saving import save
from pennyweight.safe_write import check_free

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def to_checkpoint(model: Model, path: Path, *, dtype: str | None, overwrite: bool) -> Exported:
    """Every matrix multiplied out; see `pennyweight.export.export`."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"export safetensors: dtype {dtype!r}; give one of {', '.join(DTYPES)}")
    module = check_plain(model, "a plain checkpoint")
    check_free(path, overwrite=overwrite)
    final = None if dtype is None else DTYPES[dtype]
    loss = rounding(module, final, model.name)
    saved = save(model, path, dense=True, dtype=final, overwrite=overwrite)
    written = Checkpoint(path)
    kinds = {name: str(written.read(name).dtype).removeprefix("torch.") for name in written.names()}
    size = sum((path / file).stat().st_size for file in saved.files)
    return Exported(path, "safetensors", size, kinds, loss)


def rounding(module: nn.Module, final: torch.dtype | None, name: str) -> dict[str, float]:
    """The relative error of every tensor that a dense copy in ``final`` rounds; compact weights are multiplied out in
    the dtype that the model computes in, plain tensors keep theirs when ``final`` is None.

    Raises:
        FormError: values beyond the range of ``final``.
    """
    weights, between = compact.compact_layers(module), compact.dtype_of(module)
    loss: dict[str, float] = {}

    def note(at: str, tensor: Tensor, dtype: torch.dtype) -> None:
        found = tensor.to(dtype).to(final or dtype)
        if not bool(found.isfinite().all()) and bool(tensor.isfinite().all()):
            raise FormError(f"{name}: {at} is beyond the range of {final or dtype}; give bf16 or f32")
        if error := relative_error(found, tensor):
            loss[at] = error

    with torch.no_grad():
        for path, weight in {id(weight): (path, weight) for path, weight in reversed(weights.items())}.values():
            note(f"{path}.weight", weight.dense(), between)
        for at, tensor in compact.stored_tensors(module)[0].items():
            if tensor.is_floating_point() and not at.startswith(tuple(f"{path}.weight." for path in weights)):
                note(at, tensor, tensor.dtype)
    return loss


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of ``wanted``; 0 when they are equal."""
    wanted = wanted.detach().double()
    off = float((found.double() - wanted).norm())
    return off / float(wanted.norm()) if off else 0.0
