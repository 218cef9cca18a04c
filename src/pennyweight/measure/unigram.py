"""A loss that is fair across vocabularies: by how much a model beats the frequencies of its own tokens.

Row 74. Source: C. Tao et al., "Scaling Laws with Vocabulary: Larger Models Deserve Larger Vocabularies",
arXiv:2407.13623: L_u = -mean(log p(w | context) - log p(w)), p(w) the unigram frequency. Usually negative.

Shape letters: W windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import DataError
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.laws.vocab import unigram_normalized


def unigram_normalized_loss(model: Any, text: Any, *, frequencies: Tensor | None = None, batch: int = 4) -> float:
    """L_u of ``model`` on ``text``, nats a token; lower is better, and comparable between vocabularies.

    Args:
        model: a causal language model: a module, or a Pennyweight model (whose tokenizer reads strings).
        text: token ids (W, T), or strings, one window each, scored one by one.
        frequencies: (V,) of tokens in other text, such as the training text; None counts the scored tokens of ``text``.
        batch: windows run together.

    Raises:
        DataError: a token without a frequency, or strings without a tokenizer.
    """
    module: nn.Module = model if isinstance(model, nn.Module) else model.module
    if isinstance(text, Tensor):
        windows = [text]
    else:
        texts = [text] if isinstance(text, str) else list(text)
        if isinstance(model, nn.Module):
            raise DataError("unigram_normalized_loss: a bare module reads token ids; give those, or a loaded model")
        tokenizer = model.need_tokenizer()
        windows = [torch.tensor([tokenizer(one)["input_ids"]]) for one in texts]
    losses = torch.cat([token_losses(module, ids, batch=batch).flatten() for ids in windows])
    targets = torch.cat([ids[:, 1:].flatten() for ids in windows])
    counts = torch.bincount(targets).double() if frequencies is None else frequencies.double()
    if int(targets.max()) >= len(counts) or not (counts[targets] > 0).all():
        raise DataError("unigram_normalized_loss: a token of the text has frequency 0; count it on more text")
    unigram = (counts / counts.sum()).log()[targets]
    return unigram_normalized(-losses.numpy(), unigram.numpy())


#: The name the source's own language has it under.
unigram_normalised_loss = unigram_normalized_loss
