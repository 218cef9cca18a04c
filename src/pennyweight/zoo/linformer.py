"""Encoder layers whose attention looks at a fixed number of mixtures of keys, however long the sequence (Linformer).

Row 242. Source: S. Wang et al., "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768: keys and values
are projected along the sequence, ``K' = E K`` and ``V' = F V`` with learned E, F of shape (S, L), before attention.
Differs from the source: one pair for all heads of a layer, its "headwise sharing"; shorter sequences use the first
columns.

Shape letters: B sequences, T tokens, D width, H heads, L longest sequence, S projected positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import DataError, OptionError


class Attention(nn.Module):
    """Attention in both directions: (B, T, D) -> (B, T, D).

    Args:
        width: D, a multiple of ``num_heads``.
        num_heads: H.
        length: L; with ``keys`` alone.
        keys: S; None attends to every position. Causal attention has no such form: mixtures hold later tokens.
        generator: of the initial weights.

    Exact where S = L and both projections are the identity.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        length: int | None = None,
        keys: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or num_heads < 1 or width % num_heads or (length is None) != (keys is None):
            raise OptionError(
                f"Linformer: width {width}, {num_heads} heads, length {length}, keys {keys}; give a width that heads "
                "divide, and both or neither of length and keys"
            )
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        # of no rows: attention to every position
        self.key_mix, self.value_mix = (nn.Parameter(torch.zeros(0, 0)) for _ in range(2))
        if length is not None and keys is not None:
            self.mix(length, keys)
            with torch.no_grad():
                for one in (self.key_mix, self.value_mix):
                    # rows of norm 1: mixtures of independent keys are as large as keys
                    one.copy_(torch.randn(keys, length, generator=generator) / length**0.5)
        _draw((self.q_proj, self.k_proj, self.v_proj, self.o_proj), generator)

    def mix(self, length: int, keys: int) -> None:
        """Look at ``keys`` mixtures of up to ``length`` positions from now on: means of neighbors, to be trained.

        Raises:
            OptionError: no mixture, or more of them than positions.
        """
        if not 1 <= keys <= length:
            raise OptionError(f"Linformer: {keys} keys for a length of {length}; give 1 to {length}")
        near = torch.arange(length) * keys // length == torch.arange(keys)[:, None]
        means = (near / near.sum(1, keepdim=True)).to(self.q_proj.weight)
        self.key_mix.data, self.value_mix.data = means, means.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Raises DataError for sequences longer than L."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if len(self.key_mix):
            if x.shape[1] > self.key_mix.shape[1]:
                longest = self.key_mix.shape[1]
                raise DataError(f"Linformer: a sequence of {x.shape[1]} tokens; this layer's are {longest}")
            key, value = self.key_mix[:, : x.shape[1]] @ key, self.value_mix[:, : x.shape[1]] @ value
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        mixed = functional.scaled_dot_product_attention(*heads)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


def _draw(layers: Sequence[nn.Linear], generator: torch.Generator | None) -> None:
    for layer in layers:
        nn.init.normal_(layer.weight, 0, layer.in_features**-0.5, generator=generator)
        nn.init.zeros_(layer.bias)


class EncoderLayer(nn.Module):
    """`Attention` and a feed-forward pair, each behind a norm: (B, T, D) -> (B, T, D); arguments as there."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        length: int | None = None,
        keys: int | None = None,
        expansion: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, length=length, keys=keys, generator=generator)
        self.up_proj, self.down_proj = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)
        _draw((self.up_proj, self.down_proj), generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        added: Tensor = self.down_proj(functional.gelu(self.up_proj(self.mlp_norm(x))))
        return x + added
