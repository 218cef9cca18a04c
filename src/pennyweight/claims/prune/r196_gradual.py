"""Row 196, to prune or not: at equal bytes a large sparse model, pruned while it trains, beats a small dense one."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.measure import stats
from pennyweight.solvers.masks import smallest
from pennyweight.train.sparsity_schedules import CubicSchedule
from pennyweight.zoo.gpt import GPT

_SEEDS = (0, 1, 2)
_STEPS = 2000
_LARGE, _SMALL = 64, 38  # widths; the small model gets a few bytes more
_SPARSITY = 0.75
_RATE = 6e-3
#: From a tenth of the training to 60 %: the rate is still at its peak, and what is cut can be made good.
_SCHEDULE = CubicSchedule(final=_SPARSITY, start=200, end=1200, every=10)
_MARGIN = 0.005  # nats


def _trained(width: int, seed: int, schedule: CubicSchedule | None = None) -> GPT:
    module = tiny.gpt(width=width, num_heads=1, seed=seed)
    return tiny.trained(module, _STEPS, rate=_RATE, seed=seed, sparsity=schedule)


@torch.no_grad()
def _pruned_at_once(module: GPT) -> GPT:
    for layer in tiny.layers(module):
        weight = layer.weight
        weight[smallest(weight.abs().flatten(), round(_SPARSITY * weight.numel())).view_as(weight)] = 0
    return module


def _bytes(module: GPT) -> int:
    """Of 16-bit values; a matrix with zeros in it is counted without them, but with a bit for each place."""
    layers = tiny.layers(module)
    inside = {id(layer.weight) for layer in layers}
    held = sum(2 * weight.numel() for weight in module.parameters() if id(weight) not in inside)
    for layer in layers:
        kept = int((layer.weight != 0).sum())
        held += min(2 * layer.weight.numel(), 2 * kept + -(-layer.weight.numel() // 8))
    return held


@claim(
    row=196,
    pace="slow",
    headline="large-sparse models consistently outperform small-dense ones, up to 10x fewer non-zeros (abstract)",
)
@tiny.one_thread()
def large_and_sparse_beats_small_and_dense(assets: Assets) -> Outcome:
    """Three seeds of each; the small model has the same depth, text, steps and rate, and no fewer bytes."""
    losses: dict[str, list[Tensor]] = {"sparse": [], "small": [], "at once": []}
    fits = True
    for seed in _SEEDS:
        sparse, small = _trained(_LARGE, seed, _SCHEDULE), _trained(_SMALL, seed)
        at_once = _pruned_at_once(_trained(_LARGE, seed))
        fits &= max(_bytes(sparse), _bytes(at_once)) <= _bytes(small)
        for name, module in (("sparse", sparse), ("small", small), ("at once", at_once)):
            losses[name].append(tiny.held_out_losses(module).mean(1))
    table = torch.stack([torch.stack(each) for each in losses.values()])  # (3 models, seeds, windows)
    method, baseline, control = table.mean((1, 2)).tolist()
    gain = stats.paired_difference(table[1].mean(0), table[0].mean(0))  # a held-out window is the sample
    every_seed = bool((table[0].mean(1) < table[1:].mean(2)).all())
    return Outcome(
        method=method,
        baseline=baseline,
        unit="held-out nats a byte",
        holds=fits and every_seed and gain.high < -_MARGIN and method < control - _MARGIN,
        control=("the same sparsity, cut at once after training", control),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=(
            f"{_bytes(sparse)} bytes at {_SPARSITY:.0%} zeros, a bitmap and the embedding included, against "
            f"{_bytes(small)}; same steps, so that the large model takes more training compute; by seed "
            + "; ".join(" against ".join(f"{value:.3f}" for value in pair) for pair in table[:2].mean(2).T.tolist())
            + "; the interval is of the difference"
        ),
    )
