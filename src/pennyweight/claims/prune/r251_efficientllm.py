"""Row 251, EfficientLLM: a model that shrinks while it is trained on beats its own shape trained from nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.levers.prune.aware import PruningAware
from pennyweight.measure import stats
from pennyweight.train.schedules import wsd
from pennyweight.zoo.gpt import GPT

_SEEDS = (0, 1, 2)
_WIDTH, _HEADS = 64, 4
_SOURCE, _STEPS, _END = 500, 500, 300  # steps of the source, of what follows it, and to the last cut
_KEPT = 0.5
_MARGIN = 0.01  # nats


@dataclass
class _Spent:
    """Parameters times steps: what training cost, in a unit that all share."""

    module: nn.Module
    total: int = 0

    def step(self) -> None:
        self.total += sum(weight.numel() for weight in self.module.parameters())


def _continued(source: GPT, seed: int, *, at_once: bool = False, uniform: bool = False) -> tuple[GPT, int]:
    """A copy of ``source`` pruned and trained on, and what that cost."""
    module = copy.deepcopy(source)
    spent = _Spent(module)
    trainer = tiny.trainer(module, wsd(_STEPS, 20, 0.4, "linear", peak=3e-3), batch=32, seed=seed + 100)
    pruning = PruningAware(
        module, trainer.optimizer, tiny.text()[0][:64], params=round(_KEPT * _params(source)), start=20,
        end=20 if at_once else _END, every=20, shape="uniform" if uniform else "found",
    )  # fmt: skip
    trainer.callbacks = (spent, pruning)
    trainer.run(_STEPS)
    return module.eval(), spent.total


def _params(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@torch.no_grad()
def _anew(module: GPT, seed: int) -> GPT:
    """A model of the same shape with random weights, as a `GPT` begins."""
    generator, made = torch.Generator().manual_seed(seed), copy.deepcopy(module)
    for name, weight in made.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1)
            continue
        deviation = 0.02 if name == "embedding.weight" else weight.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= (2 * len(made.blocks)) ** 0.5
        weight.normal_(0, deviation, generator=generator)
    return made


def _shape(module: GPT) -> str:
    rows = {name: len(weight) for name, weight in module.named_parameters()}
    blocks = [(rows[f"blocks.{at}.attention.q_proj.weight"], rows[f"blocks.{at}.mlp.up_proj.weight"]) for at in (0, 1)]
    return f"{module.embedding.embedding_dim} wide, " + ", ".join(f"{heads}+{units}" for heads, units in blocks)


@claim(
    row=251,
    pace="slow",
    headline="EfficientLLM-134M 50.5 on average over common-sense tasks, SmolLM-135M 49.9 (table of its repository)",
)
@tiny.one_thread()
def shrinking_while_training_beats_the_small_model(assets: Assets) -> Outcome:
    """Three seeds; the small model has the shape that was found, and as much compute as source and pruning together."""
    losses: dict[str, list[Tensor]] = {"aware": [], "scratch": [], "at once": [], "uniform": [], "given": []}
    shapes, exact, sizes = [], True, True
    for seed in _SEEDS:
        source = tiny.trained(tiny.gpt(width=_WIDTH, num_heads=_HEADS, seed=seed), _SOURCE, seed=seed)
        aware, cost = _continued(source, seed)
        small = _anew(aware, seed)
        steps = round((cost + _SOURCE * _params(source)) / _params(aware))
        alone = round(cost / _params(aware))  # what a source that was there already leaves
        found = {
            "aware": aware,
            "scratch": tiny.trained(copy.deepcopy(small), steps, seed=seed),
            "given": tiny.trained(small, alone, seed=seed),
            "at once": _continued(source, seed, at_once=True)[0],
            "uniform": _continued(source, seed, at_once=True, uniform=True)[0],
        }
        limit = _KEPT * _params(source)
        sizes &= all(0.95 * limit <= _params(one) <= limit + 1 for one in found.values())
        exact &= _params(aware) == _params(small)
        shapes.append(_shape(aware))
        for name, module in found.items():
            losses[name].append(tiny.held_out_losses(module).mean(1))
    by_window = {name: torch.stack(each).mean(0) for name, each in losses.items()}
    mean = {name: float(each.mean()) for name, each in by_window.items()}
    gain = stats.paired_difference(by_window["scratch"], by_window["aware"])
    return Outcome(
        method=mean["aware"],
        baseline=mean["scratch"],
        unit="held-out nats a byte",
        holds=sizes and exact and gain.high < -_MARGIN and mean["aware"] < min(mean["at once"], mean["uniform"]),
        control=("as many parameters cut at once, trained on as long", mean["at once"]),
        interval=(mean["scratch"] + gain.low, mean["scratch"] + gain.high),
        notes=(
            f"{_KEPT:.0%} of the parameters; the small model takes {steps} steps; with {alone}, as if the source "
            f"had been there already, {mean['given']:.3f}; cut at once to a uniform shape {mean['uniform']:.3f}; "
            "shapes found (heads' width + feed-forward units): " + "; ".join(shapes)
        ),
    )
