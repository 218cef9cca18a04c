"""Row 45, MaskLLM: masks learned on text keep more than one-shot masks of the same frozen weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.levers.prune.maskllm import MaskLLM
from pennyweight.levers.prune.sparsegpt import SparseGPT
from pennyweight.measure import stats
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.weights import Dense, NofM
from pennyweight.work import Work

_SEEDS = (0, 1)
_WINDOWS, _STEPS = 32_768, 800
_PRIORS = ("sparsegpt", "wanda", "magnitude")
_MARGIN = 0.02  # nats


def _learned(model: Model, seed: int) -> Model:
    return tiny.changed(
        model, MaskLLM(steps=_STEPS, batch=32, windows=_WINDOWS, rate=1e-3), windows=_WINDOWS, seed=seed
    )


def _by_sparsegpt(model: Model) -> Model:
    """SparseGPT as it is: the weights that stay make good what went."""
    made = Model(copy.deepcopy(model.module), None, model.name, kind=model.kind)
    maps = tuple(found for found in made.anatomy.layers() if found.block is not None)
    known = Work(model=made, windows=tiny.text()[0][:_WINDOWS], maps=maps).statistics({"second_moment"})
    for found in maps:
        matrix = Dense(anatomy.matrix(made.module, found))
        anatomy.replace(made.module, found.path, SparseGPT(pattern="2:4").solve(matrix, known[found.name]))
    return made


def _only_masked(made: Model, model: Model) -> bool:
    """Whether every map in the blocks is the original with two of four entries gone, to rounding in float16."""
    for found in model.anatomy.layers():
        if found.block is None:
            continue
        weight, before = made.module.get_submodule(found.path).weight, anatomy.matrix(model.module, found)
        if not isinstance(weight, NofM) or not torch.equal(
            weight.dense().float(), before.half().float() * weight.mask()
        ):
            return False
    return True


@claim(
    row=45,
    pace="slow",
    headline="LLaMA-2 7B at 2:4: Wikitext perplexity 6.72, other methods 10 or more, dense 5.12 (abstract)",
)
@tiny.one_thread()
def learned_masks_beat_one_shot_masks(assets: Assets) -> Outcome:
    """A byte-level GPT at 2:4 in its blocks; the learned masks start from SparseGPT's; two seeds."""
    model = tiny.reader()
    learned = [_learned(model, seed) for seed in _SEEDS]
    losses: Tensor = torch.stack([tiny.held_out_losses(one.module).mean(1) for one in learned])  # (seeds, windows)
    shots = {}
    for prior in _PRIORS:
        made = tiny.changed(model, MaskLLM(steps=0, prior=prior), windows=_WINDOWS)
        shots[prior] = tiny.held_out_losses(made.module).mean(1)
    best = min(shots, key=lambda prior: float(shots[prior].mean()))
    updated = float(tiny.held_out_losses(_by_sparsegpt(model).module).mean())
    dense = float(tiny.held_out_losses(model.module).mean())
    method, baseline = float(losses.mean()), float(shots[best].mean())
    gain = stats.paired_difference(shots[best], losses.mean(0))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="held-out nats a byte at 2:4, weights as they were",
        holds=all(_only_masked(one, model) for one in learned)
        and gain.high < 0
        and bool((losses.mean(1) < baseline - _MARGIN).all())
        and dense < method < updated,
        control=("SparseGPT with its update of the weights that stay", updated),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=(
            f"dense {dense:.4f}; masks alone: "
            + ", ".join(f"{prior} {float(each.mean()):.4f}" for prior, each in shots.items())
            + f"; learned in {_STEPS} steps on {_WINDOWS} windows, by seed "
            + ", ".join(f"{float(each):.4f}" for each in losses.mean(1))
            + "; the interval is of the difference to the best mask of one shot"
        ),
    )
