"""Row 24, PPCL: runs of blocks found by linear probes, each replaced by one block distilled alone, lose least."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.claims.digits import texts
from pennyweight.claims.vision import digits
from pennyweight.solvers.depth import streams
from pennyweight.solvers.probes import Interval, intervals
from pennyweight.train import Samples, Trainer
from pennyweight.train.plugs import Plugs
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine
from pennyweight.zoo.dit import DiT, DiTConfig, flow_loss

_DEPTH, _STEPS, _DISTILLED, _BATCH = 8, 300, 50, 64
_RUNS = 2
_DRAWS = 3  # of as many random runs of the same lengths


def _moments(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the transformer: images on their way to noise, times, texts."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(images), (_BATCH,), generator=generator)
    times = torch.rand(_BATCH, generator=generator)
    at = times[:, None, None, None]
    noise = torch.randn(images[rows].shape, generator=generator)
    return (1 - at) * images[rows] + at * noise, times, texts(labels[rows])


def _teacher(images: Tensor, labels: Tensor) -> DiT:
    module = DiT(DiTConfig(depth=_DEPTH, width=48), generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return flow_loss(model, batch[0], batch[1], noise)

    Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=0.0),
        Samples(images, texts(labels), seed=0),
        batch=_BATCH,
        loss=loss,
        schedule=cosine(_STEPS, _STEPS // 20, peak=2e-3, floor=0.0),
        clip=1.0,
    ).run(_STEPS)
    return module.eval()


def _elsewhere(found: list[Interval], draw: int) -> list[Interval]:
    """Runs of the same lengths at random places, none of them shared."""
    generator, lengths = torch.Generator().manual_seed(draw), [len(one.blocks) for one in found]
    slack, made, start = _DEPTH - sum(lengths), [], 0
    gaps = torch.randint(0, slack + 1, (len(lengths),), generator=generator).sort().values.tolist()
    for gap, length, before in zip(gaps, lengths, [0, *gaps], strict=False):
        start += gap - before
        made.append(Interval(start, start + length - 1, 0.0))
        start += length
    return made


@claim(
    row=24,
    pace="slow",
    headline="half of the parameters go and key metrics lose less than 3 % (abstract)",
)
@tiny.one_thread()
def runs_found_by_probes_are_the_ones_to_replace(assets: Assets) -> Outcome:
    """Eight blocks that draw digits; held-out denoising loss after the same steps of distillation."""
    images, labels, held_images, held_labels = digits()
    images, held_images = (2 * part - 1 for part in (images, held_images))
    teacher = _teacher(images, labels)
    seen = [_moments(images, labels, 1000 + seed) for seed in range(4)]
    stack = streams(teacher, tuple(torch.cat(part) for part in zip(*seen, strict=True)))
    found = sorted(intervals(stack), key=lambda one: -one.alignment)[:_RUNS]
    found.sort(key=lambda one: one.first)

    def harm(module: nn.Module) -> float:
        noise = torch.Generator().manual_seed(7)
        with torch.no_grad():
            runs = [float(flow_loss(module, held_images, texts(held_labels), noise)) for _ in range(2)]
        return sum(runs) / len(runs)

    def replaced(runs: list[Interval]) -> Plugs:
        plugs = Plugs(copy.deepcopy(teacher), runs)
        plugs.train(lambda step: _moments(images, labels, step), steps=_DISTILLED, rate=1e-3)
        return plugs

    plugs = replaced(found)
    everything = range(len(found))
    whole = harm(teacher)
    with plugs.on(()) as module:
        untouched = harm(module) == whole
    combinations = []
    for bits in range(1, 2 ** len(found)):
        with plugs.on([index for index in everything if bits >> index & 1]) as module:
            combinations.append(harm(module))
    untrained = Plugs(copy.deepcopy(teacher), found)
    with untrained.on(everything) as module:
        control = harm(module)
    others = []
    for draw in range(_DRAWS):
        random = replaced(_elsewhere(found, draw))
        with random.on(everything) as module:
            others.append(harm(module))
    method, baseline = combinations[-1], sum(others) / len(others)
    return Outcome(
        method=method,
        baseline=baseline,
        unit="held-out squared error of the velocity",
        holds=untouched and method < baseline and method < control and max(combinations) < control,
        control=("the middle blocks of the same runs, without distillation", control),
        notes=(
            f"runs {', '.join(f'{one.first}-{one.last} (alignment {one.alignment:.4f})' for one in found)} of {_DEPTH} "
            f"blocks; the whole model {whole:.4f}; choices of plugs {', '.join(f'{x:.4f}' for x in combinations)}; "
            f"{_DRAWS} draws of runs of these lengths {min(others):.4f} to {max(others):.4f}"
        ),
    )
