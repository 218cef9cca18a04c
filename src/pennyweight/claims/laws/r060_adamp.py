"""Row 60, AdamP: without the radial part of their steps normalized weights grow less, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from pennyweight import data
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.measure import stats
from pennyweight.train import Samples, Trainer, effective_step
from pennyweight.train.optim import SGDP, AdamP
from pennyweight.train.schedules import cosine

_HEADLINE = "uniform gains on 13 benchmarks (abstract; no figure there)"
_SEEDS = (0, 1, 2)
_STEPS = 240  # six epochs
_BEFORE_NORMALIZATION = ("0.weight", "3.weight", "6.weight")
Make = Callable[[Iterable[nn.Parameter]], Optimizer]


def _network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # torch.nn initializes from the global generator alone
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )


def _run(make: Make, rate: float, seed: int) -> tuple[Tensor, float]:
    """Which held-out digits are read rightly, and the mean growth of the norms of the convolutions."""
    digits = data.digits()
    images, labels = digits.images[:, None], digits.labels
    held = torch.arange(len(labels)) % 3 == 2
    module = _network(seed)
    watch = effective_step(module)
    Trainer(
        module,
        make(module.parameters()),
        Samples(images[~held], labels[~held], seed=seed),
        batch=32,
        schedule=cosine(_STEPS, peak=rate, floor=0.0),
        loss=lambda module, batch: functional.cross_entropy(module(batch[0]), batch[1]),
        callbacks=[watch],
    ).run(_STEPS)
    module.eval()
    with torch.no_grad():
        right = module(images[held]).argmax(1) == labels[held]
    grown = watch.growth(_BEFORE_NORMALIZATION).values()
    return right.float(), sum(grown) / len(grown)


def _compare(makes: dict[str, Make], rate: float) -> Outcome:
    """The first optimizer beside the second; the third, the usual remedy, is the control."""
    rights, grown = {}, {}
    for name, make in makes.items():
        found = [_run(make, rate, seed) for seed in _SEEDS]
        # an image is the sample: its readings by the three networks belong together
        rights[name] = torch.stack([right for right, _ in found], dim=1).mean(1)
        grown[name] = [growth for _, growth in found]
    method, baseline, control = makes
    floor = stats.non_inferiority_drop(rights[baseline], rights[method], drop=0.01)
    slower = all(new < 0.75 * old for new, old in zip(grown[method], grown[baseline], strict=True))
    growth = {name: sum(found) / len(found) for name, found in grown.items()}
    return Outcome(
        method=growth[method],
        baseline=growth[baseline],
        unit="last norm / first norm of the convolutions",
        holds=slower and floor.holds,
        control=(control, growth[control]),
        notes="; ".join(
            f"{name} reads {float(right.mean()):.2%} of the held-out digits" for name, right in rights.items()
        )
        + f" (shown to lose less than {floor.upper:.2%})",
    )


@claim(row=60, pace="quick", headline=_HEADLINE)
@tiny.one_thread()
def adamp_keeps_norms_and_accuracy(assets: Assets) -> Outcome:
    """A small network with batch normalization on digits, three seeds, one rate for all."""
    makes: dict[str, Make] = {
        "AdamP": AdamP,
        "Adam": lambda weights: AdamW(weights, weight_decay=0.0),
        "Adam with weight decay 0.1": lambda weights: AdamW(weights, weight_decay=0.1),
    }
    return _compare(makes, rate=1e-2)


@claim(row=60, pace="quick", headline=_HEADLINE)
@tiny.one_thread()
def sgdp_keeps_norms_and_accuracy(assets: Assets) -> Outcome:
    """The same beside SGD with momentum."""
    makes: dict[str, Make] = {
        "SGDP": lambda weights: SGDP(weights, momentum=0.9),
        "SGD": lambda weights: SGD(weights, momentum=0.9),
        "SGD with weight decay 5e-4": lambda weights: SGD(weights, momentum=0.9, weight_decay=5e-4),
    }
    return _compare(makes, rate=0.1)
