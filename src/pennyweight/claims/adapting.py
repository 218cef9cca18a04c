"""What claims about tuning share: a GPT of bytes that has read program code, and articles it is to learn.

Shape letters: C windows, T tokens.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pennyweight.claims import tiny
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.measure import stats
from pennyweight.model.model import Model
from pennyweight.train import byte_windows
from pennyweight.train.schedules import wsd
from pennyweight.work import Work


def pretrained(*, width: int = 64, num_heads: int = 4, steps: int = 800) -> Model:
    """A GPT of bytes that has read program code."""
    module = tiny.gpt(width=width, num_heads=num_heads)
    tiny.trainer(module, wsd(steps, steps // 20, 0.3, "linear", peak=5e-3), batch=32).run(steps)
    return Model(module.eval(), None, "a GPT of bytes", kind="causal-lm")


def articles(count: int = 8192) -> tuple[Tensor, Tensor]:
    """Bytes of encyclopedia articles: windows (C, T) to train on, and 512 to judge by."""
    seen = byte_windows("wiki", part="calibration", length=tiny.LENGTH, count=count)
    held = byte_windows("wiki", part="heldout", length=tiny.LENGTH, count=tiny.HELD_OUT)
    return seen.clamp_(max=tiny.VOCABULARY - 1), held.clamp_(max=tiny.VOCABULARY - 1)


def copied(model: Model) -> Model:
    """A copy to change."""
    return Model(copy.deepcopy(model.module), None, model.name, kind=model.kind)


def work(model: Model, windows: Tensor, seed: int) -> Work:
    """All its layers, and ``windows`` to train on."""
    return Work(model=model, windows=windows, maps=model.anatomy.layers(), seed=seed)


@torch.no_grad()
def losses(model: Model, held: Tensor) -> Tensor:
    """Mean nats a byte of each window, (C,)."""
    return token_losses(model.module.eval(), held, batch=128).mean(1)


def gain(baseline: list[Tensor], method: list[Tensor]) -> stats.Interval:
    """What ``method`` loses more than ``baseline``, in nats a byte: of held-out windows, seeds averaged."""
    return stats.paired_difference(torch.stack(baseline).mean(0), torch.stack(method).mean(0))
