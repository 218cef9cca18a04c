"""Sentence embeddings of an encoder, and how near a changed encoder's lie to the original's.

The embedding is the mean of the last hidden states over the tokens that are not padding, scaled to length 1, as the
sentence-transformers family of MiniLM encoders does it. Source: N. Reimers and I. Gurevych, "Sentence-BERT: Sentence
Embeddings using Siamese BERT-Networks", 2019.

Shape letters: S sentences, W windows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import DataError, ModelError, ShapeError
from pennyweight.evaluate.forward import accepts, device_of, first_tensor, looking, run


def embed(
    module: nn.Module,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    batch: int = 32,
    length: int = 256,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The embeddings (S, D) of ``sentences``, float32 of length 1, on the CPU.

    Args:
        module: an encoder that returns hidden states (S, T, D) first or as ``last_hidden_state``.
        tokenizer: of the ``transformers`` kind, with a padding token.
        sentences: text.
        batch: sentences run together; like lengths together, so that little is padding.
        length: tokens after which a sentence is cut.
        dtype: of matrix products, as in `looking`.

    Raises:
        DataError: no sentences.
        ModelError: an embedding that is not finite; it names the sentence.
    """
    if not sentences:
        raise DataError("embeddings: no sentences; give at least one")
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    found: list[Tensor] = []
    with looking(module, dtype):
        for start in range(0, len(order), batch):
            texts = [sentences[index] for index in order[start : start + batch]]
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            inputs = {name: ids.to(device_of(module)) for name, ids in tokens.items() if accepts(module, name)}
            states = first_tensor(module(**inputs), "last_hidden_state")
            found.append(pool(states, tokens["attention_mask"]).cpu())
    return _finite(torch.cat(found)[torch.tensor(order).argsort()], "sentence")


def embed_windows(
    module: nn.Module,
    windows: Tensor,
    *,
    batch: int = 16,
    dtype: torch.dtype | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The embeddings (W, D) of windows of token ids (W, T) without padding; otherwise as `embed`."""
    found: list[Tensor] = []
    with looking(module, dtype):
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(device_of(module))
            found.append(pool(first_tensor(run(module, ids), "last_hidden_state"), torch.ones_like(ids)).cpu())
            if report is not None:
                report(start + len(ids), len(windows))
    return _finite(torch.cat(found), "window")


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``states`` (S, T, D) over tokens where ``mask`` (S, T) is 1, scaled to length 1: (S, D) float32."""
    if states.shape[:2] != mask.shape:
        raise ShapeError(f"states of shape {tuple(states.shape)} and a mask {tuple(mask.shape)} do not belong together")
    weights = mask.to(states.device, torch.float32)[..., None]
    mean = (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
    return nn.functional.normalize(mean, dim=-1)


def cosines(original: Tensor, other: Tensor) -> Tensor:
    """The cosine (S,) between rows of two sets of embeddings (S, D)."""
    if original.shape != other.shape:
        raise ShapeError(f"cosines: embeddings of shapes {tuple(original.shape)} and {tuple(other.shape)}; give equals")
    return nn.functional.cosine_similarity(original.double(), other.double(), dim=-1)


def _finite(vectors: Tensor, what: str) -> Tensor:
    wrong = ~torch.isfinite(vectors).all(-1)
    if wrong.any():
        raise ModelError(
            f"{what} {int(wrong.nonzero()[0])}: its embedding is not finite; the model's outputs are broken"
        )
    return vectors
