"""Row 55, compute-optimal QAT: a fused cooldown costs nothing; the growth of the best share with tokens is not seen."""

from __future__ import annotations

from functools import cache

import numpy as np

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.laws import qat_fraction
from pennyweight.train import Samples, qat

_WIDTH, _BATCH, _BITS = 32, 16, 2
#: What every run here learns from at a step.
TOKENS = _BATCH * 32
STEPS, SHARES = (200, 1000), (0.03, 0.1, 0.3, 0.7)


def trained(
    steps: int, share: float, *, width: int = _WIDTH, bits: int = _BITS, fused: bool = True
) -> tuple[float, int]:
    """Held-out loss of a byte GPT after ``steps``, the last ``share`` of them rounded; and its rounded parameters."""
    module = tiny.gpt(width=width)
    run = qat(
        module, Samples(tiny.text()[0], seed=0), steps=steps, batch=_BATCH, bits=bits, peak=4e-3, phases=share,
        fuse_cooldown=fused, warmup=20,
    )  # fmt: skip
    return float(tiny.held_out_losses(module).mean()), run.params


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


@claim(row=55, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def fused_cooldown_costs_nothing(assets: Assets) -> Outcome:
    """The cooldown of the rate in the quantization-aware phase, beside one before it and another in it."""
    losses, _ = table()
    fused = losses[STEPS[1]][2]
    classic, _ = trained(STEPS[1], SHARES[2], fused=False)
    chosen = {steps: min(losses[steps]) for steps in STEPS}
    return Outcome(
        method=fused,
        baseline=classic,
        unit="held-out nats a byte, 2 bits, 30 % of 1,000 steps quantization-aware",
        holds=bool(fused < classic + 0.005 and fused < losses[STEPS[1]][0] - 0.05),
        control=("3 % of the steps quantization-aware", losses[STEPS[1]][0]),
        notes="; ".join(
            f"{steps} steps: losses "
            + ", ".join(f"{share:g}: {loss:.3f}" for share, loss in zip(SHARES, losses[steps], strict=True))
            for steps in STEPS
        )
        + f"; best {chosen[STEPS[1]]:.3f}",
    )
