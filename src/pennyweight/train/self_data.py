"""Self-data distillation: a pruned model recovers on answers that the unpruned model wrote itself.

Row 93. Source: V. Thangarasa et al., "Self-Data Distillation for Recovering Quality in Pruned Large Language Models",
arXiv:2410.09982: for each pair the original model is asked with the gold answer in view and writes its own; the answer
is taken where it passes a check of the task, and the gold one stays elsewhere; the pruned model is tuned on the
responses. Differs from the source: the check is the caller's; without one every answer is taken.

Shape letters: B pairs, P tokens of a prompt, R tokens of a response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import DataError, OptionError
from pennyweight.evaluate.forward import looking
from pennyweight.train.loop import Loss
from pennyweight.train.samples import Batch

#: Whether an answer (R,) may stand for the gold one (R,).
Accept = Callable[[Tensor, Tensor], bool]


@dataclass(frozen=True)
class Rewritten:
    """Responses as the original writes them.

    Attributes:
        responses: (B, R) its own, or the gold ones where its own were not accepted.
        accepted: (B,) bool.
    """

    responses: Tensor
    accepted: Tensor


def logits_of(module: nn.Module, ids: Tensor) -> Tensor:
    """(B, T, V) logits in float32, of a model of this package or of ``transformers``."""
    found = module(ids)
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits.float()


def rewrite(
    original: nn.Module,
    asks: Tensor,
    gold: Tensor,
    *,
    accept: Accept | None = None,
    temperature: float = 1.0,
    batch: int = 256,
    seed: int = 0,
) -> Rewritten:
    """Let ``original`` write the responses.

    Args:
        original: the model before it was pruned.
        asks: (B, P) what it is asked: context and prompt, and the gold answer where it can read one.
        gold: (B, R) the answers of the data set.
        accept: called with an answer and the gold one; None takes every answer.
        temperature: of the draws; 0 takes the likeliest token.
        batch: asks at a time.
        seed: of the draws.

    Raises:
        DataError: asks and answers that do not belong together.
        OptionError: a temperature below 0.
    """
    if asks.ndim != 2 or gold.ndim != 2 or len(asks) != len(gold) or not gold.shape[1] or not asks.shape[1]:
        raise DataError(f"self-data: asks {tuple(asks.shape)}, answers {tuple(gold.shape)}; give (B, P) and (B, R)")
    if temperature < 0:
        raise OptionError(f"self-data: temperature {temperature}; give 0 or more")
    generator = torch.Generator().manual_seed(seed)
    written = []
    with looking(original):
        for start in range(0, len(asks), batch):
            ids = asks[start : start + batch]
            for _ in range(gold.shape[1]):
                last = logits_of(original, ids)[:, -1]
                if temperature:
                    chosen = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
                else:
                    chosen = last.argmax(-1, keepdim=True)
                ids = torch.cat([ids, chosen], 1)
            written.append(ids[:, asks.shape[1] :])
    own = torch.cat(written)
    taken = torch.tensor([accept is None or accept(one, other) for one, other in zip(own, gold, strict=True)])
    return Rewritten(torch.where(taken[:, None], own, gold), taken)


def response_loss(prompt: int) -> Loss:
    """The mean loss in nats of the tokens after the first ``prompt`` of each window, for a `Trainer`."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        ids = batch[0]
        logits = logits_of(module, ids[:, :-1])[:, prompt - 1 :]
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten())

    return loss
