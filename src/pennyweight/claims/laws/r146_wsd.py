"""Row 146, MiniCPM: one stable run, decayed from its checkpoints, keeps up with a cosine tuned for each length."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.measure import stats
from pennyweight.train.schedules import Schedule, Shape, constant, cosine

_LENGTHS = (600, 1200, 2400)
_RATES = (1.5e-3, 3e-3, 6e-3)  # of the cosines; the stable run gets the middle one, untuned
_WARMUP = 50
_OTHERS: tuple[Shape, ...] = ("linear", "1-sqrt")
_MARGIN = 0.01  # nats


def _run(schedule: Schedule, steps: int, *, checkpoint: Path | None = None) -> Tensor:
    run = tiny.trainer(tiny.gpt(width=32), schedule, batch=16)
    if checkpoint is not None:
        run.resume(checkpoint)
    run.run(steps)
    return tiny.held_out_losses(run.module)


def _stable(rate: float, folder: Path, starts: set[int]) -> tuple[Schedule, dict[int, Tensor]]:
    """The stable run: a checkpoint at each of ``starts``, and held-out losses at each of the lengths."""
    schedule = constant(_WARMUP, peak=rate)
    run, losses = tiny.trainer(tiny.gpt(width=32), schedule, batch=16), {}
    for step in sorted(starts | set(_LENGTHS)):
        run.run(step)
        if step in starts:
            run.save(folder / str(step))
        if step in _LENGTHS:
            losses[step] = tiny.held_out_losses(run.module)
    return schedule, losses


@claim(
    row=146,
    pace="slow",
    headline="WSD with 10 % of decay reaches the loss of a cosine set to the same length, or a lower one (section 4)",
)
@tiny.one_thread()
def one_stable_run_serves_every_length(assets: Assets) -> Outcome:
    """A byte GPT; three lengths; 2.5 % of decay and none at all beside 10 %."""
    starts = {length - round(share * length) for length in _LENGTHS for share in (0.1, 0.025)}
    with tempfile.TemporaryDirectory() as folder:
        schedule, stable = _stable(_RATES[1], Path(folder), starts)

        def branch(length: int, share: float, shape: Shape) -> Tensor:
            over = round(share * length)
            start = length - over
            return _run(schedule.decayed(start, over, shape), length, checkpoint=Path(folder) / str(start))

        decayed = {length: branch(length, 0.1, "exp") for length in _LENGTHS}
        hasty = {length: branch(length, 0.025, "exp") for length in _LENGTHS}
        others = {shape: branch(_LENGTHS[-1], 0.1, shape) for shape in _OTHERS}
    cosines = {
        length: min((_run(cosine(length, _WARMUP, peak=rate), length) for rate in _RATES), key=Tensor.mean)
        for length in _LENGTHS
    }
    tables = (decayed, cosines, stable, hasty)
    means = [[float(table[length].mean()) for length in _LENGTHS] for table in tables]
    method, baseline, never, short = means
    holds = all(
        new <= old + _MARGIN and new < flat - _MARGIN and new < brief
        for new, old, flat, brief in zip(method, baseline, never, short, strict=True)
    )
    behind = stats.paired_difference(cosines[_LENGTHS[-1]], decayed[_LENGTHS[-1]])
    spent = _LENGTHS[-1] + sum(round(0.1 * length) for length in _LENGTHS)
    shapes = "; ".join(f"{shape} {float(losses.mean()):.3f}" for shape, losses in others.items())
    return Outcome(
        method=method[-1],
        baseline=baseline[-1],
        unit="held-out nats a byte after 2,400 steps",
        holds=holds,
        control=("the same run without a decay", never[-1]),
        interval=(baseline[-1] + behind.low, baseline[-1] + behind.high),
        notes=(
            f"exp 10 %, tuned cosine, no decay, 2.5 % after {', '.join(map(str, _LENGTHS))} steps: "
            + "; ".join(", ".join(f"{value:.3f}" for value in row) for row in zip(*means, strict=True))
            + f"; other shapes after the last: {shapes}; {spent} steps for all lengths, {sum(_LENGTHS)} for separate "
            "runs at one rate; the interval is of the difference to the cosine"
        ),
    )
