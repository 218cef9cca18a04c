"""The first token of every sequence, kept out of quantization.

Row 172. Source: T. Zhao et al., "MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled
Mixed Precision Quantization", arXiv:2405.17873: what begins a text is the same for all texts and has features far
larger than those of any other token, so its keys and values are computed once, by the original weights, and stored;
ranges and rounding then meet the other tokens only (`quantize.activations` with keep_first_token does that part).
Differs from the source: decoders get the same, as `FirstToken`: attention to the past alone makes every layer's keys
and values at the first position a function of the first token.

Shape letters: B sequences, T tokens, V scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.evaluate.forward import first_tensor, looking
from pennyweight.lever import at_least, lever, option
from pennyweight.model.model import Model
from pennyweight.work import Work


@runtime_checkable
class KeepsFirstToken(Protocol):
    """A model whose texts all begin alike, as `pennyweight.zoo.dit.DiT`."""

    def keep_first_token(self, token: int) -> None:
        """Store the keys and values of ``token`` at the first position."""


@lever(
    "quantize.first_token",
    reach="model",
    row=172,
    paper="MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision "
    "Quantization, arXiv:2405.17873",
)
@dataclass(frozen=True, kw_only=True)
class KeepFirstToken:
    """Store what attention to a text makes of its first token, before weights and inputs are quantized."""

    token: int = option(0, at_least(0), "the token that begins every text")

    def change(self, model: Model, work: Work) -> None:
        """Have the model store keys and values; a step before those that quantize.

        Raises:
            OptionError: a model that has no such place.
        """
        if not isinstance(model.module, KeepsFirstToken):
            raise OptionError(
                f"quantize.first_token: {type(model.module).__name__} has no keep_first_token; for a decoder use "
                "pennyweight.levers.quantize.first_token.FirstToken"
            )
        model.module.keep_first_token(self.token)


@dataclass(frozen=True)
class FirstToken:
    """What a decoder makes of its first token: keys and values of every layer, and the scores that follow it.

    Attributes:
        token: its id.
        keys: of each layer, (1, heads, 1, head dimension).
        values: likewise.
        logits: (V,) scores of the second token.
    """

    token: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor

    @classmethod
    def of(cls, module: nn.Module, token: int) -> FirstToken:
        """Computed by ``module``, a decoder of ``transformers``, as it is now: call it before quantizing.

        Raises:
            ModelError: a model that hands back no keys and values.
        """
        device = next(module.parameters()).device
        with looking(module):
            out = module(input_ids=torch.tensor([[token]], device=device), use_cache=True)
        layers: Sequence[Any] = getattr(getattr(out, "past_key_values", None), "layers", ())
        kept = [(layer.keys, layer.values) for layer in layers if isinstance(getattr(layer, "keys", None), Tensor)]
        if not kept or len(kept) != len(layers):
            raise ModelError(f"{type(module).__name__} hands back no keys and values; FirstToken is for decoders")
        keys, values = zip(*kept, strict=True)
        return cls(token, keys, values, first_tensor(out)[0, -1])

    def cache(self, sequences: int) -> Any:
        """A cache of ``transformers`` that holds the first token for that many sequences, to go on from."""
        from transformers import DynamicCache

        made = DynamicCache()
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            made.update(key.expand(sequences, -1, -1, -1), value.expand(sequences, -1, -1, -1), index)
        return made

    def scores(self, module: nn.Module, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of ``ids`` (B, T), the first position as it was stored, the others by ``module``.

        Raises:
            DataError: sequences that do not begin with the token, or have no other.
        """
        if ids.ndim != 2 or ids.shape[1] < 2 or not bool((ids[:, 0] == self.token).all()):
            raise DataError(
                f"FirstToken: sequences {tuple(ids.shape)}; give (B, T) that begin with {self.token}, T > 1"
            )
        with looking(module):
            rest = first_tensor(module(input_ids=ids[:, 1:], past_key_values=self.cache(len(ids)), use_cache=True))
        return torch.cat([self.logits.to(rest).expand(len(ids), 1, -1), rest], 1)
