"""How far a changed language model departs from the original, over the same windows.

Shape letters: W windows, T tokens of a window, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError
from pennyweight.evaluate.forward import looking
from pennyweight.evaluate.logits import Logits, check_windows
from pennyweight.evaluate.perplexity import Report, check_finite


@dataclass(frozen=True)
class Agreement:
    """What two models say of the token after each one but the last.

    Attributes:
        same: (W, T-1) bool: the same token is the likeliest to both.
        kl: (W, T-1) float32, nats: the Kullback-Leibler divergence from the original's distribution to the other's;
            not below 0 but for rounding.
        original_losses: (W, T-1) float32, nats: those of `token_losses`.
        other_losses: likewise.
    """

    same: Tensor
    kl: Tensor
    original_losses: Tensor
    other_losses: Tensor


def agreement(
    original: nn.Module,
    other: nn.Module,
    windows: Tensor,
    *,
    batch: int = 4,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
) -> Agreement:
    """Compare ``other`` with ``original`` position by position; no more than two chunks of logits exist at a time.

    Args:
        original: a causal language model.
        other: one over the same vocabulary.
        windows: (W, T) token ids.
        batch: windows run together.
        dtype: of matrix products, as in `token_losses`.
        report: called with the windows done and W.

    Raises:
        DataError: windows that are no token ids of these models, or shorter than two tokens.
        ModelError: different vocabularies, or outputs that are not finite.
    """
    first, second = Logits(original), Logits(other)
    for logits in (first, second):
        check_windows(windows, logits)
    targets, at = windows[:, 1:].flatten(), 0
    same = torch.empty(len(targets), dtype=torch.bool)
    rest = torch.empty(3, len(targets))  # divergence, losses of the original, losses of the other
    with looking(original, dtype), looking(other, dtype):
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch]
            for p, q in zip(first(ids), second(ids), strict=True):
                if p.shape != q.shape:
                    raise ModelError(f"agreement: vocabularies of {p.shape[-1]} and {q.shape[-1]} do not compare")
                part = slice(at, at + len(p))
                same[part], rest[:, part] = _compare(p, q.to(p.device), targets[part].to(p.device))
                at = part.stop
            check_finite(rest[0, :at].view(-1, windows.shape[1] - 1), "divergence")
            if report is not None:
                report(start + len(ids), len(windows))
    return Agreement(*(tensor.view(len(windows), -1) for tensor in (same, *rest)))


def _compare(p: Tensor, q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (C, V) twice, (C,) -> (C,), (3, C)
    same = p.argmax(-1) == q.argmax(-1)
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    at = targets[:, None]
    return same, torch.stack([(p.exp() * (p - q)).sum(-1), -p.gather(-1, at)[:, 0], -q.gather(-1, at)[:, 0]])
