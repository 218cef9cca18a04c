"""Fixed data, unlimited compute: rate, passes and weight decay tuned together for one corpus.

Row 21. Source: K. Kim et al., "Pre-training under infinite compute", arXiv:2509.14786: coordinate descent over learning
rate, epochs and weight decay until no single step of one of them helps; the best weight decay is far above the usual
0.1. Differs from the source: the same search at any scale; its grid is doublings around where it starts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.train.loop import Trainer
from pennyweight.train.samples import Samples
from pennyweight.train.schedules import cosine

Setting = Mapping[str, float]


@dataclass(frozen=True)
class Tuned:
    """The best setting found, its held-out loss, and everything tried.

    Attributes:
        lr: peak learning rate.
        epochs: passes over the data.
        weight_decay: decoupled, of AdamW.
        loss: held-out, in nats.
        history: settings and their losses, in order.
        module: the model trained with the best setting.
    """

    lr: float
    epochs: float
    weight_decay: float
    loss: float
    history: tuple[tuple[Setting, float], ...]
    module: nn.Module


def data_constrained(
    model: nn.Module | Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    tune: Sequence[str] = ("lr", "epochs", "weight_decay"),
    *,
    lr: float = 3e-3,
    epochs: float = 4.0,
    weight_decay: float = 0.1,
    batch: int = 16,
    steps: Mapping[str, float] | None = None,
    evaluate: Callable[[nn.Module, Tensor], float] | None = None,
    most: int = 40,
    seed: int = 0,
) -> Tuned:
    """Tune a recipe for the data there is.

    Args:
        model: untrained, copied for each training; or a callable that makes it, the same each time.
        data: windows to train on, and windows to judge by, (C, T) each.
        tune: what may move, out of lr, epochs and weight_decay.
        lr: where to start.
        epochs: where to start.
        weight_decay: where to start.
        batch: windows a step.
        steps: factor of a step of each setting; doublings by default.
        evaluate: held-out loss of a module; None for the mean next-token loss.
        most: trainings at most.
        seed: of the order of samples.

    Raises:
        OptionError: an unknown setting, or one below 0.
    """
    factors = {"lr": 2.0, "epochs": 2.0, "weight_decay": 2.0, **(steps or {})}
    if unknown := [name for name in (*tune, *(steps or {})) if name not in ("lr", "epochs", "weight_decay")]:
        raise OptionError(f"data_constrained: cannot tune {unknown[0]!r}; there are lr, epochs and weight_decay")
    if min(lr, epochs, batch, most) <= 0 or weight_decay < 0 or min(factors.values()) <= 1:
        raise OptionError("data_constrained: give a positive rate, epochs and batch, a decay of 0 or more, factors > 1")
    tried: dict[tuple[float, ...], tuple[float, nn.Module]] = {}
    history: list[tuple[Setting, float]] = []

    def run(setting: dict[str, float]) -> float:
        key = tuple(round(value, 12) for value in setting.values())
        if key not in tried:
            module = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
            tried[key] = _train(module, data, setting, batch, evaluate or _next_token, seed), module
            history.append((dict(setting), tried[key][0]))
        return tried[key][0]

    now: dict[str, float] = {"lr": lr, "epochs": epochs, "weight_decay": weight_decay}
    best = run(now)
    moved = True
    while moved and len(history) < most:
        moved = False
        for name in tune:
            for factor in (factors[name], 1 / factors[name]):
                while len(history) < most:
                    there = {**now, name: now[name] * factor}
                    loss = run(there)
                    if not loss < best:
                        break
                    now, best, moved = there, loss, True
    _, module = tried[tuple(round(value, 12) for value in now.values())]
    return Tuned(now["lr"], now["epochs"], now["weight_decay"], best, tuple(history), module)


def _train(
    module: nn.Module,
    data: tuple[Tensor, Tensor],
    setting: Setting,
    batch: int,
    evaluate: Callable[[nn.Module, Tensor], float],
    seed: int,
) -> float:
    steps = max(2, round(setting["epochs"] * len(data[0]) / batch))
    trainer = Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=setting["weight_decay"]),
        Samples(data[0], seed=seed),
        batch=batch,
        schedule=cosine(steps, steps // 20, peak=setting["lr"], floor=0.0),
        clip=1.0,
    )
    trainer.run(steps)
    return evaluate(module, data[1])


def _next_token(module: nn.Module, windows: Tensor) -> float:
    from pennyweight.evaluate.perplexity import token_losses

    return float(token_losses(module, windows, batch=128).mean())
