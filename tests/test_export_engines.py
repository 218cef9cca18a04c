"""Grids of block types, exports of codes, and fits for a target: read back by the engines and their own packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import toys
from problems import problem
from test_export import IDS, logits, quantized, toy, trained
from tokenizers import pre_tokenizers

import pennyweight as pw
from pennyweight.cli import main
from pennyweight.errors import BudgetError, ModelError, OptionError
from pennyweight.export import blocks_of
from pennyweight.export.gguf_blocks import Blocks
from pennyweight.export.gguf_out import gguf_bytes
from pennyweight.export.targets import TARGETS
from pennyweight.fit import Fitted, fit
from pennyweight.lever import make
from pennyweight.levers.quantize import blocks
from pennyweight.model import anatomy
from pennyweight.model.loading import load
from pennyweight.model.model import Model
from pennyweight.solvers.block_types import TYPES, refitted
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.verify import verify
from pennyweight.weights import CompactLinear, Dense, Weight
from pennyweight.weights.grid import Grid, float_levels
from pennyweight.weights.quantized import Quantized

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, Statistics]:
    return problem(6, 512)


# grids


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_written_bit_for_bit_and_costs_what_it_stores(
    name: str, case: tuple[torch.Tensor, Statistics]
) -> None:
    matrix, statistics = case
    weight = blocks.Blocks(type=name).solve(Dense(matrix), statistics)
    found = blocks_of(weight)
    assert isinstance(found, Blocks)
    assert found.kind.name == name
    written = found.encode()
    assert np.array_equal(gguf.quants.dequantize(written, found.kind), weight.dense().detach().numpy())
    assert weight.cost().bytes == written.size == TYPES[name].bits_per_weight * matrix.numel() / 8


@pytest.mark.parametrize("name", TYPES)
def test_codes_are_settled_under_the_second_moment(name: str, case: tuple[torch.Tensor, Statistics]) -> None:
    matrix, statistics = case
    moment = statistics.second_moment
    once, twice = (blocks.Blocks(type=name, passes=count).solve(Dense(matrix), statistics) for count in (1, 2))
    blind = blocks.Blocks(type=name).solve(Dense(matrix), Statistics(1, second_moment=torch.eye(512)))
    assert twice.error(matrix, moment) <= once.error(matrix, moment) < 0.95 * blind.error(matrix, moment)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1"])
def test_scales_are_the_least_squares_of_a_row_given_its_codes(
    name: str, case: tuple[torch.Tensor, Statistics]
) -> None:
    matrix, statistics = case
    moment = statistics.need("second_moment", "test")
    kind = TYPES[name]
    grid = Grid.fit(matrix, bits=4, group_size=32, symmetric=not kind.minimum, zero_kind="float")
    codes = grid.codes(matrix)
    found = refitted(kind, matrix, codes, grid, moment, damping=0.0)
    root = torch.linalg.cholesky(moment.double()).T.numpy()
    level = codes[0].double() - (0 if kind.minimum else 8)
    parts = [level, torch.ones_like(level)] if kind.minimum else [level]
    columns = [
        root @ torch.where(torch.arange(512) // 32 == block, part, 0.0).numpy() for part in parts for block in range(16)
    ]
    wanted = np.linalg.lstsq(np.stack(columns, 1), root @ matrix[0].double().numpy(), rcond=None)[0]
    held = torch.cat([found.scale[0], found.zero[0]]) if found.zero is not None else found.scale[0]
    same = np.abs(held.double().numpy() - wanted) < 2e-3 * np.abs(wanted) + 1e-5
    assert same.mean() > 0.9  # a scale whose sign would turn stays as it was


def test_super_blocks_beat_what_rounding_their_scales_would_give(case: tuple[torch.Tensor, Statistics]) -> None:
    matrix, statistics = case
    free = Quantized.nearest(matrix, bits=2, group_size=16, zero_kind="float", search=16)
    solved = blocks.Blocks(type="Q2_K").solve(Dense(matrix), statistics)
    assert solved.cost().bytes < free.cost().bytes
    assert solved.error(matrix, statistics.second_moment) < free.error(matrix, statistics.second_moment)


def test_a_matrix_of_zeros_and_a_constant_one_are_solved(case: tuple[torch.Tensor, Statistics]) -> None:
    for matrix in (torch.zeros(3, 512), torch.full((3, 512), -0.25)):
        for name in TYPES:
            weight = blocks.Blocks(type=name).solve(Dense(matrix), case[1])
            assert isinstance(blocks_of(weight), Blocks)
            torch.testing.assert_close(weight.dense().detach(), matrix, atol=3e-3, rtol=2e-2)


def test_the_table_of_levels_rounds_to_the_nearest() -> None:
    levels = float_levels("nl4")
    assert np.array_equal(levels.numpy(), np.array(gguf.quants.IQ4_NL.kvalues, dtype=np.float32))
    x = torch.linspace(-200, 200, 4001)[None]
    codes = Grid(4, None, torch.ones(1, 1), None, "none", "nl4").codes(x)
    distance = (x[0, :, None] - levels).abs()
    assert torch.equal((x[0] - levels[codes[0].long()]).abs(), distance.min(1).values)


def test_a_type_that_does_not_divide_the_inputs_is_refused_with_those_that_do() -> None:
    matrix, statistics = problem(4, 96)
    with pytest.raises(OptionError, match=r"type Q4_K stores 256 inputs at a time, .* 96; give IQ4_NL, Q4_0, Q4_1"):
        blocks.Blocks(type="Q4_K").solve(Dense(matrix), statistics)


# GGUF


def solved(model: Model, kinds: tuple[str, ...]) -> Model:
    """``model`` with every matrix on the grid of one of ``kinds`` in turn."""
    layers = [found for found in model.anatomy.layers() if found.kind in ("linear", "embedding")]
    for index, layer in enumerate(layers):
        matrix = anatomy.matrix(model.module, layer).detach().clone()
        statistics = Statistics(1, second_moment=torch.eye(matrix.shape[1]))
        lever = blocks.Blocks(type=kinds[index % len(kinds)], search=4)
        anatomy.replace(model.module, layer.path, lever.solve(Dense(matrix), statistics))
    return model


def test_all_types_come_back_in_one_file_of_the_predicted_size(tmp_path: Path) -> None:
    model = solved(toy(**WIDE), tuple(TYPES))
    found = pw.export(model, "gguf", tmp_path / "m.gguf")
    assert set(TYPES) <= set(found.kinds.values())
    assert (found.bytes, found.loss) == (gguf_bytes(model), {})
    back = load(tmp_path / "m.gguf").module
    for name, tensor in back.state_dict().items():
        held: Any = model.module.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(tensor, held.dense() if isinstance(held, Weight) else held), name


def test_llama_cpp_runs_all_types(tmp_path: Path) -> None:
    engine: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = solved(toy(**WIDE), tuple(TYPES))
    pw.export(model, "gguf", tmp_path / "m.gguf")
    runner = engine.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    runner.eval(IDS[0].tolist())
    found, wanted = torch.from_numpy(np.array(runner.scores[: IDS.shape[1]])), logits(model.module)[0]

    def in_eight_bits(_: Any, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        step = given[0].abs().amax(-1, keepdim=True) / 127
        return (given[0] / step).round() * step

    # the engine rounds the inputs of products to 8 bits, in blocks of up to 256: what that alone does is the measure
    for layer in model.module.modules():
        if isinstance(layer, CompactLinear):
            layer.register_forward_pre_hook(in_eight_bits)
    alone = float((logits(model.module)[0] - wanted).norm())
    assert 0 < float((found - wanted).norm()) < 1.5 * alone


# compressed-tensors


def opened(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@pytest.mark.filterwarnings("ignore")  # of the package that opens it
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32, "zero": "none"},
        {"bits": 8, "group_size": None, "zero": "none"},
    ],
)
def test_transformers_opens_packed_tensors(options: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(toy(), **options)
    found = pw.export(model, "compressed-tensors", tmp_path / "out")
    assert found.kinds["model.layers.0.mlp.up_proj.weight_packed"] == "int32"
    assert found.kinds["model.embed_tokens.weight"].startswith("float")
    assert not [name for name in found.loss if "_proj" in name]
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(model.module), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_layers_of_several_widths_and_plain_ones_stand_side_by_side(tmp_path: Path) -> None:
    model = toy()
    for path, bits in (("model.layers.0.mlp.up_proj", 4), ("model.layers.1.self_attn.o_proj", 8)):
        layer: Any = model.module.get_submodule(path)
        weight = Quantized.nearest(layer.weight.detach(), bits=bits, group_size=32, symmetric=True)
        anatomy.replace(model.module, path, weight)
    pw.export(model, "compressed-tensors", tmp_path / "out")
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(model.module), rtol=1e-4, atol=1e-4)


def test_what_the_layout_does_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"q_proj: .* its codes are 3 bits, integer, zero: none; 4 or 8 bits"):
        pw.export(quantized(toy(), bits=3, group_size=32, zero="none"), "compressed-tensors", tmp_path / "out")
    with pytest.raises(ModelError, match="no linear layer is quantized"):
        pw.export(toy(), "compressed-tensors", tmp_path / "out")
    with pytest.raises(OptionError, match="codes are written as they are"):
        pw.export(toy(), "compressed-tensors", tmp_path / "out", dtype="f16")
    assert not list(tmp_path.iterdir())


# OpenVINO


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"bits": 4, "group_size": 32, "zero": "none"}, "i4"),
        ({"bits": 4, "group_size": 32, "zero": "integer"}, "u4"),
        ({"bits": 8, "group_size": None, "zero": "none"}, "i8"),
        ({"bits": 6, "group_size": None, "zero": "integer"}, "u8"),
    ],
)
def test_openvino_runs_compressed_weights(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    openvino: Any = pytest.importorskip("openvino", reason="openvino is not installed")
    model = quantized(toy(), **options)
    found = pw.export(model, "openvino", tmp_path / "out")
    assert list(found.kinds.values()).count(kind) == 16
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", exact)
    read = compiled({"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())})[0]
    torch.testing.assert_close(torch.from_numpy(np.array(read)), logits(model.module), rtol=1e-3, atol=1e-3)
    stored = (tmp_path / "out" / "openvino_model.bin").stat().st_size
    held = sum(w.cost().bytes for w in {id(w): w for w in weights(model)}.values())
    assert held <= stored if options["bits"] in (4, 8) else stored > held
    if options["bits"] == 4 and options["zero"] == "none":
        assert stored < 1.2 * held + 20_000  # codes, scales, norms; nothing dense is left


def weights(model: Model) -> list[Weight]:
    return [layer.weight for layer in model.module.modules() if isinstance(getattr(layer, "weight", None), Weight)]


@pytest.mark.filterwarnings("ignore")
def test_what_openvino_does_not_hold_is_refused_or_multiplied_out(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    model = quantized(toy(), bits=4, group_size=32, zero="float")
    with pytest.raises(ModelError, match="its zeros are no whole numbers"):
        pw.export(model, "openvino", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert "i4" not in pw.export(model, "openvino", tmp_path / "out", dtype="f32").kinds.values()


# fits for a target


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = toys.llama(tmp_path_factory.mktemp("llama"), vocab_size=416)
    trained(pre_tokenizers.ByteLevel(add_prefix_space=False)).save_pretrained(path)
    return path, toys.text_file(tmp_path_factory.mktemp("text"))


def test_a_fit_for_gguf_writes_its_file_within_the_budget(small: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = small
    found: Fitted = fit(model, data=text, budgets=["45%"], target="gguf", out=tmp_path / "out", settings=toys.QUICK)
    (line,) = found.receipt.budgets
    size = (tmp_path / "out" / "model.gguf").stat().st_size
    assert 0.9 * line.allowed < line.spent == size <= line.allowed
    assert found.receipt.request.target == "gguf"
    assert {type(step.lever).__name__ for step in found.recipe.steps} == {"Blocks"}
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert len(kinds - {"F32"}) > 1  # a type for each matrix, not one for all
    back = load(tmp_path / "out" / "model.gguf").module
    for name, tensor in back.state_dict().items():
        held: Any = found.model.module.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(tensor, held.dense() if isinstance(held, Weight) else held.float()), name
    assert verify(tmp_path / "out", model=model).holds


def test_the_command_line_fits_for_a_target(
    small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = small
    aim = ["--target", "ggml", "--out", str(tmp_path / "o")]
    asked = ["fit", str(model), "--data", str(text), "--budget", "45%", *aim]
    assert main(asked) == 2
    assert "target 'ggml'; give one of gguf" in " ".join(capsys.readouterr().err.split())
    assert main(["export", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in ("safetensors", "gguf", "onnx", "compressed-tensors", "openvino"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budgets": ["latency=80%"]}, "made against bytes, not latency"),
        ({"budgets": ["45%"], "levers": "quantize.rtn"}, "a target decides what is offered"),
        ({"budgets": ["45%"], "time": "1min"}, "repair moves scales off the grids"),
    ],
)
def test_what_goes_with_no_target_is_refused(
    options: dict[str, Any], says: str, small: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=says):
        fit(small[0], data=small[1], target="gguf", out=tmp_path / "out", settings=toys.QUICK, **options)


def test_a_model_that_the_target_cannot_say_is_refused_before_any_work(tmp_path: Path) -> None:
    model = toys.bert(tmp_path / "bert")
    with pytest.raises(ModelError, match="is not written as GGUF"):
        fit(model, data=toys.documents(2), budgets=["50%"], target="gguf", out=tmp_path / "out", settings=toys.QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


@pytest.mark.filterwarnings("ignore")
def test_maps_that_vllm_fuses_take_one_setting(small: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = small
    found = fit(
        model, data=text, budgets=["85%"], target="compressed-tensors", out=tmp_path / "out", settings=toys.QUICK
    )
    (line,) = found.receipt.budgets
    assert line.spent == (tmp_path / "out" / "compressed-tensors" / "model.safetensors").stat().st_size <= line.allowed
    for block in found.model.module.model.layers:
        for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            part = block.self_attn if "q_proj" in parts else block.mlp
            held = [getattr(part, name).weight for name in parts]
            assert len({(w.bits, w.group_size, w.zero_kind) for w in held}) == 1
    torch.testing.assert_close(
        logits(opened(tmp_path / "out" / "compressed-tensors")),
        logits(found.model.module.float()),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_budget_below_every_offer_says_the_smallest(small: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        fit(small[0], data=small[1], budgets=["10%"], target="gguf", out=tmp_path / "out", settings=toys.QUICK)


def test_offers_of_a_target_are_what_its_export_holds() -> None:
    model = toy()
    (map_,) = [found for found in model.anatomy.layers() if found.path == "model.layers.0.mlp.up_proj"]
    matrix = anatomy.matrix(model.module, map_).detach()
    statistics = Statistics(1, second_moment=torch.eye(matrix.shape[1]))
    for name, target in TARGETS.items():
        settings = list(target.settings(map_))
        assert len(settings) > 3, name
        assert {setting.lever_name for setting in settings} == {target.lever}
    for setting in TARGETS["gguf"].settings(map_):
        assert isinstance(blocks_of(setting.solve(Dense(matrix), statistics)), Blocks)


def test_the_lever_needs_data() -> None:
    lever = make("quantize.blocks", {"type": "Q4_0"})
    with pytest.raises(pw.errors.DataError, match=r"quantize\.blocks: needs calibration data"):
        lever.solve(Dense(torch.ones(2, 32)), NO_STATISTICS)


def test_a_fit_for_openvino_writes_what_it_runs(small: tuple[Path, Path], tmp_path: Path) -> None:
    openvino: Any = pytest.importorskip("openvino", reason="openvino is not installed")
    model, text = small
    found = fit(model, data=text, budgets=["110%"], target="openvino", out=tmp_path / "out", settings=toys.QUICK)
    (line,) = found.receipt.budgets
    folder = tmp_path / "out" / "openvino"
    sizes = {part: (folder / f"openvino_model.{part}").stat().st_size for part in ("bin", "xml")}
    assert line.spent == sum(sizes.values()) <= line.allowed  # the graph of so small a model outweighs it
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", exact)
    read = compiled({"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())})[0]
    torch.testing.assert_close(
        torch.from_numpy(np.array(read)), logits(found.model.module.float()), rtol=1e-3, atol=1e-3
    )
