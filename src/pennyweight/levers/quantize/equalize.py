"""Data-free quantization: cross-layer equalization of two maps with nothing but scales between them.

Row 226. Source: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721, section 4.1. Differs from the source: nothing.

Where the channels between two maps pass through a function with f(s x) = s f(x) for s > 0 (the identity, ReLU, the
value path of attention, the up path of a gated FFN), channel i may be divided by s_i before and multiplied after. The
choice s_i = sqrt(r1_i r2_i) / r2_i makes both ranges of each channel equal, so that one scale for a matrix serves all.

Shape letters: N in features, C channels between, M out features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import ShapeError


def equalize(first: Tensor, second: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(first, second, bias) of the same function, with equal ranges of each channel in both.

    Args:
        first: (C, N), the map into the channels.
        second: (M, C), the map out of them.
        bias: (C,), of ``first``.

    Raises:
        ShapeError: the maps do not chain.
    """
    if first.shape[0] != second.shape[1]:
        raise ShapeError(
            f"equalize: {tuple(first.shape)} gives {first.shape[0]} channels, {tuple(second.shape)} takes "
            f"{second.shape[1]}; give maps that follow each other"
        )
    into, out = first.abs().amax(1), second.abs().amax(0)  # (C,) each
    # a channel that one side leaves out carries nothing: any scale is as good
    scale = torch.where((into > 0) & (out > 0), (into / out).sqrt(), torch.ones_like(into))
    return first / scale[:, None], second * scale, None if bias is None else bias / scale
