"""A prompt through all layers of a Llama-shaped decoder, matrix products in bfloat16, all else in float32.

What `transformers` computes, with fewer steps between the products: maps of one input are one product, norms are one
call each, and nothing is cast but around a product. Coded weights become a matrix in the cache, for one product.

Shape letters: P positions, M out features, N in features, S size of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight import native
from pennyweight.weights import CompactLinear, LowRank, Sum, one_row
from pennyweight.weights.one_row import Prepared


@dataclass(frozen=True)
class _Maps:
    """Linear maps of one input, multiplied at once where all of them are codes.

    Attributes:
        layers: as the model has them.
        codes: of all, or none.
        bias: (M,) bfloat16 of all, or None.
        down: (R, N) bfloat16, the inner factors of all low-rank terms beside codes; None where there are none.
        up: by layer, the outer factors (M, rank) of its terms.
    """

    layers: tuple[Any, ...]
    codes: tuple[Prepared, ...]
    bias: Tensor | None
    down: Tensor | None
    up: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def of(cls, *layers: Any) -> _Maps:
        parts = [_codes_and_factors(layer) for layer in layers]
        found = [part for part in parts if part is not None]
        if len(found) < len(layers):
            return cls(layers, (), None, None, ())
        biases = [
            torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach().float()
            for layer in layers
        ]
        plain = all(layer.bias is None for layer in layers)
        down = [term.down.detach().bfloat16() for _, terms in found for term in terms]
        return cls(
            layers,
            tuple(codes for codes, _ in found),
            None if plain else torch.cat(biases).bfloat16(),
            torch.cat(down) if down else None,
            tuple(tuple(term.up.detach().bfloat16() for term in terms) for _, terms in found),
        )

    @property
    def size(self) -> int:
        """Numbers of the matrix that is made; 0 where none is."""
        return sum(one.shape[0] * one.shape[1] for one in self.codes)

    def multiply(self, x: Tensor, scratch: Tensor) -> Sequence[Tensor]:
        """(P, M) in bfloat16 of each map, for ``x`` (P, N); ``scratch`` has room for `size`."""
        if not self.codes:
            return [_product(layer, x) for layer in self.layers]
        rows, columns = [one.shape[0] for one in self.codes], x.shape[1]
        matrix = scratch[: self.size].view(sum(rows), columns)
        one_row.expand(self.codes, matrix)
        found = torch.split(functional.linear(x, matrix, self.bias), rows, -1)
        if self.down is not None:
            inner = iter(torch.split(functional.linear(x, self.down), [u.shape[1] for us in self.up for u in us], -1))
            for one, factors in zip(found, self.up, strict=True):
                for up in factors:
                    one.addmm_(next(inner), up.T)
        return found


def _codes_and_factors(layer: Any) -> tuple[Prepared, list[LowRank]] | None:
    """The codes of a layer and the low-rank terms beside them; None where it is anything else."""
    if type(layer) is not CompactLinear:
        return None
    terms = [term for _, term in layer.weight.named_terms()] if type(layer.weight) is Sum else [layer.weight]
    factors = [term for term in terms if type(term) is LowRank]
    rest = [term.prepared() for term in terms if type(term) is not LowRank]
    if len(rest) != 1 or rest[0] is None or rest[0].matrix.kind not in (one_row.WHOLE, one_row.PACKED):
        return None
    return rest[0], factors


class Reader:
    """What reads prompts of one model as it is now.

    Args:
        module: the decoder, of a kind that `fused` knows.
    """

    def __init__(self, module: Any) -> None:
        self._maps = [
            (
                _Maps.of(attention.q_proj, attention.k_proj, attention.v_proj),
                _Maps.of(attention.o_proj),
                _Maps.of(net.gate_proj, net.up_proj),
                _Maps.of(net.down_proj),
            )
            for attention, net in ((block.self_attn, block.mlp) for block in module.layers)
        ]
        self._room = max(maps.size for layer in self._maps for maps in layer)

    def read(self, module: Any, ids: Tensor, cache: Any) -> Tensor:
        """The normalized hidden states (1, P, W) of a prompt, whose keys and values ``cache`` then holds.

        Args:
            module: the one that this is of.
            ids: (1, P).
            cache: an empty ``DynamicCache``.
        """
        embedded = module.embed_tokens(ids)
        x, dtype = embedded[0].float(), embedded.dtype
        positions = torch.arange(ids.shape[1])[None]
        cosine, sine = (part[0].float() for part in module.rotary_emb(x[None], position_ids=positions))
        scratch = torch.empty(self._room, dtype=torch.bfloat16)
        for index, (block, (inward, outward, widening, narrowing)) in enumerate(
            zip(module.layers, self._maps, strict=True)
        ):
            attention = block.self_attn
            queries, keys, values = (
                part.float().view(len(x), -1, attention.head_dim).transpose(0, 1)
                for part in inward.multiply(_normalized(x, block.input_layernorm).bfloat16(), scratch)
            )
            queries = _turned(queries, getattr(attention, "q_norm", None), cosine, sine)
            keys = _turned(keys, getattr(attention, "k_norm", None), cosine, sine)
            cache.update(keys[None].to(dtype), values[None].to(dtype), index)
            heads = _attended(queries, keys, values, attention.scaling)
            x = x + outward.multiply(heads, scratch)[0]
            gate, up = widening.multiply(_normalized(x, block.post_attention_layernorm).bfloat16(), scratch)
            x = x + narrowing.multiply(functional.silu(gate).mul_(up), scratch)[0]
        return _normalized(x, module.norm).to(dtype)[None]


def _attended(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """(P, H S) in bfloat16: causal attention of ``queries`` (H, P, S) to ``keys`` and ``values`` (G, P, S)."""
    (heads, positions, size), groups = queries.shape, len(keys)
    library = native.library("attend")
    if library is None or size % 16 or scaling <= 0:
        found = functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=True
        )
        return found[0].transpose(0, 1).reshape(positions, -1).bfloat16()
    room = -(-positions // 64) * 64
    turned = queries.new_zeros(groups, size, room)
    turned[:, :, :positions] = keys.transpose(1, 2)
    queries, values = queries.contiguous(), values.contiguous()
    mixed = torch.empty(positions, heads * size, dtype=torch.bfloat16)
    given = (ctypes.c_void_p(part.data_ptr()) for part in (queries, turned, values, mixed))
    sizes = (heads, groups, positions, room, size)
    if library.attend(*given, *sizes, ctypes.c_float(scaling), torch.get_num_threads()):
        raise MemoryError(f"no memory for the scores of {positions} positions")
    return mixed


def _turned(heads: Tensor, norm: nn.Module | None, cosine: Tensor, sine: Tensor) -> Tensor:
    """(heads, P, S) at their positions."""
    if norm is not None:
        heads = _normalized(heads, norm)
    first, second = heads.chunk(2, -1)
    return torch.addcmul(heads * cosine, torch.cat([-second, first], -1), sine)


def _normalized(x: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], norm.weight.float(), norm.variance_epsilon)


def _product(layer: Any, x: Tensor) -> Tensor:
    """(P, M) in bfloat16."""
    if type(layer) is nn.Linear:
        bias = None if layer.bias is None else layer.bias.bfloat16()
        return functional.linear(x, layer.weight.bfloat16(), bias)
    found: Tensor = layer(x)
    return found.bfloat16()
