"""Row 134, Beta-Rank: what passes through filters ranks them better than HRank does, and chance does about as well."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.claims.vision import digits, label_loss
from pennyweight.levers.prune.filters import filter_scores
from pennyweight.measure import stats
from pennyweight.surgery import Dimension, Graph, remove, trace
from pennyweight.train import Samples, Trainer
from pennyweight.train.schedules import cosine
from pennyweight.zoo.resnet import ResNet, ResNetConfig

_SEEDS = range(8)
_RARE, _SHARE = 8, 0.05  # the rare digit, and its share of the images
_IMAGES = 360
_TRAIN, _TUNE = 300, 60
_REMOVED = 0.5  # of the filters inside blocks: 45 % of the multiplications
_MARGIN = 0.01

Scores = dict[Dimension, Tensor]


def _few(seed: int) -> tuple[Tensor, Tensor]:
    """Images of which the rare digit is one in twenty."""
    images, labels, _, _ = digits()
    g = torch.Generator().manual_seed(seed)
    rare, others = (labels == _RARE).nonzero()[:, 0], (labels != _RARE).nonzero()[:, 0]
    count = round(_SHARE * _IMAGES)
    chosen = torch.cat([rare[torch.randperm(len(rare), generator=g)[:count]],
                        others[torch.randperm(len(others), generator=g)[: _IMAGES - count]]])  # fmt: skip
    return images[chosen], labels[chosen]


def _train(module: nn.Module, data: tuple[Tensor, Tensor], steps: int, rate: float, seed: int) -> nn.Module:
    Trainer(
        module, torch.optim.AdamW(module.parameters(), weight_decay=1e-4), Samples(*data, seed=seed), batch=32,
        loss=label_loss, schedule=cosine(steps, steps // 10, peak=rate, floor=0.0), clip=1.0,
    ).run(steps)  # fmt: skip
    return module.eval()


def _ranks_of_maps(module: ResNet, graph: Graph, images: Tensor) -> Scores:
    """HRank: the mean rank of the maps that a filter gives, after norm and ReLU."""
    found: list[Tensor] = []

    def look(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        found.append(torch.linalg.matrix_rank(functional.relu(out)).float().mean(0))

    hooks = [block.first_norm.register_forward_hook(look) for block in module.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()
    return dict(zip(graph.of("channels"), found, strict=True))


def _by(name: str, seed: int) -> Callable[[ResNet, Graph, Tensor], Scores]:
    if name == "hrank":
        return _ranks_of_maps
    if name == "random":
        g = torch.Generator().manual_seed(seed)
        return lambda module, graph, images: {d: torch.rand(d.size, generator=g) for d in graph.of("channels")}
    return lambda module, graph, images: filter_scores(
        module, graph, (images,), name, {path for path, _ in module.named_modules()}
    )


def _recalls(module: nn.Module) -> Tensor:
    """(10,) of the held-out digits."""
    _, _, images, labels = digits()
    with torch.no_grad():
        right = (module(images).argmax(1) == labels).float()
    return torch.stack([right[labels == digit].mean() for digit in range(10)])


def _lowest(scores: Scores) -> list[set[int]]:
    return [set(found.argsort()[: len(found) // 4].tolist()) for found in scores.values()]


@claim(
    row=134,
    pace="slow",
    headline="IDRiD, ResNet-110, 58 % FLOPs off: beta-rank 81.9, L1 74.8, HRank 61.5, whole 79.6 (repository's table)",
)
@tiny.one_thread()
def what_passes_through_ranks_filters(assets: Assets) -> Outcome:
    """Digits with one class at 5 %, eight seeds: half of the filters inside blocks go, then equal training."""
    names = ("beta_rank", "l1", "hrank", "random")
    balanced: dict[str, list[float]] = {name: [] for name in names}
    at_once: dict[str, list[float]] = {name: [] for name in names}
    rare: dict[str, list[float]] = {name: [] for name in names}
    overlap: dict[str, list[float]] = {"beta_rank": [], "hrank": []}
    for seed in _SEEDS:
        data = _few(seed)
        base = ResNet(ResNetConfig(width=8), generator=torch.Generator().manual_seed(seed))
        _train(base, data, _TRAIN, 3e-3, seed)
        batch = data[0][torch.randperm(_IMAGES, generator=torch.Generator().manual_seed(seed))[:256]]
        for name in names:
            module = copy.deepcopy(base)
            graph = trace(module, (batch[:4],))
            scores = _by(name, seed)(module, graph, batch)
            if name in overlap:
                halves = [_lowest(_by(name, seed)(module, graph, half)) for half in torch.split(batch, 128)]
                shared = [len(a & b) / len(a) for a, b in zip(*halves, strict=True)]
                overlap[name].append(sum(shared) / len(shared))
            kept = {d: found.topk(d.size - int(_REMOVED * d.size)).indices for d, found in scores.items()}
            remove(module, graph, kept, (batch[:4],))
            at_once[name].append(float(_recalls(module).mean()))
            recalls = _recalls(_train(module, data, _TUNE, 1e-3, seed + 100))
            balanced[name].append(float(recalls.mean()))
            rare[name].append(float(recalls[_RARE]))
    mean = {name: sum(values) / len(values) for name, values in balanced.items()}
    gain, over_ranks, over_chance = (
        stats.paired_difference(torch.tensor(balanced[name]), torch.tensor(balanced["beta_rank"]))
        for name in ("l1", "hrank", "random")
    )

    def said(figures: dict[str, list[float]]) -> str:
        return ", ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in figures.items())

    return Outcome(
        method=mean["beta_rank"],
        baseline=mean["hrank"],
        unit="balanced accuracy on held-out digits, mean over seeds",
        lower_is_better=False,
        holds=over_ranks.low > 0 and over_chance.low > 0 and mean["beta_rank"] > mean["l1"] - _MARGIN,
        control=("L1", mean["l1"]),
        interval=(mean["l1"] + gain.low, mean["l1"] + gain.high),
        notes=(
            f"random {mean['random']:.3f}; the gain over it lies in {over_chance.low:+.3f} to "
            f"{over_chance.high:+.3f}, over HRank in {over_ranks.low:+.3f} to {over_ranks.high:+.3f}; recall of the "
            f"rare digit: {said(rare)}; before training: {said(at_once)}; "
            f"the lowest quarter on two halves of the images shared: {said(overlap)}; the interval is of L1 and gain"
        ),
    )
