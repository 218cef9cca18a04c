"""Row 196, to prune or not: at equal bytes a large sparse model, pruned while it trains, beats a small dense one."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.levers.prune.gradual import CubicSchedule, GradualPruning
from pennyweight.measure import stats
from pennyweight.model import anatomy
from pennyweight.solvers.masks import smallest
from pennyweight.train.schedules import wsd
from pennyweight.zoo.gpt import GPT

_SEEDS = (0, 1, 2)
_STEPS = 2000
_LARGE, _SMALL = 64, 38  # widths; the small model gets a few bytes more
_SPARSITY = 0.75
_RATE = 6e-3
#: From a tenth of the training to 60 %: the rate is still at its peak, and what is cut can be made good.
_SCHEDULE = CubicSchedule(final=_SPARSITY, start=200, end=1200, every=10)
_MARGIN = 0.005  # nats


def _layers(module: GPT) -> list[torch.nn.Linear]:
    found = [module.get_submodule(one.path) for one in anatomy.of(module).maps() if one.block is not None]
    return [layer for layer in found if isinstance(layer, torch.nn.Linear)]


def _trained(width: int, seed: int, schedule: CubicSchedule | None = None) -> GPT:
    module = tiny.gpt(width=width, num_heads=1, seed=seed)
    pruning = [GradualPruning(_layers(module), schedule)] if schedule else []
    rate = wsd(_STEPS, _STEPS // 20, 0.3, "linear", peak=_RATE)
    tiny.trainer(module, rate, batch=32, seed=seed, callbacks=pruning).run(_STEPS)
    for one in pruning:
        one.finish()
    return module


@torch.no_grad()
def _pruned_at_once(module: GPT) -> GPT:
    for layer in _layers(module):
        weight = layer.weight
        weight[smallest(weight.abs().flatten(), round(_SPARSITY * weight.numel())).view_as(weight)] = 0
    return module


def _bytes(module: GPT) -> int:
    """Of 16-bit values; a matrix with zeros in it is counted without them, but with a bit for each place."""
    layers = _layers(module)
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
def large_and_sparse_beats_small_and_dense(assets: Assets) -> Outcome:
    """Three seeds of each; the small model has the same depth, text, steps and rate, and no fewer bytes."""
    losses: dict[str, list[Tensor]] = {"sparse": [], "small": [], "at once": []}
    for seed in _SEEDS:
        sparse, small = _trained(_LARGE, seed, _SCHEDULE), _trained(_SMALL, seed)
        assert _bytes(sparse) <= _bytes(small), (_bytes(sparse), _bytes(small))
        at_once = _pruned_at_once(_trained(_LARGE, seed))
        for name, module in (("sparse", sparse), ("small", small), ("at once", at_once)):
            losses[name].append(tiny.held_out_losses(module).mean(1))
    method, baseline, control = (torch.stack(each).mean(0) for each in losses.values())
    gain = stats.paired_difference(method, baseline)  # by held-out window, averaged over seeds
    return Outcome(
        method=float(method.mean()),
        baseline=float(baseline.mean()),
        unit="nats a byte, held out",
        lower_is_better=True,
        holds=gain.high < -_MARGIN and float(method.mean()) < float(control.mean()) - _MARGIN,
        control=("the same sparsity, cut at once after training", float(control.mean())),
    )
