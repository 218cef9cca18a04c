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


def _losses(module: nn.Module, ids: Tensor) -> Tensor:
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
    """50 kB of library source seen ten times; weight decays for two widths, four seeds averaged; judged on the rest.

    Half of the held-out windows choose the decay of each width and the best member; the others judge.
    """
    choosing, judging = tiny.text()[1][0::2], tiny.text()[1][1::2]

    def tuned(width: int) -> tuple[dict[float, nn.Module], float]:
        models = {decay: _trained(width, decay, 0) for decay in _DECAYS}
        return models, min(models, key=lambda decay: float(_losses(models[decay], choosing).mean()))

    singles, best = tuned(64)
    wides, best_wide = tuned(128)
    members = [singles[best], *(_trained(64, best, seed) for seed in range(1, _MEMBERS))]
    chosen = min(members, key=lambda member: float(_losses(member, choosing).mean()))
    losses = _losses(ensemble(members), judging)  # log probabilities are logits
    usual, decayed, alone, wide = (
        _losses(module, judging) for module in (singles[_DECAYS[0]], singles[best], chosen, wides[best_wide])
    )
    over_usual, over_alone, over_wide = (
        stats.paired_difference(*pair) for pair in ((usual, decayed), (alone, losses), (wide, losses))
    )
    single = float(alone.mean())
    return Outcome(
        method=float(losses.mean()),
        baseline=float(usual.mean()),
        unit="held-out nats a byte",
        holds=bool(
            best > _DECAYS[0]
            and over_usual.value < -0.01
            and max(over_usual.high, over_alone.high, over_wide.high) < 0
        ),
        control=(f"one model of twice the width, at the best decay of its own, {best_wide:g}", float(wide.mean())),
        interval=(single + over_alone.low, single + over_alone.high),
        notes=(
            "weight decay " + "; ".join(
                f"width {width}: " + ", ".join(
                    f"{decay:g}: {float(_losses(module, judging).mean()):.3f}" for decay, module in models.items()
                )
                for width, models in ((64, singles), (128, wides))
            )
            + f"; chosen on other text {best:g} and {best_wide:g}; the ensemble's lead of twice the width "
            f"[{over_wide.low:+.3f}, {over_wide.high:+.3f}]; best member {single:.3f}; the interval is of the "
            "difference to it"
        ),
    )  # fmt: skip
