"""Tiny models of many families, random weights, built from a config: what tests of anything model-wide run over."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 64
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_BERT = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_FALCON = {key: value for key, value in _BERT.items() if key not in ("intermediate_size", "max_position_embeddings")}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_DEEPSEEK = _LLAMA | {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

_CONFIGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _LLAMA | {"head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _LLAMA | {"head_dim": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
        | {"eos_token_id": 1},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {key: value for key, value in _BERT.items() if key != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "falcon": ("FalconForCausalLM", "FalconConfig", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-multi-query": ("FalconForCausalLM", "FalconConfig", _FALCON),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
        | {"max_position_embeddings": 64},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", _VIT),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "image_size": 16, "patch_size": 2},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _LLAMA
        | {"num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        _DEEPSEEK | {"q_lora_rank": None, "topk_group": None, "n_group": None, "topk_method": "greedy"},
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _DEEPSEEK | {"q_lora_rank": 12, "topk_group": 1, "n_group": 1},
    ),
}


class PlainConv(nn.Module):
    """A convolutional network of no library: a stem, two stages of residual blocks, and a head."""

    class Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(width, width, 3, padding=1)
            self.norm = nn.BatchNorm2d(width)
            self.two = nn.Conv2d(width, width, 3, padding=1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(torch.relu(self.norm(self.one(x))))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stages = nn.Sequential(
            nn.Sequential(self.Residual(8), self.Residual(8)),
            nn.Sequential(self.Residual(8), self.Residual(8)),
        )
        self.squeeze = nn.Conv1d(8, 4, 3, padding="same", padding_mode="reflect")
        self.head = nn.Linear(4, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stages(self.stem(pixel_values)).flatten(2)
        return self.head(self.squeeze(x).mean(-1))


def _plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 24), nn.ReLU(), nn.Linear(24, 12), nn.Linear(12, 5))


_PLAIN: dict[str, Callable[[], nn.Module]] = {"plain-conv": PlainConv, "plain-mlp": _plain_mlp}

#: Every family that `build` knows.
FAMILIES = (*_CONFIGS, *_PLAIN)
VISION = frozenset({"vit", "deit", "swin", "convnext", "resnet", *_PLAIN})


def build(family: str, seed: int = 0, **changes: object) -> nn.Module:
    """A tiny model in eval mode, every parameter moved off its initial value (norm scales are 1 and biases 0 there)."""
    torch.manual_seed(seed)
    if family in _PLAIN:
        assert not changes, f"{family} has no configuration to change"
        module = _PLAIN[family]()
    else:
        model, config, options = _CONFIGS[family]
        module = getattr(transformers, model)(getattr(transformers, config)(**(options | changes)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def inputs(family: str, seed: int = 4) -> dict[str, Tensor]:
    """A batch of two for `build(family)`; every expert gets a row with the default seeds."""
    generator = torch.Generator().manual_seed(seed)
    if family in VISION:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=generator)
    given = {"input_ids": tokens}
    if family.startswith("t5"):
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    return given


@torch.no_grad()
def run(module: nn.Module, family: str) -> Tensor:
    """The first output of ``module`` on `inputs`."""
    given = inputs(family)
    out = module(given["pixel_values"]) if family in _PLAIN else module(**given)
    return out if isinstance(out, Tensor) else out[0]
