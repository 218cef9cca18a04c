"""Beta-rank in plain loops over positions: as the paper describes it, and as its code indexes it."""

import numpy as np


def described(inputs, outputs, weight, stride, padding=0):
    """Patches over rows and columns, all channels; (B, C, H, W) and so on, NumPy."""
    inputs = np.pad(inputs, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    return _ranks(
        inputs,
        outputs,
        weight,
        lambda i, j, h, w: inputs[:, :, i * stride : i * stride + h, j * stride : j * stride + w],
    )


def as_published(inputs, outputs, weight):
    """The slip: the second and third axes are cut as if they were rows and columns. Empty cuts are left out."""
    stride = inputs.shape[3] // outputs.shape[3]
    return _ranks(
        inputs,
        outputs,
        weight,
        lambda i, j, h, w: inputs[:, i * stride : i * stride + h, j * stride : j * stride + w, :],
    )


def _ranks(inputs, outputs, weight, patch):
    found = []
    for k in range(outputs.shape[1]):
        total = np.zeros(weight.shape[1:])
        for i in range(outputs.shape[2]):
            for j in range(outputs.shape[3]):
                seen = patch(i, j, *weight.shape[2:])
                if seen.size and seen.std() > 0:
                    total += np.abs(weight[k]) * outputs[:, k, i, j].std() / seen.std()
        found.append(total.mean())
    found = np.array(found)
    return (found - found.min()) / (found.max() - found.min())
