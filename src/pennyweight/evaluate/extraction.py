"""Memorization: how much of a text a model gives back word for word when it is told how the text begins.

Row 34. Source: A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, section 10: 100
tokens of training text, the first 50 as the prompt, 50 decoded greedily, and the share of sequences whose continuation
matches exactly; it grows with the logarithm of the size, and with how often a sequence was seen. Differs from the
source: nothing is decoded. As long as the continuation so far is the text's own, greedy decoding has read the text
itself, so that one pass over the text tells where the two first part.

Shape letters: W sequences, T tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.errors import DataError, OptionError
from pennyweight.evaluate.forward import looking
from pennyweight.evaluate.logits import Logits, check_windows
from pennyweight.model.model import Model


@dataclass(frozen=True)
class Memorisation:
    """What a model gives back of each sequence.

    Attributes:
        leading: (W,) int64: tokens of the continuation that are right before the first wrong one.
        gen: tokens of a whole continuation.
        prompt: tokens the model was given.
    """

    leading: Tensor
    gen: int
    prompt: int

    @property
    def matches(self) -> Tensor:
        """(W,) bool: the continuation is the text's, to the last token."""
        return self.leading >= self.gen

    @property
    def exact_match(self) -> float:
        """Share of sequences given back whole."""
        return float(self.matches.float().mean())

    def __float__(self) -> float:
        return self.exact_match


def memorisation(
    model: Model | nn.Module,
    data: Tensor | Sequence[str],
    prompt: int = 50,
    gen: int = 50,
    *,
    batch: int = 8,
    dtype: torch.dtype | None = None,
) -> Memorisation:
    """Which continuations of ``gen`` tokens greedy decoding would give back after a prompt of ``prompt`` tokens.

    Exact but for ties between logits, and for what decoding with a cache rounds differently.

    Args:
        model: a causal language model; one with a tokenizer where ``data`` is text.
        data: (W, T) token ids, of which the first ``prompt + gen`` of each row count; or texts, of which those with
            fewer tokens are left out.
        prompt: tokens given.
        gen: tokens asked for.
        batch: sequences run together.
        dtype: of matrix products, as in `looking`.

    Raises:
        OptionError: no prompt, or nothing asked for.
        DataError: sequences too short, or text for a model without a tokenizer.
    """
    if prompt < 1 or gen < 1:
        raise OptionError(f"memorisation: prompt = {prompt}, gen = {gen}; give at least 1 token of each")
    length = prompt + gen
    ids = data if isinstance(data, Tensor) else _tokens(model, data, length)
    if ids.ndim != 2 or ids.shape[1] < length:
        raise DataError(
            f"memorisation: token ids of shape {tuple(ids.shape)}; {prompt} tokens of prompt and {gen} of continuation "
            f"take rows of {length}"
        )
    ids = ids[:, :length]
    logits = Logits(model.module if isinstance(model, Model) else model)
    check_windows(ids, logits)
    said: list[Tensor] = []
    with looking(logits.module, dtype):
        for part in torch.split(ids, batch):
            likeliest = torch.cat([chunk.argmax(-1).cpu() for chunk in logits(part)])
            said.append(likeliest.view(len(part), length - 1)[:, prompt - 1 :])
    right = torch.cat(said) == ids[:, prompt:].cpu()  # (W, gen)
    return Memorisation(right.long().cumprod(1).sum(1), gen, prompt)


def _tokens(model: Model | nn.Module, texts: Sequence[str], length: int) -> Tensor:
    """The first ``length`` tokens of each text that has so many."""
    if isinstance(texts, str) or not isinstance(model, Model):
        raise DataError("memorisation: give a list of texts and a loaded model with its tokenizer, or token ids (W, T)")
    found = model.need_tokenizer()(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    kept = [ids[:length] for ids in found if len(ids) >= length]
    if not kept:
        longest = max(map(len, found), default=0)
        raise DataError(f"memorisation: the longest of {len(found)} texts has {longest} tokens; {length} are needed")
    return torch.tensor(kept)


#: American spelling of the same.
memorization = memorisation
