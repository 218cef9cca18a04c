"""Accounting of training and inference: FLOPs, parameters, PF-days, utilization.

Row 34. Source: A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, section 4.1 and
appendix B: a model FLOP utilization that counts 6 N + 12 L H Q T FLOPs a token, without rematerialization. Rows 67
(datastore: R. Shao et al., arXiv:2407.12854) and 88 (patches: F. Wang et al., arXiv:2502.03738) share the unit costs.

A multiplication and an addition are two FLOPs. Shape letters: L layers, H heads, Q head size, T tokens of context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pennyweight.elementwise import elementwise, numbers
from pennyweight.errors import OptionError

#: FLOPs of one parameter seeing one token: forward and backward, and forward alone.
TRAINING = 6
INFERENCE = 2
#: FLOPs of one PFLOP/s sustained for a day.
PF_DAY = 8.64e19


@elementwise
def training(params: float, tokens: float) -> float:
    """6 N D."""
    return TRAINING * _positive("params", params) * _positive("tokens", tokens)


@elementwise
def inference(params: float, tokens: float) -> float:
    """2 N for each token."""
    return INFERENCE * _positive("params", params) * _positive("tokens", tokens)


def request(params: float, prompt_tokens: float, output_tokens: float, *, samples: int = 1) -> float:
    """A request served: the prompt once, every sample's output tokens once each."""
    return inference(params, prompt_tokens + samples * output_tokens)


@elementwise
def datastore(n_retriever: float, tokens: float) -> float:
    """FLOPs to embed a datastore once: one forward pass of the retriever over its tokens."""
    return inference(n_retriever, tokens)


def attention(layers: int, heads: int, head_dim: int, context: int) -> float:
    """Training FLOPs a token of the scores and the mixing of values: 12 L H Q T, without the saving of causality."""
    return 12.0 * layers * heads * head_dim * context


def pf_days(flops: float) -> float:
    """FLOPs in PF-days."""
    return flops / PF_DAY


def from_pf_days(days: float) -> float:
    """PF-days in FLOPs."""
    return days * PF_DAY


def device_hours(flops: float, *, peak: float, utilization: float = 0.4) -> float:
    """Hours of one device of ``peak`` FLOP/s that reaches a share ``utilization`` of it."""
    if not 0 < utilization <= 1:
        raise OptionError(f"utilization = {utilization!r}; give a share of the peak in (0, 1]")
    return flops / (_positive("peak", peak) * utilization) / 3600


def mfu(
    tokens_per_second: float,
    params: float,
    *,
    peak: float,
    layers: int = 0,
    heads: int = 0,
    head_dim: int = 0,
    context: int = 0,
) -> float:
    """Share of ``peak`` (FLOP/s of all chips) that useful FLOPs of the model make up; rematerialization not counted."""
    _positive("tokens_per_second", tokens_per_second)
    useful = TRAINING * _positive("params", params) + attention(layers, heads, head_dim, context)
    return tokens_per_second * useful / _positive("peak", peak)


@dataclass(frozen=True)
class TransformerConfig:
    """What the accounting needs to know of a decoder.

    Attributes:
        d_model: width.
        layers: blocks.
        heads: query heads.
        kv_heads: key and value heads; 1 is multi-query, None as many as ``heads``.
        head_dim: None for d_model / heads.
        d_ff: inner width of the feed-forward; None for 4 d_model.
        vocab_size: rows of the embedding.
        gated: three feed-forward matrices (SwiGLU) instead of two.
        tied: head and embedding share one matrix.
        norms: norm vectors a layer (of ``d_model`` numbers each).
        final_norm: one more at the end.
        experts: feed-forwards a layer, each with its router row; 1 is dense.
        active_experts: of them that a token visits.
        biases: biases on every linear map.
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    vocab_size: int = 0
    gated: bool = True
    tied: bool = True
    norms: int = 2
    final_norm: bool = True
    experts: int = 1
    active_experts: int = 1
    biases: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "layers", "heads", "experts", "active_experts"):
            _positive(name, getattr(self, name))
        if self.head_dim is None and self.d_model % self.heads:
            raise OptionError(f"transformer: {self.heads} heads do not divide d_model {self.d_model}; give head_dim")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise OptionError(f"transformer: {self.heads} heads do not share {self.kv_heads} of keys and values evenly")
        if self.active_experts > self.experts:
            raise OptionError(f"transformer: {self.active_experts} active experts of {self.experts}")


def palm(d_model: int, layers: int, heads: int) -> TransformerConfig:
    """A PaLM: multi-query attention with heads of 256, SwiGLU of three d x 4d matrices, shared 256k embedding.

    Its published totals count no norms.
    """
    return TransformerConfig(
        d_model,
        layers,
        heads,
        kv_heads=1,
        head_dim=256,
        d_ff=4 * d_model,
        vocab_size=256_000,
        norms=0,
        final_norm=False,
    )


@dataclass(frozen=True)
class TransformerCost:
    """Parameters and FLOPs of a decoder.

    Attributes:
        params: all, tied embeddings once.
        non_embedding: without embedding and head.
        embedding: embedding, and head if it has its own matrix.
        active: parameters a token meets (all but the experts it does not visit).
        matmul_params: parameters that multiply for each token: linear maps and the head, not the embedding look-up.
        attention_flops: training FLOPs a token and context token, 12 L H Q.
        config: what was counted.
    """

    params: int
    non_embedding: int
    embedding: int
    active: int
    matmul_params: int
    attention_flops: int
    config: TransformerConfig

    def flops_per_token(self, context: int = 0, *, mode: Literal["training", "inference"] = "training") -> float:
        """6 N + 12 L H Q T for training, a third of it for a forward pass; N all parameters a token meets."""
        whole = TRAINING * self.active + self.attention_flops * context
        return float(whole if mode == "training" else whole / 3)

    def forward_matmul_flops(self, context: int) -> float:
        """FLOPs a token of the matrix products of one forward pass, every position attending to ``context``."""
        return float(INFERENCE * self.matmul_params + self.attention_flops * context / 3)

    def mfu(self, tokens_per_second: float, *, peak: float, context: int) -> float:
        """Model FLOP utilization; ``peak`` in FLOP/s of all chips."""
        return tokens_per_second * self.flops_per_token(context) / _positive("peak", peak)

    def training(self, tokens: float) -> float:
        """6 N D, without attention, as papers quote it."""
        return training(self.active, tokens)

    def kv_bytes_per_token(self, bits: float = 16.0) -> float:
        """Bytes that a token adds to the key and value cache."""
        config = self.config
        return 2 * config.layers * _kv(config) * _head(config) * bits / 8


def _head(config: TransformerConfig) -> int:
    return config.head_dim or config.d_model // config.heads


def _kv(config: TransformerConfig) -> int:
    return config.heads if config.kv_heads is None else config.kv_heads


def transformer(cfg: TransformerConfig | Mapping[str, Any] | Any) -> TransformerCost:
    """Parameters and FLOPs of a decoder-only Transformer.

    Args:
        cfg: a `TransformerConfig`, a mapping with its fields, or a Hugging Face config.
    """
    config = _config(cfg)
    d, head = config.d_model, _head(config)
    inner = config.d_ff if config.d_ff is not None else 4 * d
    query, kv = config.heads * head, _kv(config) * head
    attention_maps = d * query + 2 * d * kv + query * d
    expert = (3 if config.gated else 2) * d * inner
    router = d * config.experts if config.experts > 1 else 0
    biases = 0
    expert_biases = 0
    if config.biases:
        biases = query + 2 * kv + d
        expert_biases = (2 if config.gated else 1) * inner + d
    norms = config.layers * config.norms * d + (d if config.final_norm else 0)
    shared = config.layers * (attention_maps + router + biases) + norms
    experts = config.layers * (expert + expert_biases)
    embedding = config.vocab_size * d * (1 if config.tied else 2)
    non_embedding = shared + experts * config.experts
    linear = config.layers * (attention_maps + router + expert * config.active_experts)
    return TransformerCost(
        params=non_embedding + embedding,
        non_embedding=non_embedding,
        embedding=embedding,
        active=shared + experts * config.active_experts + embedding,
        matmul_params=linear + config.vocab_size * d,
        attention_flops=12 * config.layers * config.heads * head,
        config=config,
    )


_HUGGING_FACE = {
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "d_ff": ("intermediate_size", "n_inner", "d_ff"),
    "vocab_size": ("vocab_size",),
    "tied": ("tie_word_embeddings",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "active_experts": ("num_experts_per_tok",),
}
#: What a mapping may call the fields besides their own names.
_ALIASES = {"d": "d_model", "d_hidden": "d_model", "ff": "d_ff", "vocab": "vocab_size", "kv": "kv_heads"} | {
    "n_layers": "layers",
    "n_heads": "heads",
    "n_kv_heads": "kv_heads",
    **{written: name for name, others in _HUGGING_FACE.items() for written in others},
}


def _config(cfg: Any) -> TransformerConfig:
    if isinstance(cfg, TransformerConfig):
        return cfg
    if isinstance(cfg, Mapping):
        fields = {_ALIASES.get(str(name), str(name)): value for name, value in cfg.items()}
        known = TransformerConfig.__dataclass_fields__
        if unknown := [name for name in fields if name not in known]:
            raise OptionError(f"transformer: unknown {', '.join(map(str, unknown))}; it takes {', '.join(known)}")
        if missing := [name for name in ("d_model", "layers", "heads") if name not in fields]:
            raise OptionError(f"transformer: no {', '.join(missing)}")
        return TransformerConfig(**fields)
    found: dict[str, Any] = {}
    for name, candidates in _HUGGING_FACE.items():
        value = next((getattr(cfg, c) for c in candidates if getattr(cfg, c, None) is not None), None)
        if value is not None:
            found[name] = value
    if missing := [name for name in ("d_model", "layers", "heads") if name not in found]:
        raise OptionError(f"transformer: {type(cfg).__name__} has no {', '.join(missing)}; give a TransformerConfig")
    gated = getattr(cfg, "hidden_act", getattr(cfg, "hidden_activation", "")) in ("silu", "swish", "gelu_pytorch_tanh")
    return TransformerConfig(**found, gated=gated)


@dataclass(frozen=True)
class ViTCost:
    """Tokens, parameters and FLOPs of a plain vision Transformer (or of a mixer of linear cost)."""

    tokens: int
    params: int
    forward_flops: float
    attention_share: float


def vit(
    image: int,
    patch: int,
    d: int,
    layers: int,
    *,
    channels: int = 3,
    mlp_ratio: float = 4.0,
    classes: int = 0,
    class_token: bool = False,
    mixer: Literal["attention", "linear"] = "attention",
) -> ViTCost:
    """Cost of a ViT on square images: (image / patch)^2 tokens.

    Args:
        image: side in pixels.
        patch: side of a patch; it must divide ``image``.
        d: width.
        layers: blocks of attention (four d x d maps) and a feed-forward.
        channels: of the image.
        mlp_ratio: inner width of the feed-forward over ``d``.
        classes: of the head; 0 for none.
        class_token: one more token.
        mixer: "linear" drops the quadratic part, as state-space mixers do.
    """
    for name, value in (("image", image), ("patch", patch), ("d", d), ("layers", layers)):
        if _positive(name, value) != int(value):
            raise OptionError(f"vit: {name} = {value!r}; give a whole number")
    image, patch, d, layers = int(image), int(patch), int(d), int(layers)
    if image % patch:
        raise OptionError(f"vit: patches of {patch} do not tile an image of {image}")
    tokens = (image // patch) ** 2 + int(class_token)
    inner = int(mlp_ratio * d)
    embedding = channels * patch * patch * d + d
    block = 4 * d * d + 4 * d + 2 * d * inner + inner + d + 4 * d
    head = classes * (d + 1) if classes else 0
    params = embedding + tokens * d + int(class_token) * d + layers * block + 2 * d + head
    linear = (
        2.0 * tokens * layers * (4 * d * d + 2 * d * inner) + 2.0 * (image // patch) ** 2 * channels * patch * patch * d
    )
    linear += 2.0 * d * classes
    mixing = 4.0 * tokens * tokens * d * layers if mixer == "attention" else 0.0
    return ViTCost(tokens, params, linear + mixing, mixing / (linear + mixing))


def _positive(name: str, value: float) -> float:
    numbers("flops", **{name: value})
    if not 0 < value < math.inf:
        raise OptionError(f"flops: {name} = {value!r}; give a positive number")
    return value
