"""Row 24, PPCL: runs found by linear probes, one block distilled in place of each, lose less than others on average."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.claims.digits import texts
from pennyweight.claims.vision import digits
from pennyweight.measure import stats
from pennyweight.solvers.depth import streams
from pennyweight.solvers.probes import Interval, intervals
from pennyweight.solvers.projections import Projection, feed_forwards, projections
from pennyweight.train import Samples, Trainer
from pennyweight.train.plugs import Plugs
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine
from pennyweight.zoo.dit import DiT, DiTConfig, flow_loss

_DEPTH, _STEPS, _DISTILLED, _BATCH = 8, 300, 50, 64
_RUNS = 2
_PARTS = 2  # feed-forwards
_DRAWS = 24  # of as many random runs of the same lengths, at most


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


class _Setting(NamedTuple):
    """The teacher, inputs to look for redundancy on, what a model of held-out digits loses, and batches."""

    teacher: DiT
    seen: tuple[Tensor, ...]
    harm: Callable[[nn.Module], float]
    batches: Callable[[int], tuple[Tensor, ...]]


@cache
def _setting() -> _Setting:
    images, labels, held_images, held_labels = digits()
    images, held_images = (2 * part - 1 for part in (images, held_images))
    seen = [_moments(images, labels, 1000 + seed) for seed in range(4)]

    def harm(module: nn.Module) -> float:
        noise = torch.Generator().manual_seed(7)
        with torch.no_grad():
            runs = [float(flow_loss(module, held_images, texts(held_labels), noise)) for _ in range(2)]
        return sum(runs) / len(runs)

    joined = tuple(torch.cat(part) for part in zip(*seen, strict=True))
    return _Setting(_teacher(images, labels), joined, harm, lambda step: _moments(images, labels, step))


def _runs(teacher: DiT, seen: tuple[Tensor, ...]) -> list[Interval]:
    """The runs that probes follow best, in order."""
    found = sorted(intervals(streams(teacher, seen)), key=lambda one: -one.alignment)[:_RUNS]
    return sorted(found, key=lambda one: one.first)


def _elsewhere(found: list[Interval]) -> list[list[Interval]]:
    """Runs of the same lengths at other places, none of them shared: all there are, or `_DRAWS` of them at random."""
    lengths, made = [len(one.blocks) for one in found], []
    gaps = itertools.combinations_with_replacement(range(_DEPTH - sum(lengths) + 1), len(lengths))
    for order, before in itertools.product(sorted(set(itertools.permutations(lengths))), list(gaps)):
        starts = [gap + sum(order[:at]) for at, gap in enumerate(before)]
        runs = [(start, start + length - 1) for start, length in zip(starts, order, strict=True)]
        if runs != [(one.first, one.last) for one in found]:
            made.append([Interval(*ends, 0.0) for ends in runs])
    chosen = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))[:_DRAWS]
    return [made[n] for n in chosen.tolist()]


@claim(
    row=24,
    pace="slow",
    headline="half of the parameters go and key metrics lose less than 3 % (abstract)",
)
@tiny.one_thread()
def runs_found_by_probes_lose_less_than_others_on_average(assets: Assets) -> Outcome:
    """Eight blocks that draw digits; held-out denoising loss after the same steps of distillation."""
    teacher, seen, harm, batches = _setting()
    found = _runs(teacher, seen)

    def replaced(runs: list[Interval]) -> Plugs:
        plugs = Plugs(copy.deepcopy(teacher), runs)
        plugs.train(batches, steps=_DISTILLED, rate=1e-3)
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
    for elsewhere in _elsewhere(found):
        with replaced(elsewhere).on(everything) as module:
            others.append(harm(module))
    method, spread = combinations[-1], stats.bootstrap(others)
    return Outcome(
        method=method,
        baseline=spread.value,
        unit="held-out squared error of the velocity",
        holds=untouched and method < spread.low and method < control and max(combinations) < control,
        control=("the middle blocks of the same runs, without distillation", control),
        notes=(
            f"runs {', '.join(f'{one.first}-{one.last} (alignment {one.alignment:.4f})' for one in found)} of {_DEPTH} "
            f"blocks; the whole model {whole:.4f}; choices of plugs {', '.join(f'{x:.4f}' for x in combinations)}; "
            f"runs of these lengths at {len(others)} other places {min(others):.4f} to {max(others):.4f}, mean "
            f"[{spread.low:.4f}, {spread.high:.4f}], better in {sum(one < method for one in others)}"
        ),
    )


def _narrow(teacher: DiT, path: str, seen: tuple[Tensor, ...]) -> nn.Module:
    """The feed-forward at ``path`` with as few hidden units as make a linear layer's parameters, its best ones."""
    layer = copy.deepcopy(teacher.get_submodule(path))
    first, second = layer.get_submodule("fc1"), layer.get_submodule("fc2")
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    inner: list[Tensor] = []
    handle = teacher.get_submodule(f"{path}.fc2").register_forward_pre_hook(lambda _, x: inner.append(x[0].detach()))
    with torch.no_grad():
        teacher(*seen)
    handle.remove()
    energy = inner[0].flatten(0, -2).square().mean(0) * second.weight.detach().square().sum(0)
    best = energy.argsort(descending=True, stable=True)[: first.in_features // 2]
    first.weight, first.bias = (nn.Parameter(one.detach()[best]) for one in (first.weight, first.bias))
    second.weight = nn.Parameter(second.weight.detach()[:, best])
    return layer


@claim(
    row=24,
    pace="slow",
    headline="width goes by linear layers beside the runs: 10B of 20B at 2.61 % less (ablation, a summary page)",
)
@tiny.one_thread()
def linear_layers_stand_for_the_feed_forwards_they_follow(assets: Assets) -> Outcome:
    """Beside the runs, the feed-forwards of some other blocks become one linear layer each; the same steps for all."""
    teacher, seen, harm, batches = _setting()
    runs = _runs(teacher, seen)
    gone = {f"blocks.{block}.ffn" for one in runs for block in one.blocks}
    there = projections(teacher, seen, [path for path in feed_forwards(teacher) if path not in gone])
    among = sorted(there, key=lambda one: -one.alignment)
    assert len(among) > _PARTS, "the runs leave no other feed-forwards to compare with"
    sets = [tuple(chosen) for chosen in itertools.combinations(among, _PARTS)]

    def replaced(parts: Sequence[Projection], *, students: Sequence[nn.Module] = ()) -> Plugs:
        plugs = Plugs(copy.deepcopy(teacher), runs, parts)
        for place, student in enumerate(students, len(runs)):
            plugs.students[place] = student
        plugs.train(batches, steps=_DISTILLED, rate=1e-3)
        return plugs

    def together(plugs: Plugs, which: Sequence[int] | None = None) -> float:
        with plugs.on(range(len(plugs.students)) if which is None else which) as module:
            return harm(module)

    plugs = replaced(sets[0])
    places = range(len(plugs.students))
    choices = [[at for at in places if bits >> at & 1] for bits in range(1, 2 ** len(places))]
    combinations = [together(plugs, which) for which in choices]
    others = [together(replaced(parts)) for parts in sets[1:]]
    removed = Plugs(copy.deepcopy(teacher), runs, sets[0])
    for student in removed.students[len(runs) :]:
        for weight in student.parameters():
            weight.data.zero_()
    for place in range(len(runs)):
        removed.students[place] = plugs.students[place]
    control = together(removed)
    narrow = together(replaced(sets[0], students=[_narrow(teacher, one.path, seen) for one in sets[0]]))
    method, baseline = combinations[-1], sum(others) / len(others)
    runs_alone = together(plugs, range(len(runs)))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="held-out squared error of the velocity",
        holds=method < baseline and method < narrow and method < control and max(combinations) <= control,
        control=("the same feed-forwards gone, nothing in their place", control),
        notes=(
            f"linear layers for {', '.join(f'{one.path} (alignment {one.alignment:.4f})' for one in sets[0])}; runs "
            f"{', '.join(f'{one.first}-{one.last}' for one in runs)} alone {runs_alone:.4f}, the whole model "
            f"{harm(teacher):.4f}; {len(choices)} choices of plugs up to {max(combinations):.4f}; the other "
            f"{len(others)} pairs {min(others):.4f} to {max(others):.4f} ({len(among)} feed-forwards are too few to "
            f"show that the choice matters); {teacher.config.width // 2} hidden units in place of each linear layer, "
            f"as many parameters, {narrow:.4f}"
        ),
    )
