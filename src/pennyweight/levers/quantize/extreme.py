"""Extreme quantization: binary and ternary weights, and weights that are powers of two.

Row 226. Sources: M. Rastegari et al., "XNOR-Net", arXiv:1603.05279 (binary: the mean magnitude is the best scale);
F. Li et al., "Ternary Weight Networks", arXiv:1605.04711; D. Miyashita et al., "Convolutional Neural Networks using
Logarithmic Data Representation", arXiv:1603.01025. Differs from them: the ternary threshold is the exact optimum (by
sorting), not 0.7 of the mean magnitude, which assumes a distribution.

Shape letters: M out features, N in features, G groups of a row, S features of a group, K values of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.weights.codebook import Codebook
from pennyweight.weights.dense import Dense
from pennyweight.weights.grid import grouped
from pennyweight.weights.packing import pack


def binary(matrix: Tensor, *, group_size: int | None = None) -> Codebook:
    """``scale * sign(matrix)``, the scale of each group its mean magnitude: the nearest such weight."""
    entries, weight = grouped(matrix.detach().float(), None, group_size)
    scale = (entries.abs() * weight).sum(-1) / weight.sum(-1)
    return _coded(matrix, (matrix >= 0).long(), torch.tensor([-1.0, 1.0]), scale, bits=1, group_size=group_size)


def ternary(matrix: Tensor, *, group_size: int | None = None) -> Codebook:
    """``scale * {-1, 0, 1}``, the nearest such weight of each group.

    With the k largest magnitudes kept and their mean as the scale, the squared error falls by (their sum)^2 / k: the
    best k is found by trying all of them.
    """
    entries, weight = grouped(matrix.detach().float(), None, group_size)  # (M, G, S)
    magnitude = torch.where(weight > 0, entries.abs(), torch.full_like(entries, -1.0))  # padding sorts last
    ordered, order = magnitude.sort(-1, descending=True)
    total = ordered.clamp_min(0).double().cumsum(-1)
    count = torch.arange(1, ordered.shape[-1] + 1)
    best = (total.square() / count).argmax(-1, keepdim=True)  # (M, G, 1)
    scale = (total.gather(-1, best) / (best + 1)).float()[..., 0]
    kept = torch.zeros_like(entries).scatter(-1, order, (count <= best + 1).to(entries))
    codes = (entries.sign() * kept + 1).long().reshape(matrix.shape[0], -1)[:, : matrix.shape[1]]
    return _coded(matrix, codes, torch.tensor([-1.0, 0.0, 1.0]), scale, bits=2, group_size=group_size)


def powers_of_two(bits: int) -> Tensor:
    """(2**bits - 1,) zero and plus and minus 1, 1/2, 1/4, ...: multiplication by them is a shift.

    Raises:
        OptionError: fewer than 2 bits leave nothing but zero.
    """
    if not 2 <= bits <= 6:
        raise OptionError(f"powers of two: {bits} bits; give 2 to 6 (at 6 the smallest is 2^-30 of the largest)")
    magnitude = torch.exp2(-torch.arange(2 ** (bits - 1) - 1).float())
    return torch.cat([-magnitude, torch.zeros(1), magnitude.flip(0)])


def _coded(
    matrix: Tensor, codes: Tensor, table: Tensor, scale: Tensor, *, bits: int, group_size: int | None
) -> Codebook:
    held = Dense(torch.where(scale > 0, scale, torch.ones_like(scale)).to(torch.float16))
    if not bool((scale > 0).all()):  # a group of zeros: its scale is 0, which float16 holds
        held = Dense(scale.to(torch.float16))
    return Codebook(
        pack(codes, bits), table.half().view(1, 1, -1), held, bits=bits, columns=matrix.shape[1], group_size=group_size
    )
