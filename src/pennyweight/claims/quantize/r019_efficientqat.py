"""Row 19, EfficientQAT: at 2 bits blocks trained through their rounding beat GPTQ, and trained scales add to it."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from pennyweight.calibrate import walk
from pennyweight.calibrate.walk import SolveGroup
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.levers.quantize.efficientqat import EfficientQAT
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.measure import stats
from pennyweight.model.model import Model
from pennyweight.weights import Quantized
from pennyweight.work import Work

_BLOCKS = 4  # the first ones; the others stay as they are, so that the claim takes two minutes
_NEAREST = EfficientQAT(bits=2, group_size=64, epochs=0, steps=0)
_TRAINING = replace(_NEAREST, samples=56, batch=2, epochs=2)
_SCALES = replace(_NEAREST, samples=56, batch=2, steps=16, steps_rate=1.5e-2)
_RIVALS = {
    "gptq": GPTQ(bits=2, group_size=64),
    "searched": GPTQ(bits=2, group_size=64, search=16, importance="inputs"),
}
_MARGIN = 0.02  # nats a token, of each step of the order


def _solved_by(rival: GPTQ) -> SolveGroup:
    return lambda _, weights, known: rival.solve_group(weights, known[0])


def _bytes(model: Model) -> int:
    return sum(weight.cost().bytes for weight in model.module.modules() if isinstance(weight, Quantized))


@claim(
    row=19,
    pace="slow",
    headline="Llama-2-7B at w2g64: perplexity 6.86 on WikiText-2, 5.47 in 16 bits (official README)",
)
def blocks_trained_through_rounding_beat_gptq_at_two_bits(assets: Assets) -> Outcome:
    """The first blocks of SmolLM2 in codes of 2 bits: every method has the same windows, and stores the same bytes."""
    smollm2 = assets.smollm2(permuted=True)
    seen = smollm2.windows("wiki", part="calibration", length=256, count=56)
    fresh = smollm2.windows("wiki", part="heldout", length=256, count=12)
    maps = tuple(m for m in smollm2.model.anatomy.layers() if m.block is not None and m.block < _BLOCKS)
    losses: dict[str, Tensor] = {}
    stored: set[int] = set()

    def judge(name: str, model: Model) -> None:
        losses[name] = token_losses(model.module, fresh, batch=4, dtype=torch.bfloat16).mean(1)
        if name != "16 bits":
            stored.add(_bytes(model))

    def copied() -> Model:
        return Model(copy.deepcopy(smollm2.model.module), None, "smollm2", kind="causal-lm")

    judge("16 bits", smollm2.model)
    for name, rival in _RIVALS.items():
        model = copied()
        walk(model, seen, solve_group=_solved_by(rival), only=[m.name for m in maps])
        judge(name, model)
    model = copied()
    _NEAREST.change(model, Work(model=model, windows=None, maps=maps))
    judge("rtn", model)
    model = copied()
    for name, lever in {"blocks": _TRAINING, "both": _SCALES}.items():  # as one run of the lever does it
        lever.change(model, Work(model=model, windows=seen, maps=maps))
        judge(name, model)
    mean = {name: float(loss.mean()) for name, loss in losses.items()}
    order = ("rtn", "gptq", "blocks", "both")
    gains = [stats.paired_difference(losses[a], losses[b]) for a, b in pairwise(order)]
    ordered = all(mean[b] < mean[a] - _MARGIN for a, b in pairwise(order))
    return Outcome(
        method=mean["both"],
        baseline=mean["gptq"],
        unit="held-out nats a token, 4 of 30 blocks at 2 bits in groups of 64",
        holds=len(stored) == 1 and ordered and all(gain.high < 0 for gain in gains),
        control=("GPTQ on ranges searched for, the same bytes", mean["searched"]),
        notes=(
            f"in 16 bits {mean['16 bits']:.4g}; round to nearest {mean['rtn']:.4g}, GPTQ {mean['gptq']:.4g}, blocks "
            f"trained {mean['blocks']:.4g}, scales then trained end to end {mean['both']:.4g}; {max(stored):,} bytes "
            f"each; {len(seen)} windows of 256 tokens, 8 of which choose"
        ),
    )
