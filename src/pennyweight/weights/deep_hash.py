"""Deep hash embeddings: a row is a small network's answer to many hashes of its number.

Source: W. Kang et al., "Learning to Embed Categorical Features without Embedding Tables for Recommendation",
arXiv:2010.10784 (DHE): hashes scaled to [-1, 1], then layers with Mish. Differs from the source: one hidden layer, no
batch normalization.

Shape letters: M out features, N in features, K hashes, H hidden units; ... any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pennyweight.errors import OptionError, ShapeError
from pennyweight.weights.hashed import hash32
from pennyweight.weights.ids import known_ids
from pennyweight.weights.structured import held
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, form


@form("deep_hash")
class DeepHash(Weight):
    """``W[i] = last @ mish(hidden @ hashes(i) + hidden_bias) + last_bias``.

    Args:
        hidden: (H, K).
        hidden_bias: (H,).
        last: (N, H).
        last_bias: (N,).
        rows: M.
        seed: of the hashes, 0 to 2**32 - 1.

    Cost: parameters of the network, none for a row; 2*M*N FLOPs a row, the matrix being made once a call. Exact for no
    matrix but its own kind.
    """

    tensors = ("hidden", "hidden_bias", "last", "last_bias")

    def __init__(
        self, hidden: Tensor, hidden_bias: Tensor, last: Tensor, last_bias: Tensor, *, rows: int, seed: int = 0
    ) -> None:
        shapes = [tuple(t.shape) for t in (hidden, hidden_bias, last, last_bias)]
        if (
            hidden.ndim != 2
            or last.ndim != 2
            or shapes[1:] != [shapes[0][:1], (shapes[3] + shapes[0])[:2], shapes[2][:1]]
        ):
            raise ShapeError(f"DeepHash: {shapes}; give (H, K), (H,), (N, H) and (N,)")
        if not 0 <= seed < 2**32:
            raise OptionError(f"DeepHash: seed {seed}; give 0 to 2**32 - 1")
        super().__init__(shape=(rows, last.shape[0]))
        self.seed = seed
        self.hidden, self.hidden_bias = held(hidden, "DeepHash: hidden"), held(hidden_bias, "DeepHash: hidden_bias")
        self.last, self.last_bias = held(last, "DeepHash: last"), held(last_bias, "DeepHash: last_bias")

    def _hashes(self, index: Tensor) -> Tensor:
        """(..., K) between -1 and 1."""
        key = hash32(torch.arange(self.hidden.shape[1], device=index.device) + hash32(torch.tensor(self.seed)).item())
        return (hash32(index[..., None] ^ key) >> 8).to(self.hidden.dtype) * 2.0**-23 - 1

    def rows(self, index: Tensor) -> Tensor:
        index = known_ids(index, self.shape[0], "DeepHash")
        inner = functional.mish(functional.linear(self._hashes(index), self.hidden, self.hidden_bias))
        return functional.linear(inner, self.last, self.last_bias)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T.to(x.dtype)

    def dense(self) -> Tensor:
        return self.rows(torch.arange(self.shape[0], device=self.device))

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def settings(self) -> dict[str, Any]:
        return {"rows": self.shape[0], "seed": self.seed}

    def cost(self) -> Cost:
        held_ = list(self.parameters())
        return Cost(sum(p.numel() for p in held_), sum(p.nbytes for p in held_), 2 * self.shape[0] * self.shape[1])
