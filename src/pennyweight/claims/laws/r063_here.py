"""Row 63, Step Law: its form, fitted to grids of runs made here, sets rate and batch of larger runs nobody searched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.laws import bench, hparams, stack
from pennyweight.laws.hparams import StepLaw
from pennyweight.measure import stats

_BASE = bench.Run(depth=1, length=16, held_out=384)
_RATES, _BATCHES, _SEEDS = (1.5e-3, 3e-3, 6e-3, 12e-3, 24e-3, 48e-3), (1, 2, 4, 8), (0, 1)
_FITTED = [(width, tokens) for width in (8, 16) for tokens in (2**15, 2**17)]
_LARGER, _FRESH = ((48, 2**17), (48, 2**18)), (2, 3, 4, 5, 6)  # and the seeds that judge
_SEARCH = (0.75e-3, *_RATES)  # at the larger size: its best must not lie on the edge
_TOLERANCE = 0.01  # of "near the best": the noise of a mean of two runs; the paper's 0.25 % is for runs that have less
_EXCESS = 0.015
Setting = tuple[float, int]  # rate, windows a step


def _runs(width: int, tokens: int, batch: int, **axes: tuple[float, ...]) -> list[bench.Run]:
    steps = max(8, round(tokens / (batch * _BASE.length)))
    base = replace(_BASE, width=width, batch=batch, steps=steps, warmup=max(1, steps // 20))
    return bench.grid(base, **axes)


def _searched(
    width: int, tokens: int, *, rates: tuple[float, ...], batches: tuple[int, ...], seeds: tuple[int, ...]
) -> list[bench.Record]:
    return [record for batch in batches for record in stack.train(_runs(width, tokens, batch, lr=rates, seed=seeds))]


def _best(records: list[bench.Record]) -> Setting:
    """The setting of least mean loss."""
    found: dict[Setting, list[float]] = {}
    for record in records:
        found.setdefault((record.run.lr, record.run.batch), []).append(record.loss)
    return min(found, key=lambda setting: float(np.mean(found[setting])))


def _columns(groups: dict[tuple[int, int], list[bench.Record]]) -> dict[str, list[float]]:
    """One row a setting, its loss the mean of its seeds."""
    rows = []
    for (_, tokens), records in groups.items():
        for at in range(0, len(records), len(_SEEDS)):  # seeds vary fastest
            same = records[at : at + len(_SEEDS)]
            run, loss = same[0].run, float(np.mean([record.loss for record in same]))
            rows.append({"N": run.params, "D": tokens, "lr": run.lr, "batch_seqs": run.batch, "loss": loss})
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def _set(law: StepLaw, width: int, tokens: int) -> Setting:
    found = law.step(replace(_BASE, width=width).params, tokens, _BASE.length)
    return found.lr, max(1, round(found.batch_seqs))


@claim(row=63, pace="slow", headline="within 0.07 % of the best of a grid search (abstract)")
def rate_and_batch_fitted_here_serve_larger_runs(assets: Assets) -> Outcome:
    """Byte GPTs; grids at two sizes by two lengths; a size nine times as large is judged at two lengths, five seeds."""
    groups = {group: _searched(*group, rates=_RATES, batches=_BATCHES, seeds=_SEEDS) for group in _FITTED}
    law = hparams.fit(_columns(groups), seq_len=_BASE.length, tolerance=_TOLERANCE)
    steady = _best(groups[_FITTED[-1]])
    losses: dict[str, list[float]] = {"law": [], "steady": [], "published": []}
    said, excess = [], 0.0
    for width, tokens in _LARGER:
        settings = {
            "law": _set(law, width, tokens), "steady": steady, "published": _set(hparams.PUBLISHED, width, tokens)
        }  # fmt: skip
        if (width, tokens) == _LARGER[0]:
            settings["best"] = _best(_searched(width, tokens, rates=_SEARCH, batches=_BATCHES[1:], seeds=(0,)))
        here: dict[str, list[float]] = {}
        for name, (rate, batch) in settings.items():
            found = stack.train(_runs(width, tokens, batch, lr=(rate,), seed=_FRESH))
            here[name] = [record.loss for record in found]
        for name in losses:
            losses[name] += here[name]
        if "best" in here:
            excess = float(np.mean(here["law"]) / np.mean(here["best"]) - 1)
        said.append(
            f"{tokens:,} bytes: " + ", ".join(
                f"{name} {rate:.2g} x {batch} {np.mean(here[name]):.3f}" for name, (rate, batch) in settings.items()
            )
        )  # fmt: skip
    gain = stats.paired_difference(losses["steady"], losses["law"])
    method, baseline, control = (float(np.mean(values)) for values in losses.values())
    return Outcome(
        method=method,
        baseline=baseline,
        unit="held-out nats a byte, mean of two lengths and five seeds; the baseline keeps what served the largest "
        "fitted grid best",
        holds=gain.high < 0 and method < control and excess < _EXCESS,
        control=("the published coefficients", control),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=(
            "; ".join(said) + f"; rate x windows of {_BASE.length} bytes; best: of 21 settings searched there, run "
            f"again, the law {excess:+.2%} beside it; rate ~ N^{law.lr_params:.2f} D^{law.lr_tokens:.2f}, batch ~ "
            f"D^{law.batch_tokens:.2f} from {law.points} of {24 * len(_FITTED)} settings; the interval is of the "
            "difference to the baseline"
        ),
    )
