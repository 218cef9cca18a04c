"""Attention whose matrix products are taken another way (`pennyweight.weights.l_mul`).

The model's own attention runs as it stands in ``transformers`` ("eager"), its two products replaced. It is chosen
through the registry of attention functions, by a name that says the setting, and saved in ``weights.json``.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pennyweight.errors import ModelError
from pennyweight.weights.l_mul import Arithmetic, LMul, Products

_PREFIX = "pennyweight_l_mul_"


def use_in_attention(module: nn.Module, arithmetic: LMul) -> None:
    """Let every attention of ``module`` multiply by ``arithmetic``.

    Raises:
        ModelError: not a ``transformers`` model, or one whose attention cannot be exchanged.
    """
    if not isinstance(module, PreTrainedModel) or not module._can_set_attn_implementation():
        raise ModelError(
            f"L-Mul: the attention of a {type(module).__name__} cannot be exchanged; use it in linear maps alone "
            "(attention: false)"
        )
    name = _PREFIX + str(arithmetic.bits) + ("" if arithmetic.carry else "_plain")
    register(name, arithmetic)
    module.set_attn_implementation(name)


def attention_arithmetic(module: nn.Module) -> LMul | None:
    """What `use_in_attention` has set, or None."""
    name = str(getattr(getattr(module, "config", None), "_attn_implementation", None))
    if not name.startswith(_PREFIX):
        return None
    bits, _, plain = name.removeprefix(_PREFIX).partition("_")
    return LMul(int(bits), carry=not plain)


def register(name: str, arithmetic: Arithmetic) -> None:
    """Make ``module.set_attn_implementation(name)`` of any ``transformers`` model multiply by ``arithmetic``."""

    def attend(layer: nn.Module, *given: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        # every architecture has its own plain attention (soft caps, sinks, position biases) beside its layers
        eager = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)
        if eager is None:
            raise ModelError(f"L-Mul: {type(layer).__name__} has no plain attention; give attention: false")
        with Products(arithmetic):
            found: tuple[Tensor, Tensor] = eager(layer, *given, **options)
        return found

    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    # without a kind of mask of its own, and a registered one, no mask would be made at all
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
