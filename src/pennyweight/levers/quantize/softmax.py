"""Attention weights on powers of the square root of two.

Row 56. Source: Z. Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision
Transformers", arXiv:2212.08254: weights of a softmax are many small and few large ones, which steps of equal ratio hold
better than steps of equal size; ``round(-2 log2(x / scale))`` is the code, values beyond the last one are zero, and the
scale is the percentile of the weights with the least squared error. Differs from the source: nothing.

Simulated, and for as long as `quantized` stands: attention is no layer, so that a file has no place for it.

Shape letters: B samples, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pennyweight.errors import ModelError, OptionError

_NAME = "pennyweight_log_sqrt2"
_PERCENTILES = (0.999, 0.9999, 0.99999)


@dataclass(frozen=True)
class LogSqrt2:
    """Rounds values of 0 or more to ``scale * 2^(-k/2)``, k from 0 to ``2^bits - 1``, or to zero.

    Args:
        bits: 2 to 8.
        scale: the largest value.
    """

    bits: int
    scale: float

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not self.scale > 0:
            raise OptionError(f"LogSqrt2: bits = {self.bits}, scale = {self.scale}; give 2 to 8, and above 0")

    @classmethod
    def fit(cls, values: Tensor, bits: int) -> LogSqrt2:
        """With the scale, out of three percentiles of ``values`` (...), that leaves the least squared error."""
        ordered = values.detach().float().flatten().sort().values
        tried = []
        for share in _PERCENTILES:
            place = share * (len(ordered) - 1)
            below = int(place)
            scale = torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below)
            made = cls(bits, max(float(scale), torch.finfo(torch.float32).tiny))
            tried.append((float((made(ordered) - ordered).square().mean()), -share, made))
        return min(tried, key=lambda one: one[:2])[2]

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` (...), rounded."""
        code = (-2 * (x / self.scale).log2()).round()
        value = self.scale * torch.exp2(-code.clamp_min(0) / 2)
        return torch.where(code < 2**self.bits, value, torch.zeros_like(value)).to(x.dtype)


@contextmanager
def quantized(module: nn.Module, bits: int) -> Iterator[None]:
    """For a while a ``transformers`` model rounds its attention weights; a layer's scale is that of its first call.

    Raises:
        ModelError: not such a model, or one whose attention cannot be exchanged.
    """
    if not isinstance(module, PreTrainedModel):
        kind = type(module).__name__
        raise ModelError(f"softmax: the attention of a {kind} cannot be exchanged; give a transformers model")
    found: dict[int, LogSqrt2] = {}

    def attend(
        layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores if attention_mask is None else scores + attention_mask
        weights = scores.softmax(-1, dtype=torch.float32)  # (B, H, T, T)
        rounder = found.setdefault(id(layer), LogSqrt2.fit(weights, bits))
        weights = rounder(weights).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    before = module.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    # without one of its own, masks of causal models would be dropped without a word
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    module.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        module.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[_NAME]  # type: ignore[no-untyped-call]
