"""A small GPT to train from nothing: bytes in, logits of the next byte out.

No paper of its own: pre-normalized blocks of causal attention with rotary positions and a plain feed-forward pair, the
common recipe of small decoders. Positions take no parameters, so that sizes compare by their matrices alone.

Shape letters: B windows, T tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import DataError, OptionError
from pennyweight.zoo.positions import DISTANCES, Distance, Series, angles, distance_bias, rotated, slopes


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Attributes:
        width: D; a multiple of twice ``num_heads``.
        depth: blocks.
        num_heads: H.
        vocabulary: V; 256 for bytes.
        expansion: width of the feed-forward layers / D.
        context: longest window.
        tied: whether head and embedding are one matrix.
        dropout: on what each half of a block adds.
        distance: how attention decays with distance besides, see `pennyweight.zoo.positions`.
        slopes: how fast it does in each head.
    """

    width: int = 128
    depth: int = 4
    num_heads: int = 4
    vocabulary: int = 256
    expansion: int = 4
    context: int = 1024
    tied: bool = True
    dropout: float = 0.0
    distance: Distance = "none"
    slopes: Series = "harmonic"

    def __post_init__(self) -> None:
        sizes = (self.width, self.depth, self.num_heads, self.vocabulary, self.expansion, self.context)
        if min(sizes) < 1 or self.width % (2 * self.num_heads) or not 0 <= self.dropout < 1:
            raise OptionError(
                f"{self}: give sizes of at least 1, a width that is a multiple of twice the heads, dropout in [0, 1)"
            )
        if self.distance not in DISTANCES:
            raise OptionError(f"GPT: distance {self.distance!r}; give one of {', '.join(DISTANCES)}")


class GPT(nn.Module):
    """A causal language model: token ids (B, T) -> logits (B, T, V).

    Args:
        config: its sizes.
        generator: of the initial weights; None for torch's own.

    Initial weights are normal with deviation 0.02 (the embedding) and 1/sqrt(inputs); what blocks add is scaled down by
    the root of their number, so that the stream keeps its size at any depth.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: GPTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.embedding.weight
        cosine, sine = angles(config.context, config.width // config.num_heads)  # (context, head_dim / 2)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self._initialize(generator)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            deviation = 0.02 if name == "embedding.weight" else weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation /= (2 * self.config.depth) ** 0.5
            weight.normal_(0, deviation, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of token ids (B, T).

        Raises:
            DataError: windows longer than the context.
        """
        length = ids.shape[1]
        if length > self.config.context:
            raise DataError(f"a window of {length} tokens; this model's context is {self.config.context}")
        turn = self.cosine[:length], self.sine[:length]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, turn)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = _Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = _FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), turn))
        added: Tensor = self.dropout(self.mlp(self.mlp_norm(x)))
        return x + added


class _Attention(nn.Module):
    slope: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads, self.distance = config.num_heads, config.distance
        self.register_buffer("slope", slopes(config.num_heads, config.slopes), persistent=False)
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D/H)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        decays = self.distance != "none"
        bias = distance_bias(x.shape[1], self.slope.to(query), self.distance) if decays else None
        mixed = functional.scaled_dot_product_attention(
            rotated(query, *turn), rotated(key, *turn), value, attn_mask=bias, is_causal=not decays
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.expansion * config.width, bias=False)
        self.down_proj = nn.Linear(config.expansion * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.gelu(self.up_proj(x)))
        return out
