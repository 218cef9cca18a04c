"""Row 55, compute-optimal QAT: a fused cooldown saves less than 6 % of the steps, and the best share does not grow."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.laws import qat_fraction
from pennyweight.measure import stats
from pennyweight.train import Samples, qat

_WIDTH, _BATCH, _BITS = 32, 16, 2
_SEEDS = (0, 1)
#: What every run here learns from at a step.
TOKENS = _BATCH * 32
STEPS, SHARES = (200, 1000), (0.03, 0.1, 0.3, 0.7)


def trained(
    steps: int, share: float, *, width: int = _WIDTH, bits: int = _BITS, fused: bool = True
) -> tuple[float, int]:
    """Held-out loss of a byte GPT after ``steps``, the last ``share`` of them rounded; and its rounded parameters."""
    losses, params = _windows(steps, share, width=width, bits=bits, fused=fused)
    return float(losses.mean()), params


def _windows(
    steps: int, share: float, *, width: int = _WIDTH, bits: int = _BITS, fused: bool = True, seed: int = 0
) -> tuple[Tensor, int]:
    """The same, a loss for every held-out window (C,)."""
    module = tiny.gpt(width=width, seed=seed)
    run = qat(
        module, Samples(tiny.text()[0], seed=seed), steps=steps, batch=_BATCH, bits=bits, peak=4e-3, phases=share,
        fuse_cooldown=fused, warmup=20,
    )  # fmt: skip
    return tiny.held_out_losses(module).mean(1), run.params


def _best(losses: list[float]) -> float:
    """The share at the vertex of the parabola through the least loss and its neighbors, in log share."""
    at = int(np.clip(np.argmin(losses), 1, len(losses) - 2))
    x, y = np.log(SHARES[at - 1 : at + 2]), losses[at - 1 : at + 2]
    a, b, _ = np.polyfit(x, y, 2)
    vertex = -b / (2 * a) if a > 0 else x[int(np.argmin(y))]
    return float(np.exp(np.clip(vertex, x[0], x[-1])))


_HEADLINE = "the best share grows with tokens a parameter byte; 757 runs (abstract)"


@cache
def table() -> tuple[dict[int, list[float]], int]:
    """Losses of each budget by share, and the parameters that are rounded."""
    losses, params = {}, 1
    for steps in STEPS:
        found = [trained(steps, share) for share in SHARES]
        losses[steps], params = [loss for loss, _ in found], found[0][1]
    return losses, params


@claim(row=55, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def longer_runs_want_a_larger_share(assets: Assets) -> Outcome:
    """Byte GPTs to 2 bits, five times the tokens: the share of least loss, by a parabola in its logarithm."""
    losses, params = table()
    best = {steps: _best(found) for steps, found in losses.items()}
    rule = {steps: qat_fraction(params, steps * TOKENS, _BITS) for steps in STEPS}
    return Outcome(
        method=best[STEPS[1]],
        baseline=best[STEPS[0]],
        unit=f"best quantization-aware share of {STEPS[1]:,} steps against {STEPS[0]}",
        lower_is_better=False,
        holds=best[STEPS[1]] > best[STEPS[0]],
        control=(f"the formula for {STEPS[1]:,} steps", rule[STEPS[1]]),
        notes=f"the formula for {STEPS[0]} steps: {rule[STEPS[0]]:.2f}; one seed, {params:,} parameters",
    )


_SAVED = 60  # steps of full precision that the fused schedule goes without: 6 % of all
_MARGIN = 0.005  # nats a byte


@claim(row=55, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def fused_cooldown_saves_steps(assets: Assets) -> Outcome:
    """The cooldown in the quantization-aware phase alone, 6 % fewer steps, beside one before it and another in it."""
    steps, late = STEPS[1], round(SHARES[2] * STEPS[1])
    short = steps - _SAVED  # as many rounded steps, so all that is saved is full precision

    def read(total: int, *, fused: bool) -> Tensor:  # mean over seeds
        return torch.stack([_windows(total, late / total, fused=fused, seed=seed)[0] for seed in _SEEDS]).mean(0)

    fused, classic, equal, shorter = (
        read(total, fused=joined) for total, joined in ((short, True), (steps, False), (steps, True), (short, False))
    )
    gap, same, saved = (
        stats.paired_difference(b, a) for b, a in ((classic, fused), (classic, equal), (shorter, fused))
    )
    method, baseline = float(fused.mean()), float(classic.mean())
    return Outcome(
        method=method,
        baseline=baseline,
        unit=f"held-out nats a byte, 2 bits, {late} steps quantization-aware; {short} steps in all against {steps:,}",
        holds=bool(gap.high < _MARGIN and same.high < _MARGIN and saved.high < 0),
        control=(f"two cooldowns, {short} steps in all", float(shorter.mean())),
        interval=(baseline + gap.low, baseline + gap.high),
        notes=(
            f"not worse by {_MARGIN:g} nats is asked of the fewer steps, and of {steps:,} fused ones "
            f"({float(equal.mean()):.4f}, difference [{same.low:+.4f}, {same.high:+.4f}]); and less than the control "
            f"[{saved.low:+.4f}, {saved.high:+.4f}]; {len(_SEEDS)} seeds, intervals over {len(fused)} windows"
        ),
    )
