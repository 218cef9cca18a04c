"""Row 85, D-CPT: a law of size, tokens and ratio is to predict a ratio nobody ran, and to bound the general loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight import laws
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.train import Samples, Trainer, byte_windows
from pennyweight.train.samples import TwoStage
from pennyweight.train.schedules import constant

_WIDTHS, _RATIOS, _HELD, _EVERY, _BATCH = (24, 40), (0.0, 0.1, 0.25, 0.75, 1.0), 0.5, 100, 16
_PRETRAINED, _DROP = 500, 0.03


def windows(source: str | Sequence[str]) -> tuple[Tensor, Tensor]:
    """Of a text's bytes: to train on, and 300 to judge by."""
    train = byte_windows(source, part="calibration", length=tiny.LENGTH)
    held = byte_windows(source, part="heldout", length=tiny.LENGTH, count=300)
    return train.clamp_(max=tiny.VOCABULARY - 1), held.clamp_(max=tiny.VOCABULARY - 1)


def pretrained(width: int, text: Tensor) -> nn.Module:
    """A GPT that has read the general text."""
    module = tiny.gpt(width=width)
    Trainer(
        module, torch.optim.AdamW(module.parameters(), weight_decay=0.0), Samples(text, seed=0), batch=_BATCH,
        schedule=constant(20, peak=3e-3), clip=1.0,
    ).run(_PRETRAINED)  # fmt: skip
    return module


def continued(
    start: nn.Module,
    ratio: float,
    wiki: Tensor,
    code: Tensor,
    judge: Mapping[str, Tensor],
    stops: Sequence[int] = (_EVERY, 2 * _EVERY, 4 * _EVERY),
) -> list[dict[str, float]]:
    """A row at each of the ``stops``, in steps, of a copy of ``start`` trained on a share of ``code``.

    N and D are in thousands; losses have the names of ``judge``.
    """
    module = copy.deepcopy(start)
    general, domain = Samples(wiki, seed=1), Samples(code, seed=1)
    stream = general if ratio == 0 else domain if ratio == 1 else TwoStage(general, domain, switch=0, share=ratio)
    trainer = Trainer(
        module, torch.optim.AdamW(module.parameters(), weight_decay=0.0), stream, batch=_BATCH,
        schedule=constant(20, peak=2e-3), clip=1.0,
    )  # fmt: skip
    size = sum(p.numel() for name, p in module.named_parameters() if "embed" not in name and "head" not in name)
    rows = []
    for stop in stops:
        trainer.run(stop)
        found = {name: float(token_losses(module, ids, batch=150).mean()) for name, ids in judge.items()}
        rows.append({"N": size / 1e3, "D": stop * _BATCH * 32 / 1e3, "r": ratio, **found})
    return rows


def _through(runs: Sequence[Mapping[str, float]], key: str, count: int) -> float:
    """At the held ratio, the polynomial in the ratio through the ``count`` runs nearest to it."""
    nearest = sorted(runs, key=lambda one: abs(one["r"] - _HELD))[:count]
    return float(np.polyval(np.polyfit([one["r"] for one in nearest], [one[key] for one in nearest], count - 1), _HELD))


@claim(row=85, pace="slow", headline="Huber loss 0.0157 and R2 0.9796 on domains; R2 0.9717 on an unseen ratio")
@tiny.one_thread()
def mixture_law_predicts_an_unseen_ratio(assets: Assets) -> Outcome:
    """Byte GPTs of Wikipedia, continued on source code: 2 sizes, 5 ratios, 3 lengths; a sixth ratio is held out."""
    (wiki, wiki_held), (code, code_held) = windows("wiki"), windows("stdlib-code")
    judge = {"general_loss": wiki_held, "domain_loss": code_held}
    rows, held = [], []
    bases = {}
    for width in _WIDTHS:
        bases[width] = module = pretrained(width, wiki)
        for ratio in _RATIOS:
            rows += continued(module, ratio, wiki, code, judge)
        held += continued(module, _HELD, wiki, code, judge)
    law = laws.dcpt.fit(rows)
    truth = np.array([[row["domain_loss"], row["general_loss"]] for row in held])
    at = [(row["N"], row["D"], row["r"]) for row in held]
    mine = np.array([[float(law.loss(*p)), float(law.general_loss(*p))] for p in at])
    near = [[one for one in rows if (one["N"], one["D"]) == (row["N"], row["D"])] for row in held]
    # the rivals: through the runs of the same size and length, a line between the two on either side of the ratio, and
    # the parabola through the three nearest
    curves = [
        np.array([[_through(group, key, count) for key in ("domain_loss", "general_loss")] for group in near])
        for count in (2, 3)
    ]
    errors = [float(np.abs(guess - truth).mean()) for guess in (mine, *curves)]
    spread = ((truth - truth.mean(0)) ** 2).sum()
    r_squared = float(1 - ((mine - truth) ** 2).sum() / spread)
    n, d = held[-1]["N"], held[-1]["D"]
    wanted = law.optimal_ratio(n, D=d, general_drop=_DROP)
    fresh = continued(bases[_WIDTHS[-1]], round(wanted.ratio, 3), wiki, code, judge)[-1]
    base = next(row["general_loss"] for row in rows if (row["N"], row["D"], row["r"]) == (n, d, 0.0))
    kept = fresh["general_loss"] / base - 1
    return Outcome(
        method=errors[0],
        baseline=min(errors[1:]),
        unit="mean absolute error at a ratio that was not run, nats a byte; the baseline is the better of a line and a "
        "parabola through the neighboring runs",
        holds=bool(errors[0] < min(errors[1:]) and r_squared >= 0.95 and kept <= _DROP),
        control=(f"general loss given up at the ratio chosen for {_DROP:.0%}", kept),
        notes=(
            f"line {errors[1]:.4f}, parabola {errors[2]:.4f}; R2 at the held ratio {r_squared:.4f}; chosen share "
            f"{wanted.ratio:.2f}; {len(rows)} points"
        ),
    )
