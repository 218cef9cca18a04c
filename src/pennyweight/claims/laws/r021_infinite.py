"""Row 21, infinite compute: on fixed data strong weight decay and an ensemble beat the usual recipe and more width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.measure import stats
from pennyweight.merge import ensemble
from pennyweight.train import Samples, Trainer
from pennyweight.train.schedules import cosine

_WINDOWS, _EPOCHS, _BATCH, _MEMBERS = 1500, 10, 16, 4  # 50 kB of text
_DECAYS = (0.1, 0.8, 3.2)


def _trained(width: int, decay: float, seed: int) -> nn.Module:
    module = tiny.gpt(width=width, seed=seed)
    steps = _EPOCHS * _WINDOWS // _BATCH
    Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=decay),
        Samples(tiny.text()[0][:_WINDOWS], seed=seed),
        batch=_BATCH,
        schedule=cosine(steps, 40, peak=6e-3, floor=0.0),
        clip=1.0,
    ).run(steps)
    return module


def _losses(module: nn.Module) -> Tensor:
    ids = tiny.text()[1]
    with torch.no_grad():
        found = [functional.cross_entropy(module(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="none")
                 for part in torch.split(ids, 128)]  # fmt: skip
    return torch.cat(found).view(len(ids), -1)


@claim(
    row=21,
    pace="slow",
    headline="5.17 times less data; optimal weight decay 30 times the usual (abstract)",
)
@tiny.one_thread()
def decay_and_ensembles_beat_size_on_fixed_data(assets: Assets) -> Outcome:
    """50 kB of library source seen ten times; weight decays, four seeds averaged, and a model of twice the width."""
    singles = {decay: _trained(64, decay, 0) for decay in _DECAYS}
    means = {decay: float(_losses(module).mean()) for decay, module in singles.items()}
    best = min(means, key=lambda decay: means[decay])
    members = [singles[best], *(_trained(64, best, seed) for seed in range(1, _MEMBERS))]
    losses = _losses(ensemble(members))  # log probabilities are logits
    alone = min((_losses(member) for member in members), key=lambda found: float(found.mean()))
    wide = float(_losses(_trained(128, best, 0)).mean())
    gap = stats.paired_difference(alone, losses)
    mean = float(losses.mean())
    return Outcome(
        method=mean,
        baseline=means[0.1],
        unit="held-out nats a byte",
        holds=bool(best > 0.1 and means[best] < means[0.1] - 0.01 and gap.high < 0 and mean < wide),
        control=("one model of twice the width, at the same decay", wide),
        interval=(float(alone.mean()) + gap.low, float(alone.mean()) + gap.high),
        notes=(
            "weight decay " + ", ".join(f"{decay:g}: {loss:.3f}" for decay, loss in means.items())
            + f"; best member {float(alone.mean()):.3f}; the interval is of the difference to it"
        ),
    )  # fmt: skip
