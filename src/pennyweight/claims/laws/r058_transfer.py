"""Row 58, flatness: of models at one pre-training loss, does the flatter one transfer better to labels never seen?"""

from __future__ import annotations

import copy
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.measure import flatness

_GROUPS, _EACH, _CLASSES, _HIDDEN = 6, 12, 10, 32
_SYMBOLS = _GROUPS * _EACH
_SEEDS, _LENGTHS = range(5), (0, 8000, 32000)
_RATE, _BATCH, _SETTLING, _TOLERANCE = 0.5, 32, 2000, 0.01


class _Table(nn.Module):
    """Next-symbol logits (B, classes) through a hidden layer with room to spare: many tables of the same loss."""

    def __init__(self, g: torch.Generator) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(_SYMBOLS, _HIDDEN, generator=g))
        self.out = nn.Parameter(0.5 * torch.randn(_HIDDEN, _CLASSES, generator=g))

    def hidden(self) -> Tensor:  # (symbols, hidden)
        return torch.tanh(self.into)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.hidden()[x] @ self.out
        return found


class _World(NamedTuple):
    """What follows a symbol depends on its group alone; the group is the label of the downstream task."""

    truth: Tensor  # (symbols, classes)
    group: Tensor  # (symbols,)

    @property
    def everything(self) -> tuple[Tensor, Tensor]:
        return torch.arange(_SYMBOLS), self.truth

    @property
    def entropy(self) -> float:
        return float(-(self.truth * self.truth.log()).sum(-1).mean())


def _world(g: torch.Generator) -> _World:
    group = torch.arange(_SYMBOLS) % _GROUPS
    return _World(torch.softmax(1.5 * torch.randn(_GROUPS, _CLASSES, generator=g), -1)[group], group)


def _expected(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy under the true conditional: no sampling noise."""
    inputs, truth = data
    found: Tensor = -(truth * module(inputs).log_softmax(-1)).sum(-1).mean()
    return found


def _settle(module: _Table, world: _World, steps: int) -> _Table:
    """Down the true gradient, to the floor of the loss."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        _expected(module, world.everything).backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        schedule.step()
    return module


def _longer(module: _Table, world: _World, steps: int, g: torch.Generator, *, noisy: bool) -> _Table:
    """``steps`` of plain SGD on drawn symbols, or as many without noise; then settled."""
    made = copy.deepcopy(module)
    optimizer = torch.optim.SGD(made.parameters(), lr=_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        if noisy:
            x = torch.randint(_SYMBOLS, (_BATCH,), generator=g)
            y = torch.multinomial(world.truth[x], 1, generator=g)[:, 0]
            nn.functional.cross_entropy(made(x), y).backward()  # type: ignore[no-untyped-call]  # of torch
        else:
            _expected(made, world.everything).backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
    return _settle(made, world, _SETTLING)


@torch.no_grad()
def _probe(module: _Table, world: _World) -> float:
    """Accuracy of ridge regression from hidden states to groups: two symbols of each group to learn from."""
    known = torch.arange(_SYMBOLS) < 2 * _GROUPS
    states = module.hidden().double()
    mean = states[known].mean(0)
    x, y = states[known] - mean, nn.functional.one_hot(world.group[known], _GROUPS).double()
    gram = x @ x.T
    gram = gram + 1e-2 * gram.trace() / len(gram) * torch.eye(len(gram)).double()
    weights = x.T @ torch.linalg.solve(gram, y - y.mean(0))
    guess = ((states[~known] - mean) @ weights).argmax(-1)
    return float((guess == world.group[~known]).double().mean())


class _Model(NamedTuple):
    seed: int
    name: str
    excess: float
    trace: float
    accuracy: float


@cache
def _models() -> tuple[_Model, ...]:
    found = []
    for seed in _SEEDS:
        g = torch.Generator().manual_seed(seed)
        world = _world(g)
        start = _settle(_Table(g), world, _SETTLING)
        made = {f"{steps} steps": _longer(start, world, steps, g, noisy=True) for steps in _LENGTHS}
        made["without noise"] = _longer(start, world, _LENGTHS[-1], g, noisy=False)
        for name, module in made.items():
            excess = float(_expected(module, world.everything).detach()) - world.entropy
            trace = flatness(module, world.everything, 400, loss=_expected).trace
            found.append(_Model(seed, name, excess, trace, _probe(module, world)))
    return tuple(found)


@claim(row=58, pace="slow", headline="at one loss the flatter model transfers better (abstract; no figure)")
@tiny.one_thread()
def flatter_models_of_one_loss_transfer_better(assets: Assets) -> Outcome:
    """Tables at the floor of one loss, trained on for longer and longer with noise; probed for groups never named."""
    models = _models()
    by_name = {name: [m for m in models if m.name == name] for name in dict.fromkeys(m.name for m in models)}
    short, long, calm = (by_name[name] for name in (f"{_LENGTHS[0]} steps", f"{_LENGTHS[-1]} steps", "without noise"))
    gains = np.array([b.accuracy - a.accuracy for a, b in zip(short, long, strict=True)])
    noisy = [m for m in models if m.name != "without noise"]
    ranks = [
        float(spearmanr([-m.trace for m in noisy if m.seed == seed], [m.accuracy for m in noisy if m.seed == seed])[0])
        for seed in _SEEDS
    ]
    draws = np.random.default_rng(0).choice(gains, (2000, len(gains))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    same = max(m.excess for m in models) < _TOLERANCE
    flatter = all(b.trace < a.trace for a, b in zip(short, long, strict=True))
    mean = {name: np.mean([(m.trace, m.accuracy) for m in ones], axis=0) for name, ones in by_name.items()}
    return Outcome(
        method=float(np.mean([m.accuracy for m in long])),
        baseline=float(np.mean([m.accuracy for m in short])),
        unit="accuracy of a probe for the group of symbols, two labelled a group",
        lower_is_better=False,
        holds=bool(same and flatter and low > 0 and np.nanmean(ranks) > 0),
        control=("as many steps without noise, so no flatter", float(np.mean([m.accuracy for m in calm]))),
        notes=(
            f"gain {gains.mean():.3f} [{low:.3f}, {high:.3f}] over {len(gains)} seeds; rank correlation of flatness "
            f"and accuracy {np.nanmean(ranks):.2f}; loss above its floor at most {max(m.excess for m in models):.1e} "
            "nats; "
            + "; ".join(f"{name}: trace {trace:.3f}, accuracy {right:.3f}" for name, (trace, right) in mean.items())
        ),
    )
