"""What claims about merging share: a byte-level GPT trained on prose, and four experts fine-tuned from it.

Tweets, code, news, and prose in capitals; two more tasks that none of them saw: film reviews, and tweets in capitals.
Every text has a held-out part of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from pennyweight.claims.tiny import LENGTH, VOCABULARY, gpt
from pennyweight.data import documents
from pennyweight.data.windowing import Part
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.merge.moments import second_moments
from pennyweight.train import Samples, Trainer, byte_windows
from pennyweight.train.schedules import cosine
from pennyweight.zoo.gpt import GPT

TASKS = ("tweets", "stdlib-code", "news", "WIKI")
OUTSIDE = ("polarity", "TWEETS")
_CHARACTERS = 2_000_000


@lru_cache(maxsize=16)
def windows(task: str, part: Part, count: int) -> Tensor:
    """Windows (C, T) of a task; a name in capitals is its text in capitals."""
    texts = documents(task.lower())
    if task == "wiki":
        texts = texts[: len(texts) // 2]
    elif task == "WIKI":
        texts = [text.upper() for text in texts[len(texts) // 2 :]]
    elif task.isupper():
        texts = [text.upper() for text in texts]
    found = byte_windows(texts, part=part, length=LENGTH, count=count)
    return found.clamp_(max=VOCABULARY - 1)


@dataclass(frozen=True)
class Experts:
    """The base, the experts in the order of `TASKS`, and each one's second moments."""

    base: GPT
    models: tuple[GPT, ...]
    moments: tuple[dict[str, Tensor], ...]


def trained(module: GPT, task: str, *, steps: int, peak: float, seed: int = 0) -> tuple[GPT, dict[str, Tensor]]:
    """A copy trained on a task, and the second moments of its optimizer."""
    module = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    samples = Samples(windows(task, "calibration", 4096 if task != "polarity" else 256), seed=seed)
    Trainer(
        module, optimizer, samples, batch=32, schedule=cosine(total=steps, warmup=steps // 10, peak=peak), clip=1.0
    ).run(steps)
    return module.eval(), second_moments(module, optimizer)


@lru_cache(maxsize=2)
def experts(width: int = 64) -> Experts:
    """Trained once a process: a base on prose, then every expert from it."""
    base, _ = trained(gpt(width=width), "wiki", steps=400, peak=3e-3)
    found = [trained(base, task, steps=150, peak=1e-3, seed=n + 1) for n, task in enumerate(TASKS)]
    return Experts(base, tuple(one for one, _ in found), tuple(moments for _, moments in found))


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """By name, tied ones once."""
    return {name: one.detach() for name, one in module.named_parameters()}


@torch.inference_mode()
def losses(tensors: Mapping[str, Tensor], tasks: Sequence[str] = (*TASKS, *OUTSIDE), *, width: int = 64) -> list[float]:
    """Held-out nats a byte of given parameters on each task."""
    module = gpt(width=width).eval()
    module.load_state_dict(dict(tensors), strict=False)
    found = []
    for task in tasks:
        held = windows(task, "heldout", 48 if task == "polarity" else 192)
        found.append(float(token_losses(module, held, batch=96).mean()))
    return found
