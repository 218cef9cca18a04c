"""Exports, read back by those they are for: stock ``transformers``, the GGUF library, our own loader, llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import gguf
import numpy as np
import pytest
import torch
from assets_here import needs
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toys import documents
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pennyweight as pw
from pennyweight.cli import main
from pennyweight.errors import ModelError, OptionError, OutputError
from pennyweight.export import GRIDS, Blocks, blocks_of, gguf_tokens, onnx_out
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import anatomy, assets
from pennyweight.model.experts import split_experts
from pennyweight.model.loading import load, of_module
from pennyweight.model.model import Model
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Activation, Dense, LowRank, Sum, Weight
from pennyweight.weights.quantized import Quantized

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))


def toy(**options: Any) -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(**{**families._LLAMA, **WIDE, "initializer_range": 0.2, **options})  # type: ignore[dict-item]
    module = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms start at 1: nothing would be tested
    return of_module(module, name="toy")


def quantized(model: Model, **options: Any) -> Model:
    """``model`` with every matrix of its blocks, and its embedding, rounded by `quantize.rtn`."""
    lever = RTN(**options)
    for name, layer in list(model.module.named_modules()):
        if isinstance(layer, (torch.nn.Linear, torch.nn.Embedding)):
            anatomy.replace(model.module, name, lever.solve(Dense(layer.weight.detach()), NO_STATISTICS))
    return model


def draw(rows: int = 5, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


# blocks


@pytest.mark.parametrize("kind", GRIDS)
def test_the_options_of_a_grid_fill_its_blocks_bit_for_bit(kind: str) -> None:
    weight = RTN(**GRIDS[kind]).solve(Dense(draw()), NO_STATISTICS)  # type: ignore[arg-type]
    blocks = blocks_of(weight)
    assert isinstance(blocks, Blocks)
    assert blocks.kind.name == kind
    read = gguf.quants.dequantize(blocks.encode(), blocks.kind)
    assert np.array_equal(read, weight.dense().detach().numpy())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"bits": 4, "symmetric": True, "group_size": 64}, "Q4_0"),  # a scale for two blocks
        ({"bits": 4, "symmetric": True}, "Q4_0"),  # one for the whole row
        ({"bits": 4, "symmetric": True, "per_tensor": True}, "Q4_0"),
        ({"bits": 2, "symmetric": True, "group_size": 32}, "Q4_0"),
        ({"bits": 3, "zero_kind": "integer", "group_size": 32}, "Q4_0"),  # levels of -7 to 7
        ({"bits": 5, "zero_kind": "integer", "group_size": 32}, "Q8_0"),
        ({"bits": 3, "zero_kind": "float", "group_size": 32}, "Q4_1"),
        ({"bits": 6, "symmetric": True, "group_size": 32}, "Q8_0"),
        ({"bits": 7, "zero_kind": "integer", "group_size": 32}, "Q8_0"),
        ({"bits": 4, "format": "unsigned", "group_size": 32}, "Q4_1"),  # levels of 0 to 15 and a minimum of 0
    ],
)
def test_narrower_grids_fit_as_well(options: dict[str, Any], kind: str) -> None:
    matrix = draw().abs() if options.get("format") == "unsigned" else draw()
    weight = Quantized.nearest(matrix, **options)
    blocks = blocks_of(weight)
    assert isinstance(blocks, Blocks), blocks
    assert blocks.kind.name == kind
    assert np.array_equal(gguf.quants.dequantize(blocks.encode(), blocks.kind), weight.dense().detach().numpy())


def test_integer_zeros_of_4_bits_take_5_bits_and_no_rounding() -> None:
    weight = Quantized.nearest(draw() + 1.5, bits=4, group_size=32)  # far from symmetric: levels up to 15
    blocks = blocks_of(weight)
    assert isinstance(blocks, Blocks)
    assert blocks.kind in (Kind.Q4_1, Kind.Q5_0)
    assert np.array_equal(gguf.quants.dequantize(blocks.encode(), blocks.kind), weight.dense().detach().numpy())


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda: Quantized.nearest(draw(), bits=4, symmetric=True, group_size=48), "groups of 48"),
        (lambda: Quantized.nearest(draw(5, 40), bits=4, symmetric=True), "groups of 40"),
        (lambda: Quantized.nearest(draw(), bits=8, format="e4m3", group_size=32), "e4m3"),
        (lambda: Quantized.nearest(draw(), bits=8, zero_kind="float", group_size=32), "levels from 0 to 255"),
        (
            lambda: Quantized.nearest(draw(), bits=4, symmetric=True, group_size=32, scale_dtype=torch.float32),
            "16 bits do not hold its scales",
        ),
        (lambda: LowRank(draw(5, 2), draw(2, 96)), "LowRank"),
    ],
)
def test_what_no_block_holds_is_said(weight: Any, says: str) -> None:
    found = blocks_of(weight())
    assert isinstance(found, str)
    assert says in found


# GGUF


@pytest.mark.parametrize("kind", GRIDS)
def test_a_model_comes_back_from_gguf_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = quantized(toy(), **GRIDS[kind])
    found = pw.export(model, "gguf", tmp_path / "m.gguf")
    matrices = {name: held for name, held in found.kinds.items() if "norm" not in name}
    assert set(matrices.values()) == {kind}
    assert len(matrices) == 2 * 7 + 2
    assert (found.loss, found.bytes) == ({}, (tmp_path / "m.gguf").stat().st_size)
    back = load(tmp_path / "m.gguf").module
    for name, tensor in back.state_dict().items():
        layer = model.module.get_submodule(name.rpartition(".")[0])
        held: Any = layer.weight
        assert torch.equal(tensor, held.dense() if isinstance(held, Weight) else held), name
    torch.testing.assert_close(logits(back), logits(model.module))


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    model = quantized(toy(), **GRIDS["Q4_0"])
    pw.export(model, "gguf", tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    down = by_name["blk.1.ffn_down.weight"]
    held: Any = model.module.get_submodule("model.layers.1.mlp.down_proj").weight
    assert np.array_equal(gguf.quants.dequantize(down.data, down.tensor_type), held.dense().detach().numpy())
    # rows of a query head: the halves that transformers turns become neighboring pairs
    query = by_name["blk.0.attn_q.weight"]
    rows = gguf.quants.dequantize(query.data, query.tensor_type)
    ours: Any = model.module.get_submodule("model.layers.0.self_attn.q_proj").weight
    dense = ours.dense().detach().numpy()
    assert np.array_equal(rows[[0, 1, 2, 3, 16, 17]], dense[[0, 8, 1, 9, 16, 24]])
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["general.file_type"].contents() == 2


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_plain_models_lose_nothing(family: str, tmp_path: Path) -> None:
    model = of_module(families.build(family))
    found = pw.export(model, "gguf", tmp_path / "m.gguf")
    assert set(found.kinds.values()) == {"F32"}
    assert found.loss == {}
    assert ("output.weight" in found.kinds) == (family != "llama-tied")
    torch.testing.assert_close(logits(load(tmp_path / "m.gguf").module), logits(model.module))
    half = of_module(families.build(family).bfloat16())
    kinds = pw.export(half, "gguf", tmp_path / "half.gguf").kinds
    assert {kinds["token_embd.weight"], kinds["output_norm.weight"]} == {"BF16", "F32"}


def test_mistral_is_a_llama_and_its_window_is_refused(tmp_path: Path) -> None:
    module = families.build("mistral")
    module.config.sliding_window = 16
    with pytest.raises(ModelError, match="a sliding window of attention"):
        pw.export(of_module(module), "gguf", tmp_path / "m.gguf")
    module.config.sliding_window = None
    pw.export(of_module(module), "gguf", tmp_path / "m.gguf")
    torch.testing.assert_close(logits(load(tmp_path / "m.gguf").module), logits(module))


def test_llama_3_and_linear_scaling_come_back(tmp_path: Path) -> None:
    for rope in (
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    ):  # fmt: skip
        model = toy(rope_parameters=rope)
        pw.export(model, "gguf", tmp_path / "m.gguf", overwrite=True)
        torch.testing.assert_close(logits(load(tmp_path / "m.gguf").module), logits(model.module))
    with pytest.raises(ModelError, match="rotary scaling dynamic"):
        pw.export(toy(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "gguf", "m.gguf")


@pytest.mark.parametrize(("dtype", "most"), [("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 1e-2)])
def test_other_forms_are_rounded_only_when_asked_and_the_loss_is_said(dtype: str, most: float, tmp_path: Path) -> None:
    model = quantized(toy(), **GRIDS["Q4_0"])
    at = "model.layers.0.mlp.up_proj"
    weight = Sum(Quantized.nearest(draw(96, 64), bits=4, group_size=32), LowRank(draw(96, 2), draw(2, 64)))
    anatomy.replace(model.module, at, weight)
    with pytest.raises(ModelError, match=rf"{at}.* a Sum is no single grid of codes. Q4_0 holds 4-bit codes symmetric"):
        pw.export(model, "gguf", tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    found = pw.export(model, "gguf", tmp_path / "m.gguf", dtype=dtype)
    assert list(found.loss) == ["blk.0.ffn_up.weight"]
    assert found.kinds["blk.0.ffn_up.weight"] == dtype.upper()
    back = load(tmp_path / "m.gguf").module.get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    wanted = weight.dense().detach()
    off = float((back - wanted).norm() / wanted.norm())
    assert found.loss["blk.0.ffn_up.weight"] == pytest.approx(off, rel=1e-4)
    assert most / 20 < off < most
    assert "; 1 rounded" in found.words


# tokenizers


def trained(pre: pre_tokenizers.PreTokenizer, **options: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(documents(4), trainer)
    make: Any = PreTrainedTokenizerFast
    found: PreTrainedTokenizerFast = make(tokenizer_object=made, eos_token="<|end|>", bos_token="<|start|>", **options)
    return found


def test_a_tokenizer_comes_back_and_rows_without_a_token_are_filled(tmp_path: Path) -> None:
    model = toy(vocab_size=416)
    model.tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), chat_template="{{ messages }}")
    model.tokenizer.add_tokens(["<tool>"])
    pw.export(model, "gguf", tmp_path / "m.gguf")
    back = load(tmp_path / "m.gguf")
    assert back.tokenizer is not None
    for text in ("the year 1984, we'll\n", "a <tool> b<|end|>c", *documents(2)):
        assert back.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert (back.tokenizer.eos_token, back.tokenizer.chat_template) == ("<|end|>", "{{ messages }}")
    assert len(back.tokenizer) == 416


@pytest.mark.parametrize(
    ("pre", "says"),
    [
        (pre_tokenizers.Whitespace(), "splits text in none of the ways"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "splits text in none of the ways"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_say_is_refused(pre: Any, says: str, tmp_path: Path) -> None:
    model = toy(vocab_size=416)
    model.tokenizer = trained(pre)
    with pytest.raises(ModelError, match=says):
        pw.export(model, "gguf", tmp_path / "m.gguf")
    model = toy()
    model.tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    with pytest.raises(ModelError, match="token 399, its embedding 64 rows"):
        pw.export(model, "gguf", tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_comes_back_otherwise_is_refused(tmp_path: Path) -> None:
    model = toy(vocab_size=416)
    model.tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    from tokenizers.processors import TemplateProcessing

    end = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    model.tokenizer.backend_tokenizer.post_processor = end  # an end that the reader does not add
    with pytest.raises(ModelError, match="cannot be said exactly in GGUF"):
        pw.export(model, "gguf", tmp_path / "m.gguf")


@needs(assets.SMOLLM2)
def test_the_tokenizer_of_a_real_model() -> None:
    directory = assets.path("smollm2-135m")
    model = toy()
    model.tokenizer = AutoTokenizer.from_pretrained(directory)
    said = gguf_tokens.metadata(model, 49152)  # compared there on text and on every special token
    assert (said["tokenizer.ggml.pre"], said["tokenizer.ggml.add_bos_token"]) == ("smollm", False)
    assert said["tokenizer.ggml.token_type"][:3] == [3, 3, 3]


# safetensors


def test_stock_transformers_opens_a_plain_checkpoint(tmp_path: Path) -> None:
    model = quantized(toy(), bits=3, group_size=48)
    found = pw.export(model, "safetensors", tmp_path / "out")
    assert found.loss == {}
    assert found.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(stock), logits(model.module))
    half = pw.export(model, "safetensors", tmp_path / "half", dtype="bf16")
    assert set(half.kinds.values()) == {"bfloat16"}
    assert 1e-4 < max(half.loss.values()) < 4e-3
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert stock.dtype == torch.bfloat16
    for name, tensor in stock.state_dict().items():
        held: Any = model.module.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(tensor, (held.dense() if isinstance(held, Weight) else held).bfloat16()), name


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if not name.startswith("plain")])
def test_every_family_has_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    model = of_module(families.build(family))
    split_experts(model.module)
    for layer in model.anatomy.layers():
        matrix = anatomy.matrix(model.module, layer).detach().clone()
        anatomy.replace(model.module, layer.path, Quantized.nearest(matrix, bits=4))
    pw.export(model, "safetensors", tmp_path / "out")
    stock = load(tmp_path / "out").module
    torch.testing.assert_close(families.run(stock, family), families.run(model.module, family))


def test_biases_of_a_llama_turn_with_their_rows(tmp_path: Path) -> None:
    model = toy(attention_bias=True)
    pw.export(model, "gguf", tmp_path / "m.gguf")
    torch.testing.assert_close(logits(load(tmp_path / "m.gguf").module), logits(model.module))


def test_what_a_16_bit_model_rounds_of_its_compact_weights_is_said(tmp_path: Path) -> None:
    model = quantized(toy(), **GRIDS["Q8_0"])
    model.module.bfloat16()
    held: Any = model.module.get_submodule("model.layers.0.mlp.up_proj").weight
    found = pw.export(model, "safetensors", tmp_path / "out")
    wanted = held.dense().detach()
    off = float((wanted.bfloat16().float() - wanted).norm() / wanted.norm())
    assert found.loss["model.layers.0.mlp.up_proj.weight"] == pytest.approx(off)
    assert not any("norm" in name for name in found.loss)


# ONNX


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert", "bert-classifier", "vit", "convnext"])
def test_onnx_runtime_computes_what_torch_computes(family: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = of_module(families.build(family))
    for layer in model.anatomy.layers():
        matrix = anatomy.matrix(model.module, layer).detach().clone()
        anatomy.replace(model.module, layer.path, Quantized.nearest(matrix, bits=4))
    found = pw.export(model, "onnx", tmp_path / "m.onnx")
    assert found.loss == {}
    assert found.bytes == (tmp_path / "m.onnx").stat().st_size
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    given = families.inputs(family)
    if "input_ids" in given:  # a padded row, and more tokens than were traced
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][1, 17:] = 0
    (read,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    with torch.no_grad():
        wanted = model.module(**given)[0]
    torch.testing.assert_close(torch.from_numpy(read), wanted, rtol=1e-4, atol=1e-4)


def test_a_graph_that_holds_for_its_trace_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = toy()
    real = LlamaForCausalLM.forward

    def depends(self: Any, *args: Any, **options: Any) -> Any:
        found = real(self, *args, **options)
        found.logits = found.logits * float(options["input_ids"].sum())  # a number that tracing freezes
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", depends)
    with pytest.raises(ModelError, match=r"off by .* on 1 x 5 inputs"):
        pw.export(model, "onnx", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_what_onnx_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.onnx"
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    with pytest.raises(ModelError, match="a seq2seq is not written as ONNX"):
        pw.export(of_module(families.build("t5")), "onnx", out)
    with pytest.raises(ModelError, match="which expert a token takes"):
        pw.export(of_module(families.build("mixtral")), "onnx", out)
    with pytest.raises(OptionError, match="written in f32"):
        pw.export(toy(), "onnx", out, dtype="bf16")
    with pytest.raises(OptionError, match=r"ends in \.onnx"):
        pw.export(toy(), "onnx", tmp_path / "m")
    monkeypatch.setattr(onnx_out, "_MOST_BYTES", 200_000)
    with pytest.raises(ModelError, match="toy: 280 kB in float32 exceed the 2 GiB"):
        pw.export(toy(), "onnx", out)
    assert not list(tmp_path.iterdir())


# what cannot be kept


@pytest.mark.parametrize("format", ["gguf", "safetensors", "onnx"])
def test_what_plain_weights_cannot_say_is_refused_before_any_work(format: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    out = tmp_path / f"m.{format}"
    model = quantized(toy(), **GRIDS["Q8_0"])
    layer: Any = model.module.get_submodule("model.layers.0.mlp.up_proj")
    layer.activation = Activation(bits=8)
    with pytest.raises(ModelError, match="1 layers round their inputs"):
        pw.export(model, format, out)
    narrow = toy()
    narrow.module.get_submodule("model.layers.0.mlp").up_proj = torch.nn.Linear(64, 80, bias=False)
    with pytest.raises(ModelError, match=r"up_proj.weight is \(80, 64\), the configuration asks for \(96, 64\)"):
        pw.export(narrow, format, out)
    compact = quantized(narrow, **GRIDS["Q8_0"])
    with pytest.raises(ModelError, match=r"up_proj is \(80, 64\), the configuration asks for \(96, 64\)"):
        pw.export(compact, format, out)
    with pytest.raises(ModelError, match="needs a transformers model"):
        pw.export(of_module(torch.nn.Linear(3, 3)), format, out)
    with pytest.raises(OptionError, match="dtype 'q3'"):
        pw.export(toy(), format, out, dtype="q3")
    assert not list(tmp_path.iterdir())


def test_bad_places_and_families(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="format 'onnz'; give one of safetensors, gguf, onnx"):
        pw.export(toy(), "onnz", tmp_path)
    with pytest.raises(OptionError, match=r"ends in .gguf"):
        pw.export(toy(), "gguf", tmp_path / "m")
    with pytest.raises(ModelError, match=r"gpt2 .* is not written as GGUF"):
        pw.export(of_module(families.build("gpt2")), "gguf", tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        pw.export(toy(), "gguf", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pw.save(quantized(toy(), **GRIDS["Q5_1"]), tmp_path / "fitted")
    assert main(["export", str(tmp_path / "fitted"), "gguf", str(tmp_path / "m.gguf")]) == 0
    assert "16 Q5_1, 5 F32; every value as it was" in " ".join(capsys.readouterr().out.split())
    assert main(["export", str(tmp_path / "fitted"), "gguf", str(tmp_path / "m.gguf")]) == 2
    plain = ["export", str(tmp_path / "fitted"), "safetensors", str(tmp_path / "plain"), "--dtype", "bf16"]
    assert main(plain) == 0
    assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_llama_cpp_computes_what_we_compute(tmp_path: Path) -> None:
    engine: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = toy(vocab_size=416)
    model.tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    quantized(model, **GRIDS["Q8_0"])
    pw.export(model, "gguf", tmp_path / "m.gguf")
    runner = engine.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    runner.eval(IDS[0].tolist())
    found = torch.from_numpy(np.array(runner.scores[: IDS.shape[1]]))
    wanted = logits(model.module)[0]
    # llama.cpp rounds the inputs of every product to 8 bits
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
