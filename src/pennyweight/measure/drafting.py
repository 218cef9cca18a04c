"""Greedy speculative decoding, to see how much of what a draft model writes its target lets stand.

Source: Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, for greedy
decoding: a token of the draft stands where the target would have written it, and the target writes the one after the
last that stands. Differs from the source: no cache, since it counts and does not time.

Shape letters: T tokens of a prompt, G tokens written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.evaluate.forward import looking
from pennyweight.train.self_data import logits_of


@dataclass(frozen=True)
class Drafted:
    """What was written with a draft.

    Attributes:
        ids: (G,) tokens after the prompt, those that the target would have written alone.
        proposed: tokens of the draft.
        accepted: of them, those that stand.
        passes: runs of the target; without a draft there are as many as tokens.
    """

    ids: Tensor
    proposed: int
    accepted: int
    passes: int

    @property
    def acceptance(self) -> float:
        """Share of the draft's tokens that stand."""
        return self.accepted / self.proposed if self.proposed else 0.0


def speculate(target: nn.Module, draft: nn.Module, prompt: Tensor, *, tokens: int, ahead: int = 4) -> Drafted:
    """Write ``tokens`` tokens after ``prompt`` (T,) as ``target`` does greedily, ``ahead`` of them drafted at a time.

    Raises:
        OptionError: nothing to write or to draft.
    """
    if tokens < 1 or ahead < 1 or prompt.ndim != 1 or not len(prompt):
        raise OptionError(f"speculate: {tokens} tokens, {ahead} ahead, prompt {tuple(prompt.shape)}; give 1 or more")
    ids, proposed, accepted, passes = prompt[None], 0, 0, 0
    end = len(prompt) + tokens
    with looking(target), looking(draft):
        while ids.shape[1] < end:
            known = ids.shape[1]
            count = min(ahead, end - known - 1)
            guess = ids
            for _ in range(count):
                guess = torch.cat([guess, logits_of(draft, guess)[:, -1].argmax(-1, keepdim=True)], 1)
            wanted = logits_of(target, guess)[:, known - 1 :].argmax(-1)  # (1, count + 1)
            stands = int((guess[0, known:] == wanted[0, :count]).cumprod(0).sum())
            ids = torch.cat([ids, wanted[:, : stands + 1]], 1)
            proposed, accepted, passes = proposed + count, accepted + stands, passes + 1
    return Drafted(ids[0, len(prompt) :], proposed, accepted, passes)
