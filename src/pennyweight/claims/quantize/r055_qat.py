"""Row 55, compute-optimal QAT: a fused cooldown costs nothing; the growth of the best share with tokens is not seen."""

from __future__ import annotations

from functools import cache

import numpy as np

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.laws import qat_fraction
from pennyweight.train import Samples, qat

_WIDTH, _BATCH, _BITS = 32, 16, 2
_STEPS, _SHARES = (200, 1000), (0.03, 0.1, 0.3, 0.7)


def _loss(steps: int, share: float, *, fused: bool = True) -> tuple[float, int]:
    module = tiny.gpt(width=_WIDTH)
    run = qat(
        module, Samples(tiny.text()[0], seed=0), steps=steps, batch=_BATCH, bits=_BITS, peak=4e-3, phases=share,
        fuse_cooldown=fused, warmup=20,
    )  # fmt: skip
    return float(tiny.held_out_losses(module).mean()), run.params


def _best(losses: list[float]) -> float:
    """The share at the vertex of the parabola through the least loss and its neighbors, in log share."""
    at = int(np.clip(np.argmin(losses), 1, len(losses) - 2))
    x, y = np.log(_SHARES[at - 1 : at + 2]), losses[at - 1 : at + 2]
    a, b, _ = np.polyfit(x, y, 2)
    vertex = -b / (2 * a) if a > 0 else x[int(np.argmin(y))]
    return float(np.exp(np.clip(vertex, x[0], x[-1])))


_HEADLINE = "the best share grows with tokens a parameter byte; 757 runs (abstract)"


@cache
def _table() -> tuple[dict[int, list[float]], int]:
    """Losses of each budget by share, and the parameters that are rounded."""
    table, params = {}, 1
    for steps in _STEPS:
        found = [_loss(steps, share) for share in _SHARES]
        table[steps], params = [loss for loss, _ in found], found[0][1]
    return table, params


@claim(row=55, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def longer_runs_want_a_larger_share(assets: Assets) -> Outcome:
    """Byte GPTs to 2 bits, five times the tokens: the share of least loss, by a parabola in its logarithm."""
    table, params = _table()
    best = {steps: _best(losses) for steps, losses in table.items()}
    rule = {steps: qat_fraction(params, steps * _BATCH * 32, _BITS) for steps in _STEPS}
    return Outcome(
        method=best[_STEPS[1]],
        baseline=best[_STEPS[0]],
        unit=f"best quantization-aware share of {_STEPS[1]:,} steps against {_STEPS[0]}",
        lower_is_better=False,
        holds=best[_STEPS[1]] > best[_STEPS[0]],
        control=(f"the formula for {_STEPS[1]:,} steps", rule[_STEPS[1]]),
        notes=f"the formula for {_STEPS[0]} steps: {rule[_STEPS[0]]:.2f}; one seed, {params:,} parameters",
    )


@claim(row=55, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def fused_cooldown_costs_nothing(assets: Assets) -> Outcome:
    """The cooldown of the rate in the quantization-aware phase, beside one before it and another in it."""
    table, _ = _table()
    fused = table[_STEPS[1]][2]
    classic, _ = _loss(_STEPS[1], _SHARES[2], fused=False)
    chosen = {steps: min(table[steps]) for steps in _STEPS}
    return Outcome(
        method=fused,
        baseline=classic,
        unit="held-out nats a byte, 2 bits, 30 % of 1,000 steps quantization-aware",
        holds=bool(fused < classic + 0.005 and fused < table[_STEPS[1]][0] - 0.05),
        control=("3 % of the steps quantization-aware", table[_STEPS[1]][0]),
        notes="; ".join(
            f"{steps} steps: losses "
            + ", ".join(f"{share:g}: {loss:.3f}" for share, loss in zip(_SHARES, table[steps], strict=True))
            for steps in _STEPS
        )
        + f"; best {chosen[_STEPS[1]]:.3f}",
    )
