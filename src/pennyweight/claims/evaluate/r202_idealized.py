"""Row 202, the idealized runtime: from a few runs, the time of all others to within a few percent."""

from __future__ import annotations

import csv
from collections.abc import Callable
from importlib.resources import files
from statistics import median

import numpy as np

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.measure.idealized import Run, fit, time_queries

_PROMPTS, _LONG = (1, 256, 512, 1024, 1536, 1920), (1, 1024)  # eight runs of 270 are fitted to
_WITHIN, _WITHIN_HERE = 0.05, 0.10


@claim(
    row=202, pace="quick", headline="estimating saves 57 times the cost of running every query (notebook)"
)  # fmt: skip
def eight_runs_tell_the_other_262(assets: Assets) -> Outcome:
    table: dict[str, list[Run]] = {}
    text = (files("pennyweight.claims.tables") / "helm_a100_runtimes.csv").read_text("utf-8")
    for row in csv.DictReader(text.splitlines()):
        run = Run(int(row["prompt_tokens"]), int(row["output_tokens"]), float(row["seconds_mean"]))
        table.setdefault(row["model"], []).append(run)
    errors: list[list[float]] = [[], [], []]
    for runs in table.values():
        known = [
            run for run in runs
            if (run.prompt in _PROMPTS and run.output == 1) or (run.prompt in _LONG and run.output == 64)
        ]  # fmt: skip
        for found, guess in zip(errors, _guesses(known), strict=True):
            found += _missed(guess, [run for run in runs if run not in known])
    method, baseline, control = map(median, errors)
    return Outcome(
        method=method, baseline=baseline, unit="median relative error of the runs left out",
        holds=method <= _WITHIN and method < min(baseline, control),
        control=("a linear regression on prompt and output tokens, same runs", control),
        notes=f"Four models on A100s. Nine in ten errors are below {np.quantile(errors[0], 0.9):.3f} (regression "
        f"{np.quantile(errors[2], 0.9):.3f}). The baseline is one speed for all tokens.",
    )  # fmt: skip


@claim(row=202, pace="slow", headline="idealized runtimes on other hardware: 10 times cheaper than all runs (notebook)")
def six_runs_tell_the_other_fourteen_here(assets: Assets) -> Outcome:
    prompts, outputs = (16, 64, 128, 192, 256), (1, 8, 16, 24)
    every = time_queries(assets.smollm2().model, prompts=prompts, outputs=outputs, repeats=3)
    keys = list(dict.fromkeys((run.prompt, run.output) for run in every))
    runs = [Run(*key, min(run.seconds for run in every if (run.prompt, run.output) == key)) for key in keys]
    known = [run for run in runs if run.prompt in prompts[::2] and run.output in (1, 16)]
    rest = [run for run in runs if run not in known]
    method, baseline, control = (median(_missed(guess, rest)) for guess in _guesses(known))
    return Outcome(
        method=method, baseline=baseline, unit="median relative error of the runs left out",
        holds=method <= _WITHIN_HERE and method < baseline,
        control=("a linear regression on prompt and output tokens, same runs", control),
        notes="SmolLM2-135M in float32, the shortest of three runs each. The baseline is one speed for all tokens.",
    )  # fmt: skip


Guess = Callable[[int, int], float]


def _guesses(known: list[Run]) -> tuple[Guess, Guess, Guess]:
    """By the row's method, by one speed for all tokens, and by a regression."""
    speed = sum(run.seconds for run in known) / sum(run.prompt + run.output for run in known)
    seconds = [run.seconds for run in known]
    plane = np.linalg.lstsq(np.array([(1, run.prompt, run.output) for run in known]), seconds, rcond=None)[0]
    return (
        fit(known).runtime,
        lambda prompt, output: speed * (prompt + output),
        lambda prompt, output: float(plane @ (1, prompt, output)),
    )


def _missed(guess: Guess, runs: list[Run]) -> list[float]:
    return [abs(guess(run.prompt, run.output) / run.seconds - 1) for run in runs]
