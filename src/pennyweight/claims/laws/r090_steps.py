"""Row 90, loss in size and steps: the law without a batch, and exponential decay, against rivals on runs to come."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from pennyweight import laws
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.laws import bench, stack
from pennyweight.measure import stats

_BASE = bench.Run(batch=32, steps=600, schedule="constant", lr=3e-3, warmup=30, evaluations=24, held_out=192)
_WIDTHS, _SEEDS = (8, 12, 16, 24), (0, 1)
_LARGEST = replace(_BASE, width=40, steps=1200, evaluations=48)  # of more steps, too
_LARGE_SEEDS = (2, 3, 4, 5)
_WARMUP = 100  # steps that no law here speaks of


@lru_cache(maxsize=1)
def _sweep() -> tuple[list[bench.Record], list[bench.Record]]:
    """Runs to fit, and larger, longer ones to judge by; both claims read these."""
    small = [record for width in _WIDTHS for record in stack.train(bench.grid(_BASE, width=(width,), seed=_SEEDS))]
    return small, stack.train(bench.grid(_LARGEST, seed=_LARGE_SEEDS))


@claim(row=90, pace="slow", headline="attributes of models up to 33B from ones of 1M to 60M (abstract)")
def size_and_steps_predict_larger_and_longer_runs(assets: Assets) -> Outcome:
    """`kaplan_LNS` against a floor besides (`chinchilla`) and no steps at all; byte GPTs at one large batch."""
    small, large = _sweep()
    columns = bench.points(small, curve=True, warmup=_WARMUP)
    steps = laws.fit({"N": columns["N"], "S": columns["steps"], "loss": columns["loss"]}, "kaplan_LNS", holdout=False)
    floor = laws.fit({name: columns[name] for name in ("N", "D", "loss")}, "chinchilla", holdout=False)
    ends = bench.points(small)
    size = laws.fit({"N": ends["N"], "loss": ends["loss"]}, "power", axis="N", holdout=False)
    errors: dict[str, list[float]] = {"steps": [], "floor": [], "size": []}
    for record in large:
        here = bench.points([record], curve=True, warmup=_WARMUP)
        n, s, d, truth = (np.array(here[name]) for name in ("N", "steps", "D", "loss"))
        guesses = {"steps": steps(N=n, S=s), "floor": floor(N=n, D=d), "size": size(n)}
        for name, guess in guesses.items():
            errors[name].append(float(np.abs(np.asarray(guess) / truth - 1).mean()))
    method, baseline, control = (float(np.mean(found)) for found in errors.values())
    gap = stats.paired_difference(errors["floor"], errors["steps"])
    report = steps.report
    assert report is not None
    return Outcome(
        method=method,
        baseline=baseline,
        unit="relative error along the curves of larger, longer runs, mean; the baseline is E + A/N^a + B/D^b",
        holds=gap.high < 0 and method < control,
        control=("a power of the size alone, at the end of the fitted runs", control),
        interval=(baseline + gap.low, baseline + gap.high),
        notes=(
            f"{steps}; {report.points} points of {len(small)} runs, R2 {report.r_squared:.4f}; N from "
            f"{min(columns['N']):,.0f} to {max(columns['N']):,.0f}, judged at {large[0].run.params:,} up to "
            f"{_LARGEST.steps:,} steps, twice those fitted, {len(large)} seeds; the interval is of the difference to "
            f"the baseline: {floor}"
        ),
    )


@claim(row=90, pace="slow", headline="none: the textbook relaxation curve, beside power laws of learning curves")
def decay_to_a_floor_predicts_the_second_half(assets: Assets) -> Outcome:
    """`exp_decay`, `power` and `power_const` fitted to the first half of each loss curve, judged on the second."""
    small, large = _sweep()
    errors: dict[str, list[float]] = {"exp_decay": [], "power": [], "power_const": []}
    for record in (*small, *large):
        points = [(step, loss) for step, loss in record.curve if step >= _WARMUP]
        first = [point for point in points if point[0] <= record.run.steps / 2]
        later, truth = np.array(points[len(first) :]).T
        for form, found in errors.items():
            law = laws.fit(first, form, holdout=False)
            found.append(float(np.abs(np.asarray(law(later)) / truth - 1).mean()))
    method, baseline, control = (float(np.mean(found)) for found in errors.values())
    gap = stats.paired_difference(errors["power"], errors["exp_decay"])
    return Outcome(
        method=method,
        baseline=baseline,
        unit="relative error on the second half of a loss curve, mean of the runs",
        holds=gap.high < 0,
        control=("a power law above a floor", control),
        interval=(baseline + gap.low, baseline + gap.high),
        notes=(
            f"{len(small) + len(large)} byte GPTs at a constant rate, {_BASE.steps} steps, the {len(large)} largest "
            f"{_LARGEST.steps:,}; one law a run; baseline: a power law; the interval is of the difference to it"
        ),
    )
