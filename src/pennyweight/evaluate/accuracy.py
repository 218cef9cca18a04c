"""Whether a classifier is right on each sample.

Shape letters: S samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pennyweight.errors import DataError, ModelError
from pennyweight.evaluate.forward import device_of, first_tensor, looking


def predictions(
    module: nn.Module, inputs: Tensor | Mapping[str, Tensor], *, batch: int = 64, dtype: torch.dtype | None = None
) -> Tensor:
    """The likeliest class (S,) of each sample.

    Args:
        module: returns scores (S, K), or an output that holds them as ``logits``.
        inputs: (S, ...), or several by the names the model takes them under.
        batch: samples run together.
        dtype: of matrix products, as in `looking`.

    Raises:
        DataError: no samples, or inputs of different lengths.
        ModelError: scores that are not (S, K) or not finite; it names the sample.
    """
    counts = {len(tensor) for tensor in ([inputs] if isinstance(inputs, Tensor) else inputs.values())}
    if len(counts) != 1 or 0 in counts:
        raise DataError(f"accuracy: inputs hold {sorted(counts) or 'no'} samples; give one number above 0")
    count, device = counts.pop(), device_of(module)
    found: list[Tensor] = []
    with looking(module, dtype):
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            if isinstance(inputs, Tensor):
                output = module(inputs[part].to(device))
            else:
                output = module(**{name: tensor[part].to(device) for name, tensor in inputs.items()})
            scores = first_tensor(output)
            size = min(batch, count - start)
            if scores.ndim != 2 or len(scores) != size:
                raise ModelError(
                    f"accuracy: scores of shape {tuple(scores.shape)} for {size} samples; want (samples, K)"
                )
            wrong = ~torch.isfinite(scores).all(-1)
            if wrong.any():
                raise ModelError(f"sample {start + int(wrong.nonzero()[0])}: its scores are not finite")
            found.append(scores.argmax(-1).cpu())
    return torch.cat(found)


def correct(
    module: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    labels: Tensor,
    *,
    batch: int = 64,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Whether each sample is given its label: (S,) bool; its mean is the accuracy. As `predictions`."""
    said = predictions(module, inputs, batch=batch, dtype=dtype)
    if labels.shape != said.shape:
        raise DataError(f"accuracy: labels of shape {tuple(labels.shape)} for {len(said)} samples; give one a sample")
    return said == labels.cpu()
