"""Row 88, patchification: smaller patches against larger at equal steps, and a resized patch that learns sooner.

On as few steps as these the smallest patches have not caught up: 4 beats 8 by far, and 2 does not beat 4.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pennyweight import laws
from pennyweight.adapt import repatch
from pennyweight.arch import vit
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.train import Trainer
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine

_SIDE, _PATCHES, _SEEDS, _STEPS, _BATCH, _CLASSES = 16, (8, 4, 2), (0, 1, 2), 700, 32, 4


class _Marks:
    """Endless images: one of four 2 x 2 marks somewhere among noise; its kind is the label."""

    _MARKS = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]], [[1, 0], [1, 0]]])

    def take(self, start: int, count: int) -> Batch:
        g = torch.Generator().manual_seed(start % (2**31))
        images = 0.25 * torch.randn(count, 1, _SIDE, _SIDE, generator=g)
        labels = torch.randint(0, _CLASSES, (count,), generator=g)
        for _ in range(3):  # three copies of the mark
            x, y = torch.randint(0, _SIDE - 1, (2, count), generator=g)
            for dx in (0, 1):
                for dy in (0, 1):
                    images[torch.arange(count), 0, x + dx, y + dy] += 1.5 * self._MARKS[labels, dx, dy]
        return images, labels


def _loss(module: torch.nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def _trained(patch: int, seed: int, steps: int, start: torch.nn.Module | None = None) -> torch.nn.Module:
    module = start or vit(patch, image=_SIDE, channels=1, width=32, depth=2, num_heads=2, classes=_CLASSES, seed=seed)
    Trainer(
        module, torch.optim.AdamW(module.parameters(), weight_decay=0.0), _Marks(), batch=_BATCH, loss=_loss,
        schedule=cosine(steps, steps // 10, peak=3e-3, floor=0.0), clip=1.0,
    ).run(steps)  # fmt: skip
    return module.eval()


@torch.no_grad()
def _judged(module: torch.nn.Module) -> float:
    return float(_loss(module, _Marks().take(2**30, 1000)))


_HEADLINE = "smaller patches always help, down to single pixels: 84.6 % (abstract)"


@cache
def _models(patch: int) -> tuple[torch.nn.Module, ...]:
    return tuple(_trained(patch, seed, _STEPS) for seed in _SEEDS)


@claim(row=88, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def smaller_patches_lower_the_loss(assets: Assets) -> Outcome:
    """Marks of two pixels among noise; patches of 8, 4 and 2 at equal steps."""
    means = {patch: float(np.mean([_judged(one) for one in _models(patch)])) for patch in _PATCHES}
    tokens = [(_SIDE // patch) ** 2 for patch in _PATCHES]
    law = laws.fit({"tokens": tokens, "loss": list(means.values())}, "power", axis="tokens", holdout=False)
    return Outcome(
        method=means[2],
        baseline=means[4],
        unit="test loss, nats, mean of three seeds",
        holds=bool(means[2] < means[4] < means[8]),
        control=("patches of 8", means[8]),
        notes=(
            "by patch: " + ", ".join(f"{patch}: {loss:.3f}" for patch, loss in means.items())
            + f"; baseline: patches of 4; exponent of tokens {law.alpha:.2f}; forward cost "
            + ", ".join(f"{laws.flops.vit(_SIDE, patch, 32, 2, channels=1).forward_flops:.2g}" for patch in _PATCHES)
        ),
    )  # fmt: skip


@claim(row=88, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def a_resized_patch_learns_sooner_than_a_fresh_one(assets: Assets) -> Outcome:
    """A quarter of the steps on patches of 2, from scratch and from the function that patches of 4 learned.

    The control is a fresh one trained with the compute of both.
    """
    short = _STEPS // 4
    costs = {patch: laws.flops.vit(_SIDE, patch, 32, 2, channels=1).forward_flops for patch in (4, 2)}
    both = short + round(_STEPS * costs[4] / costs[2])
    scratch, alike = ([_judged(_trained(2, seed, steps)) for seed in _SEEDS] for steps in (short, both))
    large = _models(4)
    turned = [_judged(_trained(2, seed, short, repatch(one, 2))) for seed, one in zip(_SEEDS, large, strict=True)]
    return Outcome(
        method=float(np.mean(turned)),
        baseline=float(np.mean(scratch)),
        unit="test loss of patches of 2 after a quarter of the steps, nats, mean of three seeds",
        holds=bool(np.mean(turned) < 0.8 * np.mean(scratch))
        and all(ours < theirs for ours, theirs in zip(turned, alike, strict=True)),
        control=(
            f"a fresh one, {both} steps: the compute of {_STEPS} on patches of 4 and of {short} on 2",
            float(np.mean(alike)),
        ),
        notes=f"the patches of 4 it began from: {float(np.mean([_judged(one) for one in large])):.3f}; by seed "
        + "; ".join(
            f"{ours:.3f} against {theirs:.3f} (as much compute {same:.3f})"
            for ours, theirs, same in zip(turned, scratch, alike, strict=True)
        ),
    )
