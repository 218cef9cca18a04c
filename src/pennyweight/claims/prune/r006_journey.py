"""Row 6, Journey Matters: a run pruned from 25 to 75 % ends like the dense model of its average size, and smaller."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.laws import average_params, fit_sparse
from pennyweight.solvers.masks import Selection
from pennyweight.train.sparsity_schedules import between_plateaus, mean_sparsity
from pennyweight.zoo.gpt import GPT

_SEEDS = (0, 1, 2)
_STEPS = 450
_WIDTHS = (32, 38, 46, 54, 64)  # of the dense models
#: (width of the sparse run, width of the dense model of its average size)
_PAIRS = ((64, 46), (64, 54), (54, 38))
_GAP = 0.03  # nats


class _Run(NamedTuple):
    losses: Tensor  # (seeds,)
    initial: int
    average: float
    final: int


def _params(module: GPT) -> tuple[int, int]:
    """Weights in blocks, and those that are not zero."""
    weights = [layer.weight for layer in tiny.layers(module)]
    return sum(weight.numel() for weight in weights), sum(int(weight.count_nonzero()) for weight in weights)


def _sparsity(width: int, twin: int) -> float:
    """The final sparsity at which a cubic ramp from 25 to 75 % has the average size of a dense model of ``twin``."""
    schedule = between_plateaus(_STEPS, 1.0)
    return (1 - (twin / width) ** 2) / mean_sparsity(schedule, _STEPS)


def _run(width: int, sparsity: float = 0.0, *, late: bool = False) -> _Run:
    losses = []
    schedule = between_plateaus(_STEPS, sparsity) if sparsity and not late else None
    for seed in _SEEDS:
        module = tiny.trained(tiny.gpt(width=width, num_heads=1, seed=seed), _STEPS, seed=seed, sparsity=schedule)
        if late:
            _cut(module, sparsity)
        losses.append(tiny.held_out_losses(module).double().mean())
    initial, final = _params(module)
    average = initial if schedule is None else average_params(initial, schedule, total=_STEPS)
    return _Run(torch.stack(losses), initial, average, final)


@torch.no_grad()
def _cut(module: GPT, sparsity: float) -> None:
    layers = tiny.layers(module)
    for layer, kept in zip(
        layers, Selection(sparsity=sparsity).kept([one.weight.abs() for one in layers]), strict=True
    ):
        layer.weight.masked_fill_(~kept, 0)


@claim(
    row=6,
    pace="slow",
    headline="the law holds over 80 schedules; up to twice smaller models at equal loss (abstract, section 5)",
)
@tiny.one_thread()
def average_size_says_the_loss(assets: Assets) -> Outcome:
    """Dense widths and sparse runs of the average size of some, three seeds each, equal tokens for all."""
    dense = {width: _run(width) for width in _WIDTHS}
    sparse = {pair: _run(pair[0], _sparsity(*pair)) for pair in _PAIRS}
    late = _run(64, _sparsity(64, 46), late=True)
    gaps, equal, smaller = [], True, True
    for pair, run in sparse.items():
        twin = dense[pair[1]]
        gaps.append(float((run.losses - twin.losses).mean()))
        equal &= abs(gaps[-1]) <= _GAP
        smaller &= run.final < 0.95 * twin.final and abs(run.average / twin.average - 1) < 0.001
    every = [*dense.values(), *sparse.values()]
    law = fit_sparse(
        {
            "N0": [run.initial for run in every],
            "N_avg": [run.average for run in every],
            "N_final": [run.final for run in every],
            "D": [_STEPS] * len(every),
            "loss": [float(run.losses.mean()) for run in every],
        }
    )
    chosen, twin = sparse[_PAIRS[0]], dense[_PAIRS[0][1]]
    method, baseline, control = (float(run.losses.mean()) for run in (chosen, twin, late))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="held-out nats a byte",
        holds=equal and smaller and law.best == "average" and control > method + _GAP,
        control=("the same zeros, cut at once at the end", control),
        notes=(
            f"{chosen.final:,} weights left of {chosen.initial:,}, {chosen.average:,.0f} on average, against "
            f"{twin.final:,}; gaps of the pairs "
            + ", ".join(f"{gap:+.3f}" for gap in gaps)
            + "; error of laws on runs "
            "left out: " + ", ".join(f"{error:.2%} in {size} size" for size, error in law.errors.items())
        ),
    )
