"""L-Mul in a model: products of linear maps and of attention by integer additions, emulated.

Row 152. Source: H. Luo and W. Sun, "Addition is All You Need for Energy-efficient Language Models", arXiv:2410.00907.
Differs from the source: see `pennyweight.weights.l_mul`, which does it. Saved with the model: linear maps as settings
of their layers, attention as a setting of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.errors import OptionError
from pennyweight.lever import between, lever, one_of, option
from pennyweight.model.compact import compact_layer
from pennyweight.model.model import Model
from pennyweight.model.products import use_in_attention
from pennyweight.weights import CompactLinear
from pennyweight.weights.l_mul import LMul
from pennyweight.work import Work


@lever(
    "infer.l_mul",
    reach="model",
    row=152,
    paper="Addition is All You Need for Energy-efficient Language Models, arXiv:2410.00907",
)
@dataclass(frozen=True, kw_only=True)
class LMulProducts:
    """Multiply by adding bit patterns: an emulation that shows the quality; slower on any CPU."""

    bits: int = option(4, between(1, 23), "mantissa bits that operands are rounded to")
    carry: bool = option(True, one_of(True, False), "as an integer adder does; false: the printed formula")
    linear: bool = option(True, one_of(True, False), "in the selected linear maps")
    attention: bool = option(True, one_of(True, False), "in all attention: queries by keys, and weights by values")

    def __post_init__(self) -> None:
        if not (self.linear or self.attention):
            raise OptionError("infer.l_mul: neither linear nor attention leaves nothing to do; set one of them")

    def change(self, model: Model, work: Work) -> None:
        """Set the arithmetic of layers and attention; no weight changes.

        Raises:
            OptionError: no linear map is selected.
            ModelError: an attention that cannot be exchanged.
        """
        arithmetic = LMul(self.bits, self.carry)
        if self.attention:
            use_in_attention(model.module, arithmetic)
        if not self.linear:
            return
        chosen = [found for found in work.maps if found.kind in ("linear", "conv1d-transposed")]
        if not chosen:
            raise OptionError("infer.l_mul: the selection holds no linear map; widen it, or give linear: false")
        for found in chosen:
            layer = compact_layer(model.module, found)
            assert isinstance(layer, CompactLinear), found.kind
            layer.product = arithmetic
