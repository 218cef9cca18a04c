"""Row 48, AST: at 2:4, masks that go on moving while a model is retrained beat masks that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.levers.prune.adaptive import AST
from pennyweight.measure import stats

_SEEDS = (0, 1)
_WINDOWS = 16_384
#: The decay was chosen on other windows and another seed, of 1e-3, 1e-2 and 5e-2: gradients of a model this small are
#: large. Everybody has the same steps, rates and teacher.
_OPTIONS: dict[str, Any] = {"steps": 400, "batch": 32, "windows": _WINDOWS, "rate": 1e-3, "decay": 5e-2}
_KINDS: dict[str, dict[str, Any]] = {
    "ast": {},
    "static": {"every": 0, "decay": 0.0},
    "sr-ste": {"decay_in": "gradient", "decay": 2e-4},  # its own source's
    "boosted": {"group": 16},
    "cut": {"steps": 0},
}
_MARGIN = 0.005  # nats


@claim(
    row=48,
    pace="slow",
    headline="Wikitext perplexity of GPT-2 at 2:4: 32.23, boosted 31.13, gradual magnitude 33.48, dense 29.95 (README)",
)
@tiny.one_thread()
def moving_masks_beat_masks_that_stay(assets: Assets) -> Outcome:
    """A byte-level GPT, 2:4 in its blocks, retrained in a fifth of its steps against its dense self; two seeds."""
    model = tiny.reader(steps=2000)
    table: dict[str, Tensor] = {}  # (seeds, windows)
    sizes = {}
    for name, options in _KINDS.items():
        lever, losses = AST(**{**_OPTIONS, **options}), []
        for seed in _SEEDS[: 1 if name == "cut" else None]:
            made = tiny.changed(model, lever, windows=_WINDOWS, seed=seed)
            losses.append(tiny.held_out_losses(made.module).mean(1))
            sizes[name] = sum(tensor.nbytes for tensor in made.module.state_dict().values())
        table[name] = torch.stack(losses)
    mean = {name: float(each.mean()) for name, each in table.items()}
    dense = float(tiny.held_out_losses(model.module).mean())
    gain, boost = (
        stats.paired_difference(table[other].mean(0), table[one].mean(0))
        for other, one in (("static", "ast"), ("ast", "boosted"))
    )
    return Outcome(
        method=mean["ast"],
        baseline=mean["static"],
        unit="held-out nats a byte at 2:4",
        holds=sizes["ast"] == sizes["static"]
        and gain.high < 0
        and boost.high < 0
        and mean["ast"] < mean["static"] - _MARGIN
        and mean["ast"] <= mean["sr-ste"],
        control=("SR-STE: a decay in the gradient, not behind the momentum", mean["sr-ste"]),
        interval=(mean["static"] + gain.low, mean["static"] + gain.high),
        notes=(
            f"dense {dense:.4f}, cut by magnitude without training {mean['cut']:.4f}, boosted (SLoRB of 16) "
            f"{mean['boosted']:.4f} at {sizes['boosted'] / sizes['ast']:.3f} x the bytes; the interval is of the "
            "difference to masks that stay"
        ),
    )
