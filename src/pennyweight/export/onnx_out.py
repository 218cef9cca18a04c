"""Export to an ONNX graph of the dense model in float32; see `pennyweight.export.export`.

The graph is traced, so what depends on the values that were traced with would be wrong for others without a word. It is
therefore run by ONNX Runtime on other shapes, padding and values, and refused when it does not compute what torch does.

Shape letters: B rows of a batch, L tokens.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight.errors import MissingExtraError, ModelError, OptionError, OutputError
from pennyweight.export.checkpoint import relative_error, rounding
from pennyweight.export.plain import check_plain
from pennyweight.export.result import Exported
from pennyweight.model.experts import SplitExperts
from pennyweight.model.loading import load
from pennyweight.model.model import Model
from pennyweight.model.saving import save
from pennyweight.model.sites import expert_stacks
from pennyweight.safe_write import write_file
from pennyweight.units import show_bytes

_TEXT = ("causal-lm", "masked-lm", "encoder", "classifier")
_MOST_BYTES = 2**31 - 2**20  # of one protocol buffer, with room for the graph
_AGREE = 1e-4  # float32 sums in another order; a graph that is wrong is off by far more


class Bare(nn.Module):
    """Tensors in, the first output out: what an exporter can trace."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], options: dict[str, bool]) -> None:
        super().__init__()
        self.module, self.names, self.options = module, names, options

    def forward(self, *given: Tensor) -> Tensor:
        found: Tensor = self.module(**dict(zip(self.names, given, strict=True)), **self.options)[0]
        return found


def to_onnx(model: Model, path: Path, *, dtype: str | None, overwrite: bool) -> Exported:
    """One graph, every matrix multiplied out; see `pennyweight.export.export`."""
    if dtype not in (None, "f32"):
        raise OptionError(f"export onnx: dtype {dtype!r}; it is written in f32")
    if path.suffix != ".onnx":
        raise OptionError(f"export onnx: {path}; give a file that ends in .onnx")
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        raise MissingExtraError("export onnx: needs the packages onnx and onnxruntime; install pennyweight[export]")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: is there already; give another name, or overwrite")
    module = check_plain(model, "ONNX")
    if model.kind not in (*_TEXT, "image-classifier"):
        known = ", ".join((*_TEXT, "image-classifier"))
        raise ModelError(f"{model.name}: a {model.kind} is not written as ONNX; {known} are")
    if any(isinstance(part, SplitExperts) or expert_stacks(part) for part in module.modules()):
        raise ModelError(
            f"{model.name}: which expert a token takes is no part of a traced graph; choose another format"
        )
    loss = rounding(module, torch.float32, model.name)
    with TemporaryDirectory() as aside:
        save(model, Path(aside) / "dense", dense=True)
        dense: Any = load(Path(aside) / "dense").module
    held = 4 * sum(tensor.numel() for tensor in dense.state_dict().values())  # a tied head is written again, turned
    if held > _MOST_BYTES:
        raise ModelError(f"{model.name}: {show_bytes(held)} in float32 exceed the 2 GiB of an ONNX file")
    if model.kind in _TEXT:
        with hushed():  # some architectures have but one, and say so
            dense.set_attn_implementation("eager")  # others choose by the values of the mask, which a trace freezes
    names = ("pixel_values",) if model.kind == "image-classifier" else ("input_ids", "attention_mask")
    bare = Bare(dense, names, {"use_cache": False} if model.kind == "causal-lm" else {}).eval()
    axes = {name: {0: "batch"} if name == "pixel_values" else {0: "batch", 1: "length"} for name in names}
    result = "output" if model.kind in ("image-classifier", "classifier", "encoder") else "logits"
    axes[result] = {0: "batch"} if model.kind in ("image-classifier", "classifier") else {0: "batch", 1: "length"}
    kinds: dict[str, str] = {}

    def fill(written: str) -> None:
        try:
            with hushed(), torch.no_grad():  # the exporter that torch now prefers needs a further package
                torch.onnx.export(
                    bare, example(dense.config, names, 2, 8), written, input_names=list(names), output_names=[result],
                    dynamo=False, opset_version=18, dynamic_axes=axes,
                )  # fmt: skip
        # all that the exporter says of a module it cannot trace; it is told as one clear error
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelError(f"{model.name}: torch cannot write this model as ONNX: {said}") from error
        _check(model, bare, names, written)
        kinds.update(_kinds(written))

    write_file(path, fill)
    return Exported(path, "onnx", path.stat().st_size, kinds, loss)


def example(config: Any, names: tuple[str, ...], rows: int, length: int) -> tuple[Tensor, ...]:
    """Inputs by ``names`` with something of everything: ids of the whole vocabulary (B, L), and a padded row."""
    g = torch.Generator().manual_seed(rows * length)
    if names == ("pixel_values",):
        size = config.image_size if hasattr(config, "image_size") else 224
        high, wide = (size, size) if isinstance(size, int) else size
        return (torch.randn(rows, config.num_channels, high, wide, generator=g),)
    ids, mask = torch.randint(0, config.vocab_size, (rows, length), generator=g), torch.ones(rows, length).long()
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int):  # classifiers look for the last token that is none
        ids[ids == pad] = (pad + 1) % config.vocab_size
    if rows > 1:
        mask[1, length // 2 :] = 0
    return ids, mask


def _check(model: Model, bare: Bare, names: tuple[str, ...], written: str) -> None:
    """Run the graph on other shapes and values than it was traced with."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(written, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # bare classes of its native part
        raise ModelError(f"{model.name}: ONNX Runtime does not open what torch wrote: {error}") from error
    for rows, length in ((1, 5), (3, 13), (4, 8)):
        given = example(bare.module.config, names, rows, length)
        with torch.no_grad():
            wanted = bare(*given)
        try:
            fed = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
            found = torch.from_numpy(np.asarray(session.run(None, fed)[0]))
        except Exception as error:
            raise ModelError(
                f"{model.name}: its graph holds for the traced shape only, not for {rows} x {length} ({error}); "
                "choose another format"
            ) from error
        off = relative_error(found, wanted) if found.shape == wanted.shape else float("inf")
        if not off < _AGREE:
            raise ModelError(
                f"{model.name}: ONNX Runtime is off by {off:.2g} on {rows} x {length} inputs: what the model does "
                "depends on values that a traced graph does not hold; choose another format"
            )


def _kinds(written: str) -> dict[str, str]:
    import onnx

    graph = onnx.load(written, load_external_data=False).graph
    names = onnx.TensorProto.DataType.Name
    return {tensor.name: names(tensor.data_type).lower() for tensor in graph.initializer}


@contextmanager
def hushed() -> Iterator[None]:
    """No advice of exporters, which nobody here can follow."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
