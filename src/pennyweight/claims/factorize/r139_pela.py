"""Row 139, PELA: a low-rank vision Transformer taught by its original's features before it is fine-tuned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim, vision
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import one_thread
from pennyweight.levers.factorize.pela import Factored, Intermediate, factorize
from pennyweight.measure import stats
from pennyweight.model import anatomy
from pennyweight.train.loop import Loss
from pennyweight.zoo.vit import vit

_HEADLINE = (
    "1/3 to 2/3 of the parameters less for about 0.6 points (three vision Transformers, one with text; abstract)"
)
_DENSITY = 1 / 3
_STAGE, _TUNE = 80, 40
_SEEDS = 3
_FEW = 100


def _low_rank(module: nn.Module) -> tuple[nn.Module, list[str], list[Factored]]:
    """A copy with a third of the parameters in its blocks, the paths of its blocks, and what was factorized."""
    student = copy.deepcopy(module)
    found = anatomy.of(student)
    layers = [one for one in found.layers() if one.block is not None]
    return student, [block.path for block in found.blocks], factorize(student, layers, density=_DENSITY)


@lru_cache(maxsize=_SEEDS)
def _teacher(seed: int) -> nn.Module:
    """A vision Transformer trained on the digits; shared, so not to be changed: copy it."""
    return vision.train(vit(width=32, seed=seed), steps=1000, seed=seed).requires_grad_(False)


def _start(seed: int, task: Loss | None = None) -> tuple[nn.Module, Intermediate, list[nn.Module]]:
    """The student to be taught, its loss, and it with its rivals: a copy to tune, one to leave, the original."""
    teacher = _teacher(seed)
    student, blocks, found = _low_rank(teacher)
    assert sum(one.weight.cost().params for one in found) <= _DENSITY * sum(one.original.numel() for one in found)
    plain, tuned = copy.deepcopy(student), copy.deepcopy(student).requires_grad_(True)
    loss = Intermediate(student.requires_grad_(True), teacher, blocks, found, task=task, features=1.0)
    return student, loss, [student, tuned, plain, teacher]


def _read(models: Callable[[int], list[nn.Module]]) -> tuple[Tensor, stats.Interval]:
    """Share of seeds in which each of the models reads a held-out digit, (models, 597); the first's over the second's.

    The interval is that of images.
    """
    with one_thread():
        rows = [torch.stack([vision.held_out_correct(module) for module in models(seed)]) for seed in range(_SEEDS)]
    found = torch.stack(rows).mean(0)
    return found, stats.paired_difference(found[1], found[0])


@claim(row=139, pace="slow", headline=_HEADLINE)
def a_taught_low_rank_model_beats_one_that_is_fine_tuned_as_long(assets: Assets) -> Outcome:
    """Digits, three seeds, 80 steps of the stage and 40 of tuning; baseline: 120 of tuning; control: random factors."""

    def models(seed: int) -> list[nn.Module]:
        student, loss, rivals = _start(seed, vision.label_loss)
        random = _low_rank(vit(width=32, seed=seed + 100))[0].requires_grad_(True)
        vision.train(student, steps=_STAGE, seed=seed, loss=loss)
        for module in (rivals[1], random):
            vision.train(module, steps=_STAGE, seed=seed)
        for module in (student, rivals[1], random):
            vision.train(module, steps=_TUNE, rate=1e-3, seed=seed + 1)
        return [*rivals, random]

    right, gain = _read(models)
    method, baseline, plain, whole, control = right.mean(1).tolist()
    return Outcome(
        method=method,
        baseline=baseline,
        unit="share of held-out digits read, mean of three seeds",
        lower_is_better=False,
        holds=method > baseline + 0.005 and gain.low > 0 and plain < baseline - 0.05,
        control=("random factors of the same rank, trained as long as both", control),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=f"a third of the parameters of blocks; the original {whole:.4f}, factors without training {plain:.4f}; "
        "the interval is of the difference",
    )


@claim(row=139, pace="slow", headline=_HEADLINE)
def features_of_the_original_stand_in_for_labels(assets: Assets) -> Outcome:
    """100 labels, three seeds: 80 steps of features on images without labels, 40 of tuning; baseline: 120 of tuning."""

    def models(seed: int) -> list[nn.Module]:
        student, loss, rivals = _start(seed)
        vision.train(student, steps=_STAGE, seed=seed, loss=loss)
        vision.train(rivals[1], steps=_STAGE, seed=seed, few=_FEW)
        for module in (student, rivals[1]):
            vision.train(module, steps=_TUNE, rate=1e-3, seed=seed + 1, few=_FEW)
        return rivals

    right, gain = _read(models)
    method, baseline, control, whole = right.mean(1).tolist()
    return Outcome(
        method=method,
        baseline=baseline,
        unit="share of held-out digits read, mean of three seeds",
        lower_is_better=False,
        holds=method > baseline + 0.01 and gain.low > 0 and method > control + 0.01,
        control=("the same factors without training", control),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=f"a third of the parameters of blocks; the original {whole:.4f}; the interval is of the difference",
    )
