"""What claims about merging byte-level experts share: how much of their gains is kept, window by window.

Shape letters: C windows of a task, E experts (one a task).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pennyweight.claims.experts import TASKS, Experts, parameters, windows
from pennyweight.claims.tiny import gpt
from pennyweight.evaluate.perplexity import token_losses


class Kept:
    """Shares of the experts' gains that merged parameters keep on held-out windows."""

    def __init__(self, known: Experts, tasks: Sequence[str] = TASKS) -> None:
        self.tasks = tasks
        before = self._losses(parameters(known.base))
        own = [self._losses(parameters(model))[:, n] for n, model in enumerate(known.models)]
        self._before, self._gain = before, (before - torch.stack(own, 1)).mean(0)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(C * E,): their mean is the mean over tasks of the share that is kept; one may be any number."""
        return ((self._before - self._losses(tensors)) / self._gain).flatten()

    @torch.inference_mode()
    def _losses(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Held-out nats a byte of each window (C, E)."""
        module = gpt(width=64).eval()
        module.load_state_dict(dict(tensors), strict=False)
        held = [windows(task, "heldout", 192) for task in self.tasks]
        return torch.stack([token_losses(module, one, batch=96).mean(1) for one in held], 1)
