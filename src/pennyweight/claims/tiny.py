"""What claims about training share: a byte-level GPT small enough to train in seconds, and code to train it on.

Python's own library source, as bytes below 128; documents of the held-out part are never trained on.

Shape letters: C windows, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from pennyweight.evaluate.perplexity import token_losses
from pennyweight.levers.prune.gradual import GradualPruning
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.train import Samples, Trainer, byte_windows
from pennyweight.train.loop import Callback
from pennyweight.train.schedules import Schedule, wsd
from pennyweight.train.sparsity_schedules import SparsitySchedule
from pennyweight.work import ModelLever, Work
from pennyweight.zoo.gpt import GPT, GPTConfig

VOCABULARY = 128
LENGTH = 33  # 32 predictions a window
HELD_OUT = 512


@contextmanager
def one_thread() -> Iterator[None]:
    """Products this small run fastest on one thread; on a busy machine a second one slows them down twentyfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def text() -> tuple[Tensor, Tensor]:
    """Windows (C, T) to train on, and 512 to judge by."""
    train = byte_windows("stdlib-code", part="calibration", length=LENGTH)
    held = byte_windows("stdlib-code", part="heldout", length=LENGTH, count=HELD_OUT)
    return train.clamp_(max=VOCABULARY - 1), held.clamp_(max=VOCABULARY - 1)


def gpt(*, width: int, depth: int = 2, num_heads: int = 2, seed: int = 0) -> GPT:
    """A GPT of bytes with random weights."""
    config = GPTConfig(width=width, depth=depth, num_heads=num_heads, vocabulary=VOCABULARY, context=LENGTH)
    return GPT(config, generator=torch.Generator().manual_seed(seed))


def trainer(
    module: nn.Module, schedule: Schedule, *, batch: int, seed: int = 0, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """AdamW without weight decay, at the rate of ``schedule``; ``seed`` orders the samples."""
    return Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=0.0),
        Samples(text()[0], seed=seed),
        batch=batch,
        schedule=schedule,
        clip=1.0,
        callbacks=callbacks,
    )


def layers(module: GPT) -> list[nn.Linear]:
    """The linear layers in its blocks."""
    found = [module.get_submodule(one.path) for one in anatomy.of(module).layers() if one.block is not None]
    return [layer for layer in found if isinstance(layer, nn.Linear)]


def trained(
    module: GPT, steps: int, *, rate: float = 6e-3, seed: int = 0, sparsity: SparsitySchedule | None = None
) -> GPT:
    """``module``, trained in place for ``steps`` of 32 windows and pruned by magnitude on the way where asked for."""
    pruning = [GradualPruning(layers(module), sparsity)] if sparsity else []
    schedule = wsd(steps, steps // 20, 0.3, "linear", peak=rate)
    trainer(module, schedule, batch=32, seed=seed, callbacks=pruning).run(steps)
    for one in pruning:
        one.finish()
    return module


def held_out_losses(module: nn.Module) -> Tensor:
    """Nats a byte on held-out windows: (C, T-1)."""
    return token_losses(module, text()[1], batch=128)


@lru_cache(maxsize=2)
def reader(width: int = 64, steps: int = 800) -> Model:
    """A GPT of bytes that has read program code; shared, so not to be changed: copy it."""
    module = gpt(width=width)
    with one_thread():
        trainer(module, wsd(steps, steps // 20, 0.3, "linear", peak=5e-3), batch=32).run(steps)
    return Model(module.eval(), None, "a GPT of bytes", kind="causal-lm")


def changed(model: Model, lever: ModelLever, *, windows: int, seed: int = 0) -> Model:
    """A copy whose blocks ``lever`` has changed, on that many windows of the text to train on."""
    made = replace(model, module=copy.deepcopy(model.module))
    maps = tuple(found for found in made.anatomy.layers() if found.block is not None)
    lever.change(made, Work(model=made, windows=text()[0][:windows], maps=maps, seed=seed))
    return made
