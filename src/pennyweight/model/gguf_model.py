"""A decoder read from a GGUF file: configuration and state dict as ``transformers`` has them.

Families: ``llama`` (which Mistral and SmolLM files call themselves too), ``qwen2`` and ``qwen3``.

Shape letters: H query heads, K key/value heads, D head size, E model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

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
    inner, blocks = count("feed_forward_length"), count("block_count")
    # a damaged count would otherwise be built before it is missed: a billion blocks, an endless embedding
    for name, wanted in {
        "token_embd.weight": (width,),
        "blk.0.attn_q.weight": (heads * head_dim, width),
        "blk.0.attn_k.weight": (kv_heads * head_dim, width),
        "blk.0.ffn_up.weight": (inner, width),
        f"blk.{blocks - 1}.ffn_norm.weight": (width,),
    }.items():
        there = file.entries[name].shape if name in file.entries else ()
        if there[-len(wanted) :] != wanted or len(there) > 2:
            raise ModelError(f"{file.path}: {name} is {there or 'missing'}, the metadata ask for {wanted}")
    theta = real("rope.freq_base") if f"{family}.rope.freq_base" in file.metadata else 10000.0
    made: PreTrainedConfig = CONFIGS[family](
        vocab_size=file.entries["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
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
