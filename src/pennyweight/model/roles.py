"""The role of a linear map, read from the names on the way to it.

Every library names the same few maps in its own way; this is the table of those ways. Roles are:

``attention.query|key|value|output|qkv``, the same with ``cross_attention.`` where keys come from another stream, and
``attention.query_down|query_up|kv_down|kv_up`` for latent attention; ``ffn.gate|up|down|gate_up``; ``moe.router``,
``moe.experts[3].gate|up|down|gate_up``, ``moe.shared.gate|up|down|router``; ``embedding``, ``position_embedding``,
``token_type_embedding``, ``embedding.projection``; ``head``, ``head.transform``, ``head.projection``; ``pooler``,
``classifier``, ``downsample``, ``conv``; ``linear`` for a layer of a plain network that has no attention and no
feed-forward pair; ``unknown`` for what the table does not know.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import pairwise

UNKNOWN = "unknown"

_QUERY = {"q", "query", "q_proj", "q_lin", "q_linear", "query_proj", "linear_q", "wq", "to_q", "q_proj_weight"}
_KEY = {"k", "key", "k_proj", "k_lin", "k_linear", "key_proj", "linear_k", "wk", "to_k", "k_proj_weight"}
_VALUE = {"v", "value", "v_proj", "v_lin", "v_linear", "value_proj", "linear_v", "wv", "to_v", "v_proj_weight"}
_QKV = {"qkv", "qkv_proj", "query_key_value", "c_attn", "wqkv", "in_proj", "in_proj_weight", "to_qkv", "att_proj"}
_ATTENTION_OUTPUT = {
    *("o", "o_proj", "out_proj", "out_lin", "linear_out", "wo", "to_out", "out", "output", "proj", "projection"),
    *("c_proj", "dense"),
}
_LATENT = {
    "q_a_proj": "query_down",
    "q_b_proj": "query_up",
    "kv_a_proj": "kv_down",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_b_proj": "kv_up",
}
_GATE = {"gate_proj", "wi_0", "gate", "fc_gate", "linear_gate"}
_UP = {
    *("up_proj", "fc1", "c_fc", "lin1", "linear1", "linear_1", "dense_h_to_4h", "wi", "wi_1", "w3", "pwconv1"),
    *("fc_in", "fc_up", "intermediate", "intermediate_dense", "expand", "w_1", "linear_in"),
}
_DOWN = {
    *("down_proj", "fc2", "c_proj", "lin2", "linear2", "linear_2", "dense_4h_to_h", "wo", "w2", "pwconv2"),
    *("fc_out", "fc_down", "output", "output_dense", "reduce", "w_2", "linear_out", "out_proj"),
}
_GATE_UP = {"gate_up_proj", "gate_and_up_proj", "w13", "w1w3", "wi_fused"}
_ROUTER = {"gate", "router", "wg", "gate_network"}
_HEAD = {"lm_head", "embed_out", "vocab_projector", "output_projection", "unembed"}
_CLASSIFIER = {
    *("classifier", "score", "head", "heads", "fc", "qa_outputs", "pre_classifier", "seq_relationship"),
    *("cls_classifier", "distillation_classifier", "logits", "logits_proj", "summary", "classification_head"),
}
_POSITION = {"wpe", "pos_emb", "pos_embed", "embed_positions", "relative_attention_bias"}
#: Names that say nothing themselves: the module above is what is named.
_TRANSPARENT = {"dense", "linear", "lin", "proj", "projection", "module", "net", "layer", "base_layer"}


def role_of(path: str, *, kind: str, siblings: Collection[str] = (), in_block: bool, beside_experts: bool) -> str:
    """The role of the map at ``path``.

    Args:
        path: dotted path of the layer; inside a block, relative to the block.
        kind: as in `anatomy.Map`.
        siblings: names of the other children of its parent (they tell a gated ``w1`` from a plain one).
        in_block: whether the layer lies in a repeated block.
        beside_experts: whether its parent also holds a module of experts.
    """
    segments = path.lower().split(".")
    if kind == "embedding":
        return _embedding(segments)
    expert = _expert(segments)
    if (beside_experts and segments[-1] in _ROUTER) or "router" in segments:
        return "moe.router"
    if kind in ("conv1d", "conv2d"):
        return "conv"
    if expert is not None:
        part = _feed_forward(segments, siblings)
        return f"moe.experts[{expert}].{part}" if part else UNKNOWN
    if segments[-1] in ("shared_expert_gate", "shared_gate"):
        return "moe.shared.router"
    if any(re.match(r"shared_(expert|mlp)", segment) for segment in segments):
        part = _feed_forward(segments, siblings)
        return f"moe.shared.{part}" if part else UNKNOWN
    if any(word in segment for segment in segments for word in ("downsample", "patch_merging")):
        return "downsample"
    if in_block:
        return _in_block(segments, siblings)
    return _outside(segments)


def _embedding(segments: list[str]) -> str:
    if any("position" in segment for segment in segments[-2:]) or segments[-1] in _POSITION:
        return "position_embedding"
    if any(word in segments[-1] for word in ("token_type", "segment")):
        return "token_type_embedding"
    return "embedding"


def _expert(segments: list[str]) -> int | None:
    for above, segment in pairwise(segments):
        if above.endswith("experts") and not above.startswith("shared") and segment.isdigit():
            return int(segment)
    return None


def _in_block(segments: list[str], siblings: Collection[str]) -> str:
    crossing = any(is_cross_attention(segment) for segment in segments[:-1])
    if any("attn" in segment or "attention" in segment for segment in segments[:-1]) or segments[-1] in _QKV:
        part = _attention(segments)
        return f"{'cross_attention' if crossing else 'attention'}.{part}" if part else UNKNOWN
    part = _feed_forward(segments, siblings)
    if part:
        return f"ffn.{part}"
    # a block without an attention module of its own holds q, k and v directly
    return f"attention.{part}" if (part := _attention(segments[-1:], strict=True)) else UNKNOWN


def is_cross_attention(segment: str) -> bool:
    """Whether a module of this name attends from one stream to another."""
    low = segment.lower()
    return low in ("encdecattention", "encoder_attn", "multihead_attn") or ("cross" in low and "att" in low)


def _attention(segments: list[str], strict: bool = False) -> str | None:
    # `to_out.0` and `output.dense` are named by the module above
    names = [segment for segment in reversed(segments) if not segment.isdigit()]
    for part, known in (("query", _QUERY), ("key", _KEY), ("value", _VALUE), ("qkv", _QKV)):
        if names and names[0] in known:
            return part
    if names and names[0] in _LATENT:
        return _LATENT[names[0]]
    return "output" if names and not strict and names[0] in _ATTENTION_OUTPUT else None


def _feed_forward(segments: list[str], siblings: Collection[str]) -> str | None:
    leaf = next((s for s in reversed(segments) if s not in _TRANSPARENT and not s.isdigit()), "")
    if leaf == "w1":
        return "gate" if "w3" in siblings else "up"
    for part, known in (("gate_up", _GATE_UP), ("gate", _GATE), ("up", _UP), ("down", _DOWN)):
        if leaf in known:
            return part
    return None


def _outside(segments: list[str]) -> str:
    if segments[-1] in ("project_in", "embedding_hidden_mapping_in", "embeddings_project"):
        return "embedding.projection"
    if segments[-1] == "project_out":
        return "head.projection"
    if segments[-1] in _HEAD or (segments[-1] == "decoder" and len(segments) > 1):
        return "head"
    if "vocab_transform" in segments or "transform" in segments or segments[-2:] == ["lm_head", "dense"]:
        return "head.transform"
    if "pooler" in segments:
        return "pooler"
    if any(segment in _CLASSIFIER for segment in segments):
        return "classifier"
    return UNKNOWN
