"""A decoder read from a GGUF file: configuration, state dict and tokenizer as ``transformers`` has them.

Families: ``llama`` (which Mistral and SmolLM files call themselves too), ``qwen2`` and ``qwen3``.

Shape letters: H query heads, K key/value heads, D head size, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from pennyweight.errors import ModelError
from pennyweight.model.gguf_file import GgufFile

CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def config(file: GgufFile) -> PreTrainedConfig:
    """The configuration that the metadata of ``file`` states.

    Raises:
        ModelError: another family, a mixture of experts, or metadata missing or out of range.
    """
    family = file.metadata.get("general.architecture")
    if family not in CONFIGS:
        raise ModelError(f"{file.path}: architecture {family!r}; read are {', '.join(CONFIGS)}")
    if file.metadata.get(f"{family}.expert_count"):
        raise ModelError(f"{file.path}: a mixture of experts; give its safetensors checkpoint instead")

    def count(key: str) -> int:
        return int(file.need(f"{family}.{key}", lambda v: isinstance(v, int) and 0 < v < 2**31, "a positive number"))

    def real(key: str) -> float:
        words = "a positive number"
        value = file.need(f"{family}.{key}", lambda v: isinstance(v, (int, float)) and 0 < v < np.inf, words)
        return float(str(np.float32(value)))  # stored as float32: 9.99999974e-06 was written as 1e-05

    width, heads = count("embedding_length"), count("attention.head_count")
    kv_heads = count("attention.head_count_kv") if f"{family}.attention.head_count_kv" in file.metadata else heads
    head_dim = count("attention.key_length") if f"{family}.attention.key_length" in file.metadata else width // heads
    rotated = file.metadata.get(f"{family}.rope.dimension_count", head_dim)
    if heads % kv_heads or head_dim < 2 or head_dim % 2 or rotated != head_dim:
        raise ModelError(
            f"{file.path}: {heads} heads, {kv_heads} key/value heads of {head_dim} and {rotated} rotated dimensions "
            "make no attention that this reader knows"
        )
    if "token_embd.weight" not in file.entries:
        raise ModelError(f"{file.path}: holds no token_embd.weight; this is not a whole model")
    theta = real("rope.freq_base") if f"{family}.rope.freq_base" in file.metadata else 10000.0
    made: PreTrainedConfig = CONFIGS[family](
        vocab_size=file.entries["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=count("feed_forward_length"),
        num_hidden_layers=count("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=count("context_length"),
        rms_norm_eps=real("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(file, str(family), theta, head_dim),
        tie_word_embeddings="output.weight" not in file.entries,
        attention_bias="blk.0.attn_q.bias" in file.entries,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.metadata.get("tokenizer.ggml.padding_token_id"),
        architectures=[CONFIGS[family].__name__.replace("Config", "ForCausalLM")],
        dtype="float32",
    )
    return made


def _rope(file: GgufFile, family: str, theta: float, head_dim: int) -> dict[str, Any]:
    kind = file.metadata.get(f"{family}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.entries:
        return _llama3_rope(file, theta, head_dim)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = file.metadata.get(f"{family}.rope.scaling.factor")
    original = file.metadata.get(f"{family}.rope.scaling.original_context_length")
    if kind == "linear" and factor:
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(factor)}
    if kind == "yarn" and factor and original:
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": float(factor),
            "original_max_position_embeddings": int(original),
        }
    raise ModelError(f"{file.path}: rotary scaling {kind!r} is not read; none, linear and yarn are")


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1 scaling: the file holds the divisors of the frequencies only; find the settings that give them."""
    divisors = file.read("rope_freqs.weight").double().reshape(-1)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    frequency = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    turns = original * frequency / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise ModelError(f"{file.path}: rope_freqs.weight does not follow the Llama 3.1 rule; nothing else is read")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def tensors(file: GgufFile, made: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in float32 under its ``transformers`` name, one at a time.

    Raises:
        ModelError: a tensor that this reader does not know.
    """
    for name in file.entries:
        if name != "rope_freqs.weight":  # read by `config`
            yield target(file, name), _unpermuted(file.read(name), name, made)


def target(file: GgufFile, name: str) -> str:
    """The ``transformers`` name of tensor ``name``."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, block, part = [*stem.split(".", 2), "", ""][:3]
        if part in _INSIDE and block.isdigit():
            return f"model.layers.{block}.{_INSIDE[part]}.{kind}"
    elif stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    raise ModelError(f"{file.path}: tensor {name!r} has no place in a {file.metadata['general.architecture']} model")


def _unpermuted(tensor: Tensor, name: str, made: PreTrainedConfig) -> Tensor:
    """Undo the row order llama files keep: ``transformers`` turns halves of a head, llama.cpp neighboring pairs."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if made.model_type != "llama" or part not in ("attn_q", "attn_k"):
        return tensor
    heads = made.num_attention_heads if part == "attn_q" else made.num_key_value_heads
    if tensor.shape[0] % (2 * heads):
        raise ModelError(f"GGUF tensor {name}: {tensor.shape[0]} rows do not divide into {heads} heads")
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata describes.

    Raises:
        ModelError: none is there, or of a kind that cannot be rebuilt exactly.
    """
    model, splitting = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    tokens, merges = file.metadata.get("tokenizer.ggml.tokens"), file.metadata.get("tokenizer.ggml.merges")
    if model != "gpt2" or tokens is None or merges is None or not _strings(tokens) or not _strings(merges):
        raise ModelError(f"{file.path}: tokenizer model {model!r}; byte-level BPE (gpt2) with merges is read")
    if splitting not in _SPLITTING:
        raise ModelError(f"{file.path}: pre-tokenizer {splitting!r}; read are {', '.join(_SPLITTING)}")
    kinds = file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        rebuilt = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, pairs))
    except Exception as error:  # the Rust side raises the bare class
        raise ModelError(f"{file.path}: its merges do not fit its vocabulary ({error})") from error
    rebuilt.pre_tokenizer = _SPLITTING[splitting]()
    if splitting == "qwen2":
        rebuilt.normalizer = normalizers.NFC()
    rebuilt.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # token types of the specification
    rebuilt.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds, strict=False) if k == control]
    )
    rebuilt.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=False) if k == user_defined]
    )
    special = _special_tokens(file, tokens)
    if file.metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        first = special["bos_token"]
        rebuilt.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{first}:0 $A:0",
                    pair=f"{first}:0 $A:0 {first}:1 $B:1",
                    special_tokens=[(first, tokens.index(first))],
                ),
            ]
        )
    make: Any = PreTrainedTokenizerFast  # untyped
    found: PreTrainedTokenizerFast = make(
        tokenizer_object=rebuilt,
        clean_up_tokenization_spaces=False,
        model_max_length=file.metadata.get(f"{file.metadata['general.architecture']}.context_length", 10**9),
        **special,
        **({"chat_template": chat} if (chat := file.metadata.get("tokenizer.chat_template")) else {}),
    )
    return found


def _special_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {}
    for name, key in keys.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            found[name] = tokens[index]
    return found


def _strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_SPLITTING: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split_by(_LLAMA3),
    "qwen2": lambda: _split_by(_QWEN2),
}
