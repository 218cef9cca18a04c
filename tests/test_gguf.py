"""GGUF files: written by the format's own library, read by ours, and the model in them against ``transformers``."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toys import documents
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pennyweight.errors import DataError, FormError, ModelError, PennyweightError
from pennyweight.model import gguf_tokenizer, load
from pennyweight.model.gguf_file import GgufFile

Fill = Callable[[gguf.GGUFWriter], None]
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


def write(path: Path, fill: Fill, family: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, family)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection in the order that llama files keep, as their converter makes it."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def model_file(path: Path, module: Any, family: str, kind: Kind = Kind.F32, extra: Fill | None = None) -> Path:
    """``module`` as a GGUF file; matrices in ``kind``."""
    config = module.config

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if getattr(config, "head_dim", None):
            writer.add_key_length(config.head_dim)
        for name, tensor in module.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            stem, _, end = name.rpartition(".")
            block = ""
            if stem.startswith("model.layers."):
                _, _, number, stem = stem.split(".", 3)
                block = f"blk.{number}."
            values = tensor.float().numpy()
            if family == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
                values = turned(values, heads)
            target = f"{block}{NAMES[stem]}.{end}"
            if values.ndim == 2 and kind is not Kind.F32:
                writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
            else:
                writer.add_tensor(target, np.ascontiguousarray(values))
        if extra is not None:
            extra(writer)

    return write(path, fill, family)


def toy(cls: Any = LlamaForCausalLM, config: Any = LlamaConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    module = cls(config(**{**TOY, "initializer_range": 0.2, **options})).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases start at 0, norms at 1: nothing would be tested
    return module


IDS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(3))


# values


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_values_are_what_was_quantized(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 96), dtype=np.float32)
    raw = gguf.quants.quantize(values, Kind[kind])
    path = write(tmp_path / "x.gguf", lambda w: w.add_tensor("x", raw, raw_dtype=Kind[kind]))
    read = GgufFile(path).read("x")
    assert read.shape == (6, 96)
    assert read.dtype is torch.float32
    np.testing.assert_array_equal(read.numpy(), gguf.quants.dequantize(raw, Kind[kind]))
    steps = {"F32": 1e12, "F16": 1e3, "BF16": 100, "Q8_0": 100, "Q5_0": 8, "Q5_1": 8, "Q4_0": 4, "Q4_1": 4}
    assert np.abs(read.numpy() - values).max() < np.abs(values).max() / steps[kind]


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_every_block_format_is_read_where_the_library_reads_it(kind: str, tmp_path: Path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = np.random.default_rng(0).integers(0, 60, (5, 2 * size), dtype=np.uint8)  # small bytes: finite scales

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("before", np.ones(3, dtype=np.float32))
        writer.add_tensor("x", raw, raw_dtype=Kind[kind])

    path = write(tmp_path / "x.gguf", fill)
    entry = next(t for t in gguf.GGUFReader(path).tensors if t.name == "x")
    expected = gguf.quants.dequantize(entry.data, entry.tensor_type)
    read = GgufFile(path).read("x")
    assert read.shape == (5, 2 * block)
    np.testing.assert_array_equal(read.numpy(), expected)


def test_metadata_are_what_was_written(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("a", 200)
        writer.add_int64("b", -(2**40))
        writer.add_float64("c", 0.1)
        writer.add_bool("d", True)
        writer.add_string("e", "größe")
        writer.add_array("f", [1, -2, 3])
        writer.add_array("g", ["x", "", "yz"])
        writer.add_custom_alignment(64)
        writer.add_tensor("t", np.arange(24, dtype=np.float32).reshape(2, 3, 4))

    file = GgufFile(write(tmp_path / "x.gguf", fill))
    found = {key: file.metadata[key] for key in "abcdefg"}
    assert found == {
        "a": 200, "b": -(2**40), "c": 0.1, "d": True, "e": "größe", "f": [1, -2, 3], "g": ["x", "", "yz"]
    }  # fmt: skip
    assert torch.equal(file.read("t"), torch.arange(24.0).reshape(2, 3, 4))
    with pytest.raises(ModelError, match=r"x\.gguf: holds no tensor 'u'; it has 1 others"):
        file.read("u")


# models


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_computes_what_transformers_computes(tmp_path: Path, tied: bool) -> None:
    module = toy(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    model = load(model_file(tmp_path / "toy.gguf", module, "llama"))
    assert (model.kind, model.name) == ("causal-lm", "toy")
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert (model.module.lm_head.weight is model.module.model.embed_tokens.weight) == tied
    assert torch.equal(model.module(IDS).logits, module(IDS).logits)


@pytest.mark.parametrize(
    ("cls", "config", "family"),
    [(Qwen2ForCausalLM, Qwen2Config, "qwen2"), (Qwen3ForCausalLM, Qwen3Config, "qwen3")],
)
def test_relatives_of_llama(cls: Any, config: Any, family: str, tmp_path: Path) -> None:
    module = toy(cls, config, tie_word_embeddings=False, **({"head_dim": 24} if family == "qwen3" else {}))
    model = load(model_file(tmp_path / "toy.gguf", module, family))
    assert type(model.module) is cls
    assert torch.equal(model.module(IDS).logits, module(IDS).logits)


def test_a_llama_with_attention_biases(tmp_path: Path) -> None:
    module = toy(attention_bias=True)
    with torch.no_grad():
        for block in module.model.layers:
            assert block.self_attn.q_proj.bias.abs().sum() > 0
    assert torch.equal(load(model_file(tmp_path / "t.gguf", module, "llama")).module(IDS).logits, module(IDS).logits)


def test_quantized_files_give_the_rounded_model(tmp_path: Path) -> None:
    module = toy()
    model = load(model_file(tmp_path / "toy.gguf", module, "llama", Kind.Q8_0))
    kept = module.model.layers[0].mlp.up_proj.weight.detach().numpy()
    rounded = gguf.quants.dequantize(gguf.quants.quantize(kept, Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_array_equal(model.module.model.layers[0].mlp.up_proj.weight.detach().numpy(), rounded)
    assert load(tmp_path / "toy.gguf", dtype=torch.bfloat16).module.dtype is torch.bfloat16


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_llama_3_scaling_is_found_in_its_divisors(tmp_path: Path) -> None:
    # long heads, so that all three bands of frequencies occur
    module = toy(rope_parameters=LLAMA3, head_dim=128, max_position_embeddings=16384)
    plain = 5e5 ** -(torch.arange(0, 128, 2).float() / 128)
    divisors = (plain / module.model.rotary_emb.inv_freq).numpy()
    assert 1 < np.unique(divisors.round(3)).size

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", divisors)

    model = load(model_file(tmp_path / "toy.gguf", module, "llama", extra=extra))
    assert model.config.rope_parameters["factor"] == pytest.approx(8.0)
    torch.testing.assert_close(model.module(IDS).logits, module(IDS).logits)

    def other(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 2, 64, dtype=np.float32))

    with pytest.raises(ModelError, match=r"does not follow the Llama 3\.1 rule"):
        load(model_file(tmp_path / "other.gguf", module, "llama", extra=other))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
def test_other_scalings(rope: dict[str, Any], tmp_path: Path) -> None:
    module = toy(rope_parameters=rope)

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    model = load(model_file(tmp_path / "toy.gguf", module, "llama", extra=extra))
    torch.testing.assert_close(model.module(IDS).logits, module(IDS).logits)


# tokenizers


def byte_level(pre: pre_tokenizers.PreTokenizer, **options: Any) -> Tokenizer:
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer = pre
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    # numbers often enough to be merged, where the way of splitting lets them
    text = "the year 1984, 20 % of 365 days, we'll\n\n  if x == y:\n" * 500
    made.train_from_iterator([*documents(4), text], trainer)
    return made


def tokenizer_file(path: Path, made: Tokenizer, pre: str, **flags: Any) -> Path:
    tokens = [made.id_to_token(index) for index in range(made.get_vocab_size())]
    state = json.loads(made.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges(merges)
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(1)
        if "add_bos" in flags:
            writer.add_add_bos_token(flags["add_bos"])
        if "chat" in flags:
            writer.add_chat_template(flags["chat"])

    return write(path, fill)


TEXTS = [
    "", " ", "the year 1984", "  two  spaces ", "tab\tand\nline\n\n", "we'll, I'M; don't", "größe, naïve 日本語 🙂",
    "if x == 12345:\n    return y  # 3.14159", "<|end|>after", "a<|start|>b <|end|>",
]  # fmt: skip


def test_byte_level_tokenizers_encode_as_the_one_they_were_written_from(tmp_path: Path) -> None:
    llama3 = gguf_tokenizer._LLAMA3
    kinds = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": gguf_tokenizer._split_by(llama3),
    }
    seen = set()
    for name, pre in kinds.items():
        made = byte_level(pre)
        found = gguf_tokenizer.tokenizer(GgufFile(tokenizer_file(tmp_path / f"{name}.gguf", made, name)))
        for text in TEXTS:
            assert found(text)["input_ids"] == made.encode(text).ids, (name, text)
            assert found.decode(found(text)["input_ids"]) == text
        seen.add(tuple(found("the year 1984 is 20 % of 365 we'll")["input_ids"]))
        assert (found.eos_token, found.bos_token) == ("<|end|>", "<|start|>")
    assert len(seen) == 3  # or the kinds would not be told apart at all


def test_beginning_of_text_and_chat_template(tmp_path: Path) -> None:
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    chat = "{% for m in messages %}<|start|>{{ m.content }}{% endfor %}"
    with_bos = tokenizer_file(tmp_path / "a.gguf", made, "gpt-2", add_bos=True, chat=chat)
    found = gguf_tokenizer.tokenizer(GgufFile(with_bos))
    assert found("the")["input_ids"] == [1, *made.encode("the").ids]
    assert found("the", add_special_tokens=False)["input_ids"] == made.encode("the").ids
    said = found.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|start|>hi"
    without = gguf_tokenizer.tokenizer(GgufFile(tokenizer_file(tmp_path / "b.gguf", made, "gpt-2", add_bos=False)))
    assert without("the")["input_ids"] == made.encode("the").ids


def merged_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece BPE the slow way: again and again, join the neighbors that make the token of the highest score."""
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        best = max(
            ((scores[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores),
            default=None,
        )
        if best is None:
            return parts
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_sentencepiece_tokenizers_merge_by_score(tmp_path: Path) -> None:
    g = random.Random(0)
    letters = ["\u2581", *"etaoinshr"]
    words = {f"{g.choice(letters)}{''.join(g.choices(letters[1:], k=g.randint(1, 4)))}" for _ in range(150)}
    # every prefix is a token, so that longer ones can be reached; lengths mixed, so that scores decide
    longer = sorted({word[:n] for word in words for n in range(2, len(word) + 1)})
    g.shuffle(longer)
    scores = dict.fromkeys(letters, -1e6) | {token: -float(rank) for rank, token in enumerate(longer)}
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *scores]

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(first) + list(scores.values()))
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(scores)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    found = gguf_tokenizer.tokenizer(GgufFile(write(tmp_path / "x.gguf", fill)))
    for _ in range(60):
        text = " ".join("".join(g.choices(letters[1:], k=g.randint(1, 9))) for _ in range(4))
        ids = found(text)["input_ids"]
        assert ids[0] == 1
        assert found.convert_ids_to_tokens(ids[1:]) == merged_by_score(text, scores)
        assert found.decode(ids[1:]) == text
    assert found.decode(found("é e", add_special_tokens=False)["input_ids"]) == "é e"  # through single bytes


@pytest.mark.parametrize(
    ("fill", "says"),
    [
        (lambda w: None, "no list of tokens"),
        (lambda w: w.add_token_list(["a", "a"]), "2 tokens, 1 different"),
        (lambda w: (w.add_token_list(["a", "b"]), w.add_tokenizer_model("rwkv")), "tokenizer model 'rwkv'"),
        (
            lambda w: (w.add_token_list(["a", "b"]), w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("who")),
            "pre-tokenizer 'who'; read are gpt-2, smollm",
        ),
        (
            lambda w: (
                w.add_token_list(["a", "b"]), w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("gpt-2"),
                w.add_token_merges(["x y"]),
            ),
            "merges do not fit its vocabulary",
        ),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_rebuilt_exactly_is_none(fill: Fill, says: str, tmp_path: Path) -> None:
    model = load(model_file(tmp_path / "toy.gguf", toy(), "llama", extra=fill))
    assert model.tokenizer is None
    with pytest.raises(DataError, match=says):
        model.need_tokenizer()


# damage


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    path = tokenizer_file(tmp_path_factory.mktemp("good") / "t.gguf", made, "gpt-2")
    fields = GgufFile(path).metadata

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(fields["tokenizer.ggml.tokens"])
        writer.add_token_merges(fields["tokenizer.ggml.merges"])

    small = toy(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    return model_file(path.parent / "good.gguf", small, "llama", extra=extra)


@pytest.mark.parametrize("keep", [0, 3, 8, 23, 24, 100, 0.1, 0.5, 0.9, -1])
def test_a_truncated_file_is_one_line(good: Path, tmp_path: Path, keep: float) -> None:
    raw = good.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=r"cut\.gguf: (damaged or truncated|cannot be read)"):
        load(path)


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [(0, b"GGML", "letters GGUF"), (4, b"\0\0\0\x03", "version 50331648"), (8, b"\xff" * 8, "damaged"),
     (16, b"\xff" * 8, "damaged")],
)  # fmt: skip
def test_a_wrong_head(good: Path, tmp_path: Path, at: int, value: bytes, says: str) -> None:
    raw = bytearray(good.read_bytes())
    raw[at : at + len(value)] = value
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(ModelError, match=says):
        load(tmp_path / "x.gguf")


def test_promises_of_endless_arrays_cost_nothing(tmp_path: Path) -> None:
    for inner in (4, 8, 9):  # numbers, strings, arrays
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
        (tmp_path / "x.gguf").write_bytes(head + struct.pack("<IIQ", 9, inner, 2**62) + b"\0" * 64)
        with pytest.raises(ModelError, match="damaged or truncated"):
            GgufFile(tmp_path / "x.gguf")


def test_what_is_no_model_of_ours_is_said_so(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", lambda w: w.add_tensor("t", np.ones(3, dtype=np.float32)), "whisper")
    with pytest.raises(ModelError, match="architecture 'whisper'; read are llama, qwen2, qwen3"):
        load(path)
    path = write(tmp_path / "y.gguf", lambda w: w.add_tensor("t", np.ones(3, dtype=np.float32)))
    with pytest.raises(ModelError, match=r"metadata llama\.embedding_length = None; a positive number is needed"):
        load(path)
    path = model_file(tmp_path / "z.gguf", toy(), "llama", extra=lambda w: w.add_expert_count(8))
    with pytest.raises(ModelError, match="mixture of experts"):
        load(path)
    strange = model_file(
        tmp_path / "s.gguf", toy(), "llama", extra=lambda w: w.add_tensor("blk.0.what.weight", np.ones(3, np.float32))
    )
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.what\.weight' has no place in a llama model"):
        load(strange)


def test_nan_and_missing_tensors_are_named(tmp_path: Path) -> None:
    module = toy()
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FormError, match=r"nan\.gguf: model\.layers\.1\.mlp\.down_proj\.weight: 1 of"):
        load(model_file(tmp_path / "nan.gguf", module, "llama"))
    short = toy(num_hidden_layers=1)
    short.config.num_hidden_layers = 2**30  # must be seen before a billion blocks are built
    with pytest.raises(ModelError, match=r"blk\.1073741823\.ffn_norm\.weight is missing, the metadata ask for \(64,\)"):
        load(model_file(tmp_path / "short.gguf", short, "llama"))
    module = toy()
    del module.model.layers[1].self_attn.v_proj.weight
    with pytest.raises(ModelError, match=r"1 tensors are missing, the first is model\.layers\.1\.self_attn\.v_proj"):
        load(model_file(tmp_path / "holes.gguf", module, "llama"))


@limits(max_examples=120)
@given(data=st.data())
def test_any_damage_is_one_of_our_errors(data: st.DataObject, good: Path) -> None:
    raw = bytearray(good.read_bytes())
    head = min(len(raw), 6000)  # nearly all that is read as structure lies there
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, 200), st.integers(0, head - 9)))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            raw[at : at + 8] = struct.pack("<q", data.draw(st.integers(-(2**63), 2**63 - 1)))
    if data.draw(st.integers(0, 5)) == 0:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path = good.parent / "fuzzed.gguf"
    path.write_bytes(bytes(raw))
    try:
        model = load(path)
    except PennyweightError as error:
        assert "\n" not in str(error)  # noqa: PT017 - an error is one good end of two
    else:
        assert model.tokenizer is not None or model.no_tokenizer
