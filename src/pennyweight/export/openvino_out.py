"""Export to OpenVINO's intermediate representation, weights compressed; see `pennyweight.export.export`.

The graph is traced from the dense model; then the constant of every quantized matrix is replaced by its codes (4 or 8
bits), zeros and scales, and the few operations that give the matrix back, in the order in which the engine's own
compression writes them: it folds them into the product and never makes the matrix. OpenVINO runs the graph on other
shapes and values than it was traced with before it is kept.

Shape letters: M out features, N in features, G groups of a row, S features of a group.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import MissingExtraError, ModelError, OptionError
from pennyweight.export.checkpoint import relative_error, rounding
from pennyweight.export.onnx_out import Bare, example, hushed
from pennyweight.export.plain import check_plain
from pennyweight.export.result import Exported
from pennyweight.model import compact
from pennyweight.model.experts import SplitExperts
from pennyweight.model.loading import load
from pennyweight.model.model import Model
from pennyweight.model.saving import save
from pennyweight.model.sites import expert_stacks
from pennyweight.safe_write import check_free, staged
from pennyweight.weights import Dense, Weight
from pennyweight.weights.quantized import Quantized

_KINDS = ("causal-lm", "masked-lm", "encoder", "classifier")
_AGREE = 1e-3  # float32 sums in another order
FILE = "openvino_model.xml"


def check_openvino(model: Model) -> None:
    """Refuse what the graph cannot say of ``model``, whatever its matrices will be.

    Raises:
        MissingExtraError: the package is not there.
        ModelError: as `pennyweight.export.export`.
    """
    if importlib.util.find_spec("openvino") is None:
        raise MissingExtraError("export openvino: needs the package openvino; install pennyweight[openvino]")
    module = check_plain(model, "OpenVINO")
    if model.kind not in _KINDS:
        raise ModelError(f"{model.name}: a {model.kind} is not written for OpenVINO; {', '.join(_KINDS)} are")
    if any(isinstance(part, SplitExperts) or expert_stacks(part) for part in module.modules()):
        raise ModelError(
            f"{model.name}: which expert a token takes is no part of a traced graph; choose another format"
        )


def to_openvino(model: Model, path: Path, *, dtype: str | None, overwrite: bool) -> Exported:
    """A directory with the graph, its weights and the tokenizer; see `pennyweight.export.export`."""
    if dtype not in (None, "f32"):
        raise OptionError(f"export openvino: dtype {dtype!r}; give f32 for the matrices whose codes it does not hold")
    check_openvino(model)
    check_free(path, overwrite=overwrite)
    import openvino

    held: dict[str, Quantized] = {}
    for name, weight in compact.compact_layers(model.module).items():
        found = _held(weight)
        if isinstance(found, Quantized):
            held[name] = found
        elif found and dtype is None:
            raise ModelError(
                f"{model.name}: OpenVINO does not hold {name} as it is: {found}. Solve it with quantize.gptq (bits: 4 "
                "or 8, zero: none or integer, groups that divide the inputs), or give dtype f32"
            )
    loss = {k: off for k, off in rounding(model.module, torch.float32, model.name).items() if k[:-7] not in held}
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "dense", dense=True)
        dense: Any = load(Path(folder) / "dense").module
        with hushed():
            dense.set_attn_implementation("eager")
        names = ("input_ids", "attention_mask")
        bare = Bare(dense, names, {"use_cache": False} if model.kind == "causal-lm" else {}).eval()
        with staged(path, overwrite=overwrite) as aside:
            graph = _converted(model, bare, names)
            kinds = _compress(graph, held, model.name)
            openvino.save_model(graph, aside / FILE, compress_to_fp16=False)
            _check(model, bare, names, aside / FILE)
            for file in (Path(folder) / "dense").iterdir():
                if file.suffix != ".safetensors" and file.is_file():
                    (aside / file.name).write_bytes(file.read_bytes())
    return Exported(path, "openvino", sum(file.stat().st_size for file in path.iterdir()), kinds, loss)


def _held(weight: Weight) -> Quantized | str:
    """``weight`` where its codes can be written; else why not, nothing of a dense one."""
    if isinstance(weight, Dense):
        return ""
    if not isinstance(weight, Quantized) or weight.format != "integer":
        return f"a {type(weight).__name__} weight is no whole numbers on one grid"
    if weight.zero_kind == "float":
        return "its zeros are no whole numbers"
    if weight.group_size is not None and weight.shape[1] % weight.group_size:
        return f"groups of {weight.group_size} do not divide its {weight.shape[1]} inputs"
    return weight


def _converted(model: Model, bare: Bare, names: tuple[str, ...]) -> Any:
    import openvino

    try:
        with hushed(), torch.no_grad():
            given = example(bare.module.config, names, 2, 8)
            graph = openvino.convert_model(bare, example_input=given)
    except Exception as error:  # bare classes of its native part
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{model.name}: OpenVINO cannot convert this model: {said}") from error
    for tensor, name in zip(graph.inputs, names, strict=True):
        tensor.get_node().set_partial_shape(openvino.PartialShape([-1, -1]))
        tensor.get_node().set_element_type(openvino.Type.i64)
        tensor.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    return graph


def _compress(graph: Any, held: dict[str, Quantized], where: str) -> dict[str, str]:
    """Put codes in the place of the constants of ``held``; what every constant matrix is stored as."""
    left, kinds = dict(held), {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or len(node.get_output_shape(0)) != 2:
            continue
        name = node.get_friendly_name().removeprefix("self.").removeprefix("module.").removesuffix(".weight")
        kinds[name] = node.get_element_type().get_type_name()
        weight = held.get(name)
        if weight is None or tuple(node.get_output_shape(0)) != weight.shape:
            continue
        made, kinds[name] = _matrix(weight, name)
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(made.output(0))
        for other in [other for other, same in left.items() if same is weight]:
            del left[other]
    if left:
        raise ModelError(f"{where}: OpenVINO renamed {next(iter(left))}, whose codes then have no place in the graph")
    graph.validate_nodes_and_infer_types()
    return kinds


def _matrix(weight: Quantized, name: str) -> tuple[Any, str]:
    """The operations that give the matrix (M, N) float32, and the type of its codes."""
    import openvino
    from openvino import opset13 as ops

    rows, columns = weight.shape
    half = 2 ** (weight.bits - 1)
    narrow, signed = weight.bits <= 4, weight.zero is None
    kind = (openvino.Type.i4 if signed else openvino.Type.u4) if narrow else (
        openvino.Type.i8 if signed else openvino.Type.u8
    )  # fmt: skip
    groups = 1 if weight.group_size is None else columns // weight.group_size
    shape = [rows, groups, columns // groups] if groups > 1 else [rows, columns]

    def constant(whole: Tensor, shape: list[int]) -> Any:
        """Whole numbers, those of four bits two a byte, the first lowest."""
        found = whole.reshape(-1).to(torch.int16).numpy()
        if narrow:
            found = np.concatenate([found, np.zeros(found.size % 2, found.dtype)]) & 15
            bytes_ = (found[::2] | found[1::2] << 4).astype(np.uint8)
        else:
            bytes_ = found.astype(np.int8 if signed else np.uint8)
        held = openvino.Tensor(np.ascontiguousarray(bytes_), openvino.Shape(shape), kind)
        return ops.constant(held, False)  # copied: the array goes

    codes = weight.codes().to(torch.int16)
    made = ops.convert(constant(codes - half if signed else codes, shape), "f16")
    beside = [*shape[:-1], 1]
    if weight.zero is not None:
        zero = weight.zero.dense().detach().expand(rows, groups)
        made = ops.subtract(made, ops.convert(constant(zero, beside), "f16"))
    scale = weight.scale.dense().detach().expand(rows, groups).to(torch.float16).reshape(beside)
    made = ops.multiply(made, ops.constant(scale.numpy()))
    if groups > 1:
        made = ops.reshape(made, ops.constant(np.array([rows, columns])), special_zero=False)
    made = ops.convert(made, "f32")
    made.set_friendly_name(f"{name}.weight")
    return made, kind.get_type_name()


def _check(model: Model, bare: Bare, names: tuple[str, ...], written: Path) -> None:
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(written, "CPU", exact)
    for rows, length in ((1, 5), (3, 13)):
        given = example(bare.module.config, names, rows, length)
        with torch.no_grad():
            wanted = bare(*given)
        fed = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        found = torch.from_numpy(np.array(compiled(fed)[0]))
        off = relative_error(found, wanted) if found.shape == wanted.shape else float("inf")
        if not off < _AGREE:
            raise ModelError(
                f"{model.name}: OpenVINO is off by {off:.2g} on {rows} x {length} inputs: what the model does depends "
                "on values that a traced graph does not hold; choose another format"
            )
