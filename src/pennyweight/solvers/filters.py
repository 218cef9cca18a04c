"""How much a filter of a convolution matters, from its weights and from what passes through it.

Row 134. Source: M. Farokh and M. Mohammad-Noori et al., "Beta-Rank: A Robust Convolutional Filter Pruning Method For
Imbalanced Medical Image Analysis", arXiv:2304.07461: the size of a filter times the ratio of what leaves it to what
enters it, in standard deviations over samples. Differs from the source: its published code cuts input patches along
the axes of channels and rows (an array of samples, channels, rows and columns is indexed as if it ended in channels),
and leaves out the positions where that cut is empty; here a patch is what the filter reads, all channels of rows and
columns, padding included, and a patch that never varies counts nothing.

Shape letters: B samples, C channels in, M filters, K kernel positions, P output positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import ShapeError


@torch.no_grad()
def beta_rank(layer: nn.Conv2d, inputs: Tensor, outputs: Tensor) -> Tensor:
    """(M,) the beta-rank of every filter, between 0 (the least of the layer) and 1; 0 for all where they are equal.

    Before it is scaled, ``mean |f_k| * sum over positions of std(output k) / std(input patch)``: the deviation of an
    output is over samples, that of a patch over samples and all that it holds.

    Args:
        layer: with zeros for padding.
        inputs: (B, C, H, W) that it read, two samples or more.
        outputs: (B, M, H', W') that it gave.

    Raises:
        ShapeError: another kind of padding, or a single sample.
    """
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ShapeError("beta_rank: the convolution pads by other things than a number of zeros; leave it out")
    if len(inputs) < 2:
        raise ShapeError(f"beta_rank: {len(inputs)} sample; deviations need two or more")
    patches = functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    by_group = patches.view(len(inputs), layer.groups, -1, patches.shape[2]).transpose(
        0, 1
    )  # (groups, B, C / groups * K, P)
    entering = by_group.double().std((1, 2), correction=0)  # (groups, P)
    leaving = outputs.flatten(2).double().std(0, correction=0)  # (M, P)
    entering = entering.repeat_interleave(layer.out_channels // layer.groups, 0)
    ratio = torch.where(entering > 0, leaving / entering, torch.zeros_like(leaving))
    return _scaled(l1(layer) * ratio.sum(1).to(layer.weight.dtype))


def l1(layer: nn.Conv2d) -> Tensor:
    """(M,) the mean absolute weight of every filter."""
    return layer.weight.detach().abs().flatten(1).mean(1)


def _scaled(found: Tensor) -> Tensor:
    low, high = found.min(), found.max()
    return (found - low) / (high - low) if high > low else torch.zeros_like(found)
