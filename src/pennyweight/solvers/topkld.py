"""TopKLD: a divergence that seeks the teacher's likeliest tokens, and covers the rest of what it knows.

Row 112. Source: X. Ding et al., "Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models",
arXiv:2501.06218: a distillation loss for low-bit students of token generators that balances explicit knowledge (the K
tokens that the sampler draws from) with implicit knowledge. Differs from the source: its formula could not be read,
and this is the loss that its abstract and reviews describe: reverse divergence on the teacher's top K, forward
divergence on the rest. Each part has the two masses added, as divergences of unnormalized measures have, so that it is
never negative, and zero only where student and teacher agree on every token of it.

Shape letters: ... any leading dimensions, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pennyweight.errors import OptionError, ShapeError

Direction = Literal["reverse", "forward"]


def topkld(student: Tensor, teacher: Tensor, k: int, *, top: Direction = "reverse") -> Tensor:
    """The loss in nats of every row, without a mean: (...).

    With p the teacher's probabilities and q the student's: the sum of q log(q/p) - q + p over the K tokens of largest
    p, plus the sum of p log(p/q) - p + q over the others. Of tokens that are equally likely the first count as top.

    Args:
        student: (..., V) logits.
        teacher: (..., V) logits; gets no gradient.
        k: K, 0 to V.
        top: divergence on the top K; the rest has the other one.

    Exact limits: K = 0 is the forward divergence KL(p || q), K = V the reverse one KL(q || p); with ``top="forward"``
    the other way round.

    Raises:
        ShapeError: logits that do not fit each other.
        OptionError: a K outside 0 to V, or another direction.
    """
    if student.shape != teacher.shape or not student.ndim:
        raise ShapeError(f"topkld: logits of {tuple(student.shape)} and {tuple(teacher.shape)}; give the same shape")
    vocabulary = student.shape[-1]
    if not 0 <= k <= vocabulary or top not in ("reverse", "forward"):
        raise OptionError(
            f"topkld: k = {k}, top = {top!r} for {vocabulary} tokens; give 0 to {vocabulary}, and reverse or forward"
        )
    log_q, log_p = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    # a stable sort, so that ties are broken the same everywhere
    likeliest = log_p.argsort(dim=-1, descending=True, stable=True)[..., :k]
    chosen = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, likeliest, True)
    reverse = q * (log_q - log_p) - q + p
    forward = p * (log_p - log_q) - p + q
    inside, outside = (reverse, forward) if top == "reverse" else (forward, reverse)
    return torch.where(chosen, inside, outside).sum(-1)
