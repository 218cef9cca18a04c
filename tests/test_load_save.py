"""Models in and out: what is loaded, what is refused, and that what is saved comes back bit by bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from families import PlainConv, build, inputs, run
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import nn
from toys import llama, tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from pennyweight import safe_write
from pennyweight.errors import DataError, FormError, ModelError, OutputError, PennyweightError
from pennyweight.model import (
    Checkpoint,
    anatomy,
    bf16_bytes,
    compact,
    file_bytes,
    load,
    parameters,
    restore,
    safetensors_file,
    save,
    saved_bytes,
)
from pennyweight.model.experts import SplitExperts, split_experts
from pennyweight.model.loading import of_module
from pennyweight.model.model import kind_of
from pennyweight.weights import Dense, LowRank, Product, Quantized, Sparse, Sum, Weight

Solve = Callable[[torch.Tensor], Weight]
SOLVERS: dict[str, Solve] = {
    "dense": Dense,
    "low rank": lambda m: LowRank.nearest(m, rank=2),
    "rounded plus low rank": lambda m: Sum(Quantized.nearest(m, bits=3, group_size=8), LowRank.nearest(m, rank=1)),
    "double": lambda m: Quantized.nearest(m, bits=4, group_size=8, zero_kind="float", scale_dtype=torch.bfloat16),
    "8-bit float": lambda m: Quantized.nearest(m, bits=8, format="e4m3"),
    "product": lambda m: Product(Dense(m[:, :4]), Dense(m[:4, :])),
    "sparse": lambda m: Sparse.keep(m, m > 0),
}


def compress(module: nn.Module, solve: Solve) -> nn.Module:
    """``module`` with every layer that can be replaced replaced by what ``solve`` makes of its matrix."""
    found = anatomy.of(module)
    for layer in found.layers():
        anatomy.replace(module, layer.path, solve(anatomy.matrix(module, layer).clone()))
    return module


def rounded(matrix: torch.Tensor) -> Weight:
    return Quantized.nearest(matrix, bits=4, group_size=8)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("toy") / "toy-llama")


@pytest.fixture
def mine(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy to damage."""
    return Path(shutil.copytree(toy, tmp_path / "toy-llama"))


# loading


def test_a_directory_loads_as_transformers_loads_it(toy: Path) -> None:
    model = load(toy)
    reference = AutoModelForCausalLM.from_pretrained(toy)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.module(ids).logits, reference(ids).logits)
    assert (model.name, model.kind, model.module.training) == ("toy-llama", "causal-lm", False)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert model.need_tokenizer()("Abc")["input_ids"] == tokenizer()("Abc")["input_ids"]


def test_dtype_is_that_of_the_parameters(toy: Path) -> None:
    assert {p.dtype for p in load(toy).module.parameters()} == {torch.float32}
    assert {p.dtype for p in load(toy, dtype=torch.bfloat16).module.parameters()} == {torch.bfloat16}


def test_a_module_is_taken_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    model = load(module, name="mine")
    assert model.module is module
    assert not module.training
    assert (model.kind, model.name, model.tokenizer, model.config) == ("module", "mine", None, None)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForCausalLM", "causal-lm"), ("GPT2LMHeadModel", "causal-lm"), ("BertForMaskedLM", "masked-lm"),
        ("BertModel", "encoder"), ("T5ForConditionalGeneration", "seq2seq"), ("ViTForImageClassification",
        "image-classifier"), ("DeiTForImageClassificationWithTeacher", "image-classifier"), ("Sequential", "module"),
    ],
)  # fmt: skip
def test_kinds_are_told_by_the_class(architecture: str, kind: str) -> None:
    assert kind_of(architecture) == kind


def test_shards_are_one_checkpoint(toy: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(toy).save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) > 1
    whole = Checkpoint(toy)
    assert checkpoint.names() == whole.names()
    for name in checkpoint.names():
        assert torch.equal(checkpoint.read(name), whole.read(name))
        assert checkpoint.shape(name) == tuple(whole.read(name).shape)
        assert checkpoint.dtype(name) is torch.float32
    assert load(tmp_path).fingerprint == load(toy).fingerprint


def test_the_hub_cache_is_read_and_nothing_is_fetched(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    at = tmp_path / "models--penny--toy"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(toy, at / "snapshots" / commit)
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text(commit)
    assert load("penny/toy").fingerprint == load(toy).fingerprint
    with pytest.raises(ModelError, match=r"penny/other: no such asset \(smollm2-135m.*nothing is fetched"):
        load("penny/other")


@pytest.mark.parametrize("name", ["no-such-thing", "a b c", "", "x/y/z", "../..//nothing"])
def test_what_is_nowhere_is_said_so(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such|not a model|holds no config"):
        load(name)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="not a model; give a directory"):
        load(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)


def test_pickles_are_never_read(mine: Path) -> None:
    (mine / "model.safetensors").unlink()
    torch.save({}, mine / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle, which is never loaded"):
        load(mine)
    (mine / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        load(mine)


def test_nan_is_refused_by_name(mine: Path) -> None:
    tensors = safetensors.torch.load_file(mine / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    safetensors.torch.save_file(tensors, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 10240 values are NaN"):
        load(mine)


def test_missing_and_misshapen_tensors_are_named(mine: Path) -> None:
    tensors = safetensors.torch.load_file(mine / "model.safetensors")
    taken = tensors.pop("model.layers.0.mlp.up_proj.weight")
    safetensors.torch.save_file(tensors, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing, the first is model\.layers\.0\.mlp\.up_proj"):
        load(mine)
    tensors["model.layers.0.mlp.up_proj.weight"] = taken[:7].clone()
    safetensors.torch.save_file(tensors, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be built|asks for"):
        load(mine)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[1]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": "never-heard-of"}', "knows no model type 'never-heard-of'"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "already quantized with 'gptq'"),
        ('{"model_type": "llama", "hidden_size": "many"}', r"config\.json"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}', r"config\.json|cannot be built"),
        ('{"model_type": ["llama"]}', "model_type"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "asks for 1000000000 blocks, the files hold"),
        ('{"model_type": "llama", "quantization_config": 3}', "already quantized with 3"),
    ],
)
def test_damaged_configurations(mine: Path, text: str, says: str) -> None:
    (mine / "config.json").write_text(text)
    with pytest.raises(ModelError, match=says):
        load(mine)


def test_without_a_tokenizer_only_text_is_refused(mine: Path) -> None:
    for file in mine.glob("tokenizer*"):
        file.unlink()
    model = load(mine)
    assert model.tokenizer is None
    with pytest.raises(DataError, match=r"toy-llama: text needs a tokenizer, and .* holds none \(no tokenizer\.json\)"):
        model.need_tokenizer()
    (mine / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load(mine).need_tokenizer()


# the format


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=g), "a": torch.randn(7, generator=g).to(torch.bfloat16),
        "c": torch.arange(11, dtype=torch.uint8), "d": torch.tensor(True), "e": torch.empty(0, 3),
        "ü.f": torch.randn(4, generator=g).to(torch.float8_e4m3fn), "g": torch.randn(4, 4, generator=g).T,
    }  # fmt: skip
    header = safetensors_file.write(tmp_path / "ours.safetensors", tensors)
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys() == header.entries.keys()
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs.safetensors")
    back = safetensors_file.read_header(tmp_path / "theirs.safetensors")
    for name, tensor in tensors.items():
        read = safetensors_file.read_tensor(tmp_path / "theirs.safetensors", back.entries[name])
        for found in (theirs[name], read):
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.float(), tensor.float())


def test_a_complex_tensor_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x: dtype torch\.complex64 cannot be stored"):
        safetensors_file.write(tmp_path / "x.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_a_truncated_file_is_named(mine: Path, keep: int) -> None:
    raw = (mine / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(raw[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        load(mine)


@pytest.mark.parametrize("more", [-40, 7])
def test_a_wrong_length_is_seen_before_anything_is_read(mine: Path, more: int) -> None:
    raw = (mine / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(raw[:more] if more < 0 else raw + b"x" * more)
    with pytest.raises(ModelError, match=rf"the header describes {len(raw)} bytes, the file has {len(raw) + more}"):
        Checkpoint(mine)


def test_a_file_cut_while_it_is_read(mine: Path) -> None:
    checkpoint = Checkpoint(mine)
    raw = (mine / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(raw[:-40])
    with pytest.raises(ModelError, match="truncated while being read"):
        _ = [checkpoint.read(name) for name in checkpoint.names()]


@pytest.mark.parametrize(
    "index",
    ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "no"}}'],
)
def test_a_damaged_index(mine: Path, index: str) -> None:
    (mine / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError):
        Checkpoint(mine)


@limits(max_examples=300)
@given(data=st.data())
def test_any_damage_to_safetensors_is_one_of_our_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    safetensors_file.write(path, {"a.weight": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "number"])):
            case "flip":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 30))]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "number":
                raw = bytearray(raw.replace(b"12", str(data.draw(st.integers(-(2**70), 2**70))).encode(), 1))
        if not raw:
            break
    path.write_bytes(bytes(raw))
    try:
        for entry in safetensors_file.read_header(path).entries.values():
            safetensors_file.read_tensor(path, entry)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017 - an error is one good end of two


# saving


@pytest.mark.parametrize("solver", SOLVERS)
def test_compact_layers_come_back_bit_by_bit(toy: Path, tmp_path: Path, solver: str) -> None:
    model = load(toy)
    compress(model.module, SOLVERS[solver])
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model.module(ids).logits
    saved = save(model, tmp_path / "out")
    assert saved.bytes == saved_bytes(tmp_path / "out") == file_bytes(model)
    assert saved.bytes == sum((tmp_path / "out" / f).stat().st_size for f in ("model.safetensors", "weights.json"))
    again = load(tmp_path / "out")
    assert again.fingerprint == model.fingerprint  # every bit; a product may still differ with the memory layout
    torch.testing.assert_close(again.module(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert again.module.lm_head.weight is again.module.model.embed_tokens.weight
    assert again.need_tokenizer()("Abc")["input_ids"] == tokenizer()("Abc")["input_ids"]
    # and a second time over, from what was loaded
    assert save(again, tmp_path / "more").bytes == saved.bytes
    first, second = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("out", "more"))
    assert first == second


FAMILIES = ["llama", "gemma3", "gpt2", "opt", "bert", "t5", "vit", "convnext", "resnet", "deepseek-v2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives_compact_and_dense(family: str, tmp_path: Path) -> None:
    module = compress(build(family), rounded)
    expected = run(module, family)
    model = of_module(module)
    assert save(model, tmp_path / "compact").bytes == file_bytes(model)
    again = load(tmp_path / "compact")
    assert torch.equal(run(again.module, family), expected)
    assert again.fingerprint == model.fingerprint
    save(model, tmp_path / "dense", dense=True)
    assert not (tmp_path / "dense" / "weights.json").exists()
    reference = type(module).from_pretrained(tmp_path / "dense")
    assert compact.compact_layers(reference) == {}
    torch.testing.assert_close(run(reference.eval(), family), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_split_experts_come_back_split_and_go_out_stacked(family: str, tmp_path: Path) -> None:
    module = build(family)
    original = run(module, family)
    save(of_module(module), tmp_path / "stacked")
    torch.testing.assert_close(run(load(tmp_path / "stacked").module, family), original)
    split_experts(module)
    paths = [layer.path for layer in anatomy.of(module).layers()]
    compressed = [path for path in paths if "down_proj" in path or "q_proj" in path]  # the others stay dense
    for layer in anatomy.of(module).layers():
        if layer.path in compressed:
            anatomy.replace(module, layer.path, rounded(anatomy.matrix(module, layer)))
    expected = run(module, family)
    save(of_module(module), tmp_path / "compact")
    again = load(tmp_path / "compact").module
    assert any(isinstance(part, SplitExperts) for part in again.modules())
    assert torch.equal(run(again, family), expected)
    through = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    assert torch.equal(run(through, family), expected)
    save(of_module(module), tmp_path / "dense", dense=True)
    torch.testing.assert_close(run(load(tmp_path / "dense").module, family), expected, rtol=1e-4, atol=1e-5)


def test_a_plain_module_is_restored_into_a_fresh_one(tmp_path: Path) -> None:
    module = compress(build("plain-conv"), lambda m: LowRank.nearest(m, rank=2))
    expected = run(module, "plain-conv")
    model = of_module(module)
    assert save(model, tmp_path / "out").bytes == file_bytes(model)
    fresh = PlainConv().eval()
    assert torch.equal(run(restore(fresh, tmp_path / "out").module, "plain-conv"), expected)
    with pytest.raises(ModelError, match="the model has no layer stem"):
        restore(nn.Sequential(nn.Linear(3, 3)), tmp_path / "out")
    save(model, tmp_path / "dense", dense=True)
    dense = PlainConv().eval()
    dense.load_state_dict(safetensors.torch.load_file(tmp_path / "dense" / "model.safetensors"))
    torch.testing.assert_close(run(dense, "plain-conv"), expected, rtol=1e-4, atol=1e-5)


def test_the_rest_is_narrowed_only_where_that_is_exact(toy: Path, tmp_path: Path) -> None:
    model = load(toy)
    odd = model.module.model.norm.weight
    with torch.no_grad():
        odd[0] = 1 + 2**-20  # neither bfloat16 nor float16 holds it
        model.module.model.layers[0].input_layernorm.weight[0] = 1 + 2**-10  # float16 does
    save(model, tmp_path / "exact")
    kept = Checkpoint(tmp_path / "exact")
    assert kept.dtype("model.norm.weight") is torch.float32
    assert kept.dtype("model.layers.0.input_layernorm.weight") is torch.float16
    assert kept.dtype("model.layers.1.input_layernorm.weight") is torch.bfloat16
    assert load(tmp_path / "exact").fingerprint == model.fingerprint
    save(model, tmp_path / "asked", dtype=torch.bfloat16)
    assert {Checkpoint(tmp_path / "asked").dtype(n) for n in kept.names()} == {torch.bfloat16}
    assert saved_bytes(tmp_path / "asked") == file_bytes(model, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "asked" / "config.json").read_text())["dtype"] == "bfloat16"


def test_reference_size_counts_tied_tensors_once(toy: Path) -> None:
    module = load(toy).module
    counted = sum(tensor.numel() for tensor in set(module.parameters()))
    assert bf16_bytes(module) == 2 * counted
    assert parameters(compress(module, rounded)) == counted  # what the compact layers stand for


def test_weights_shared_by_layers_are_stored_once(tmp_path: Path) -> None:
    module = build("llama")
    shared = Dense(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)))
    anatomy.replace(module, "model.layers.0.mlp.up_proj", shared)
    anatomy.replace(module, "model.layers.1.mlp.up_proj", shared)
    low, high = torch.randn(48, 2), torch.randn(2, 32)
    anatomy.replace(module, "model.layers.0.mlp.gate_proj", LowRank(low, high))
    anatomy.replace(module, "model.layers.1.mlp.gate_proj", LowRank(2 * low, high))  # only a part is shared
    save(of_module(module), tmp_path / "out")
    names = Checkpoint(tmp_path / "out").names()
    assert "model.layers.1.mlp.up_proj.weight.matrix" not in names
    assert "model.layers.1.mlp.gate_proj.weight.down" not in names
    again = load(tmp_path / "out").module
    assert torch.equal(run(again, "llama"), run(module, "llama"))
    assert again.model.layers[0].mlp.up_proj.weight is again.model.layers[1].mlp.up_proj.weight
    one, two = (again.model.layers[i].mlp.gate_proj.weight.down for i in (0, 1))
    assert one.data_ptr() == two.data_ptr()


def test_nan_is_not_saved(toy: Path, tmp_path: Path) -> None:
    model = load(toy)
    with torch.no_grad():
        model.module.model.norm.weight[2] = float("inf")
    with pytest.raises(FormError, match=r"toy-llama: model\.norm\.weight: 1 of 64"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# transformers opens it


CHILD = """
import sys
{before}
import torch
from transformers import AutoModelForCausalLM
{after}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(12)[None]
torch.save(model(ids).logits, sys.argv[2])
"""


def child(directory: Path, *, before: str = "", after: str = "") -> tuple[subprocess.CompletedProcess[str], Path]:
    """Open ``directory`` with transformers alone in another process; the logits it got are in the file returned."""
    out = directory.parent / f"{directory.name}.logits"
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(before=before, after=after), str(directory), str(out)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=120,
    )  # fmt: skip
    return done, out


def test_transformers_alone_opens_dense_and_refuses_compact(toy: Path, tmp_path: Path) -> None:
    model = load(toy)
    compress(model.module, rounded)
    expected = model.module(torch.arange(12)[None]).logits
    save(model, tmp_path / "dense", dense=True)
    done, out = child(tmp_path / "dense", before="sys.modules['pennyweight'] = None")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(out), expected, rtol=1e-5, atol=1e-5)
    save(model, tmp_path / "compact")
    done, _ = child(tmp_path / "compact", before="sys.modules['pennyweight'] = None")
    assert done.returncode != 0, "random numbers in place of the missing weights, and nobody noticed"
    assert "ignore_mismatched_sizes" in done.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_transformers_opens_compact_once_pennyweight_is_imported(toy: Path, tmp_path: Path, place: str) -> None:
    model = load(toy)
    compress(model.module, rounded)
    save(model, tmp_path / "compact")
    asserted = "assert 'torch' not in sys.modules" if place == "before" else ""
    done, out = child(tmp_path / "compact", **{place: f"import pennyweight\n{asserted}"})
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(out), model.module(torch.arange(12)[None]).logits)


def test_the_bare_model_and_the_one_with_a_head_open_the_same_directory(tmp_path: Path) -> None:
    module = compress(build("bert"), rounded)
    save(of_module(module), tmp_path / "out")
    given_ids = inputs("bert")
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path / "out")(**given_ids).logits, run(module, "bert"))
    bare = AutoModel.from_pretrained(tmp_path / "out")
    assert compact.compact_layers(bare)
    expected = module.bert(**given_ids).last_hidden_state
    assert torch.equal(bare(**given_ids).last_hidden_state, expected)


def test_a_loaded_compact_model_can_be_tied_generated_from_and_trained(toy: Path, tmp_path: Path) -> None:
    model = load(toy)
    compress(model.module, lambda m: LowRank.nearest(m, rank=8))
    save(model, tmp_path / "out")
    module = load(tmp_path / "out").module
    module.tie_weights()  # transformers calls this on many occasions; there is nothing left for it to do
    assert module.lm_head.weight is module.model.embed_tokens.weight
    ids = torch.arange(12)[None]
    assert module.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids)).shape == (1, 15)
    module(ids, labels=ids).loss.backward()
    assert module.model.layers[0].mlp.up_proj.weight.up.grad.abs().sum() > 0
    assert not hasattr(module.config, "quantization_config")
    assert not hasattr(module, "hf_quantizer")


# damaged weights.json


@pytest.fixture(scope="module")
def packed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load(toy)
    compress(model.module, rounded)
    out = tmp_path_factory.mktemp("packed") / "out"
    save(model, out)
    return out


def test_files_of_two_runs_are_not_mixed(packed: Path, toy: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(packed, tmp_path / "mixed"))
    model = load(toy)
    compress(model.module, SOLVERS["low rank"])
    save(model, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "weights.json", mixed / "weights.json")
    with pytest.raises(ModelError, match=r"belongs to another model\.safetensors"):
        load(mixed)
    (mixed / "weights.json").unlink()
    with pytest.raises(ModelError, match=r"weights\.json: missing"):
        load(mixed)


def test_a_newer_version_says_what_to_do(packed: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(packed, tmp_path / "newer"))
    found = json.loads((newer / "weights.json").read_text())
    (newer / "weights.json").write_text(json.dumps(found | {"version": 99}))
    with pytest.raises(ModelError, match="version 99; this Pennyweight reads up to 1; upgrade it"):
        load(newer)


@limits(max_examples=150)
@given(data=st.data())
def test_any_damage_to_weights_json_is_one_of_our_errors(data: st.DataObject, packed: Path) -> None:
    checkpoint = Checkpoint(packed)
    found = json.loads((packed / "weights.json").read_text())
    junk = st.one_of(st.none(), st.integers(-3, 2**40), st.text(max_size=5), st.lists(st.integers(), max_size=2))
    # walk down to a random value, and spoil it
    place, key = found, data.draw(st.sampled_from(sorted(found)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.integers(0, 4)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    if isinstance(place[key], list) and place[key] and isinstance(place[key][0], dict):
        place = place[key][data.draw(st.integers(0, len(place[key]) - 1))]
        key = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()):
        place[key] = data.draw(junk)
    else:
        del place[key]
    spoiled = packed.parent / "spoiled.json"
    spoiled.write_text(json.dumps(found))
    module = AutoModelForCausalLM.from_config(load_config(packed))
    original = compact.WEIGHTS
    try:
        compact.WEIGHTS = "../spoiled.json"  # type: ignore[misc]
        overlay = compact.Overlay(checkpoint, compact.read_layout(checkpoint))
        overlay.strip(module)
        overlay.attach(module)
        overlay.rest()
    except PennyweightError as error:
        assert "\n" not in str(error)  # noqa: PT017 - an error is one good end of two
    finally:
        compact.WEIGHTS = original  # type: ignore[misc]


def load_config(directory: Path) -> object:
    from pennyweight.model.loading import read_config

    config = read_config(directory)
    del config.quantization_config
    return config


# places that cannot be written


def test_results_are_not_overwritten_unless_asked(toy: Path, tmp_path: Path) -> None:
    model, out = load(toy), tmp_path / "out"
    out.mkdir()
    save(model, out)  # an empty directory is fine
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match=r"already holds \d+ entries .*give an empty directory, or overwrite"):
        save(model, out)
    (out / "notes.txt").write_text("mine")
    (out / "receipt.json").write_text("of the former run")
    compress(model.module, rounded)
    save(model, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "receipt.json").exists()
    assert compact.compact_layers(load(out).module)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_what_stood_there(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    model, out = load(toy), tmp_path / "out"
    if overwrite:
        save(model, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()} if overwrite else None

    def full(file: object, tensors: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_file, "_write_all", full)
    with pytest.raises(OutputError, match=r"out: the disk is full \([\d.]+ MB free\); free some space"):
        save(model, out, overwrite=overwrite)
    assert ({p.name: p.read_bytes() for p in out.iterdir()} if out.exists() else None) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])


def test_places_that_cannot_be_written(toy: Path, tmp_path: Path) -> None:
    model = load(toy)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file stands where a directory is needed"):
        save(model, tmp_path / "file")
    with pytest.raises(OutputError, match="a file stands where a directory is needed"):
        save(model, tmp_path / "file" / "below")
    with pytest.raises(OutputError, match=r"/proc/pennyweight: .*cannot be written|no space"):
        safe_write.check_free("/proc/pennyweight")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safe_write.write_text(tmp_path / "a" / "x.json", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        safe_write.write_text(tmp_path / "a" / "x.json", "new")
    assert [(p.name, p.read_text()) for p in (tmp_path / "a").iterdir()] == [("x.json", "old")]


def test_without_an_atomic_exchange_directories_are_still_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "other")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    (tmp_path / "out" / "mine").mkdir()
    with safe_write.staged(tmp_path / "out", overwrite=True) as aside:
        (aside / "config.json").write_text("new")
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "mine"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# the front door


FRONT = """
import sys, pennyweight as pw
assert 'torch' not in sys.modules and 'transformers' not in sys.modules
assert callable(pw.levers) and pw.levers()[0].name
import pennyweight.levers.quantize
assert pw.levers.quantize and callable(pw.levers)
from pennyweight import load
assert pw.load is load
for name in pw.__all__:
    assert name in dir(pw)
try:
    pw.nothing
except AttributeError as error:
    assert "'pennyweight' has no attribute 'nothing'" in str(error)
else:
    raise AssertionError
"""


def test_importing_pennyweight_is_cheap_and_verbs_are_rooms_too() -> None:
    done = subprocess.run([sys.executable, "-c", FRONT], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
