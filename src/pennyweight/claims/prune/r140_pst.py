"""Row 140, PST: learned scores of low rank against magnitude, a few percent of the numbers trained.

Not shown at this size: an adapter of more rank, its mask by magnitude, is better by 0.017 nats; a score trained for
every weight is better than both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, adapting, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.levers.prune.pst import PST, Scored, Sparsening
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group
from pennyweight.train.sparsity_schedules import between_plateaus

_SEEDS = (0, 1)
_SPARSITY, _STEPS, _BATCH, _RATE = 0.9, 400, 16, 1e-3
_RANK = 4  # of update and scores; with its rows and columns PST trains as much as one update of rank 9
_MARGIN = 0.01  # nats


class _Every(Scored):
    """A score for every weight, as movement pruning trains them."""

    def __init__(self, matrix: Tensor, generator: torch.Generator) -> None:
        super().__init__(matrix, rank=_RANK, score_rank=0, generator=generator)
        self.every = nn.Parameter(torch.zeros(self.shape))

    def scores(self, weight: Tensor) -> Tensor:
        return weight.abs() + self.every


def _lever(samples: int, rank: int, score_rank: int, alpha: float) -> PST:
    return PST(
        sparsity=_SPARSITY, rank=rank, score_rank=score_rank, alpha_low=alpha, alpha_lines=alpha, steps=_STEPS,
        batch=_BATCH, rate=_RATE, samples=samples, dtype="float32",
    )  # fmt: skip


def _movement(model: Model, seen: Tensor, seed: int) -> int:
    """All scores trained; how many numbers that takes."""
    g = torch.Generator().manual_seed(seed)
    inside = [one for one in model.anatomy.layers() if one.block is not None]
    layers = [_Every(anatomy.matrix(model.module, one), g) for one in inside]
    for one, layer in zip(inside, layers, strict=True):
        anatomy.replace(model.module, one.path, layer)
    lever = _lever(len(seen), _RANK, 0, 1.0)
    group = Group([one for layer in layers for one in (layer.up, layer.down, layer.every)], _RATE)
    ramp = between_plateaus(_STEPS, _SPARSITY, before=0.1, after=0.3)
    work = adapting.work(model, seen, seed)
    lever.tune(model, work, [group], lever.loss(model, "claim"), stage="", callbacks=[Sparsening([*layers], ramp)])
    return sum(one.numel() for one in group.parameters)


@claim(row=140, pace="slow", headline="comparable BERT performance with 1.5 % of the parameters trained (abstract)")
@tiny.one_thread()
def learned_scores_choose_better_than_magnitude(assets: Assets) -> Outcome:
    """A GPT of bytes goes from code to articles while nine tenths of its weights go; two seeds."""
    source, (seen, held) = adapting.pretrained(), adapting.articles()
    found: dict[str, list[Tensor]] = {"pst": [], "magnitude": [], "movement": []}
    rivals = {"pst": _lever(len(seen), _RANK, _RANK, 1.0), "magnitude": _lever(len(seen), 2 * _RANK + 1, 0, 0.0)}
    every = 0
    for seed in _SEEDS:
        for name, lever in rivals.items():
            model = adapting.copied(source)
            lever.change(model, adapting.work(model, seen, seed))
            found[name].append(adapting.losses(model, held))
        model = adapting.copied(source)
        every = _movement(model, seen, seed)
        found["movement"].append(adapting.losses(model, held))
    shapes = [one.shape for one in source.anatomy.layers() if one.block is not None]
    trained = sum((2 * _RANK + 1) * (m + n) for m, n in shapes)
    gain = adapting.gain(found["magnitude"], found["pst"])
    method, baseline, control = (float(torch.stack(one).mean()) for one in found.values())
    return Outcome(
        method=method,
        baseline=baseline,
        unit="held-out nats a byte at 90 % zeros",
        holds=gain.high < -_MARGIN,
        control=("a score trained for every weight", control),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=(
            f"{trained} numbers trained by both rivals, {every} with all scores, of {sum(m * n for m, n in shapes)} "
            "weights; the baseline is an adapter of more rank, the mask that of the largest sums"
        ),
    )
