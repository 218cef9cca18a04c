"""Row 52, Power scheduler: one setting for every batch and length, within 1 % of each one's best, is not found here."""

from __future__ import annotations

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.laws import bench

_BATCHES, _TOKENS = (8, 32), (100_000, 400_000)
_RATES = (1e-3, 3e-3, 9e-3, 27e-3)
_AMPLITUDES = (0.06, 0.12, 0.24)
_NEAR = 0.01  # what one Power setting should lose at most, and one fixed rate not
_BASE = bench.Run(width=24, schedule="wsd", held_out=192)


def _steps(batch: int, tokens: int) -> int:
    return round(tokens / (batch * _BASE.length))


@claim(row=52, pace="slow", headline="one set of hyperparameters for models of any length and batch (abstract)")
def one_power_setting_stays_near_the_best(assets: Assets) -> Outcome:
    """A byte GPT, two batches by two lengths; WSD at four rates, Power at three amplitudes; excess over each best."""
    cells = [(batch, tokens) for batch in _BATCHES for tokens in _TOKENS]

    def losses(schedule: str, values: tuple[float, ...]) -> dict[tuple[int, int], dict[float, float]]:
        runs = {
            (cell, value): bench.grid(
                _BASE, schedule=[schedule], lr=[value], batch=[cell[0]], steps=[_steps(*cell)],
                warmup=[max(2, _steps(*cell) // 20)],
            )[0]
            for cell in cells for value in values
        }  # fmt: skip
        records = dict(zip(runs, bench.sweep(list(runs.values()), workers=1), strict=True))
        return {cell: {value: records[cell, value].loss for value in values} for cell in cells}

    stable, power = losses("wsd", _RATES), losses("power", _AMPLITUDES)
    best = {cell: min(found.values()) for cell, found in stable.items()}

    def worst(found: dict[tuple[int, int], dict[float, float]], value: float) -> float:
        return max(found[cell][value] / best[cell] - 1 for cell in cells)

    method = min(worst(power, value) for value in _AMPLITUDES)
    baseline = min(worst(stable, value) for value in _RATES)
    optimal = {cell: min(found, key=lambda rate: found[rate]) for cell, found in stable.items()}
    return Outcome(
        method=method,
        baseline=baseline,
        unit="relative excess loss over the best rate of each cell, worst of four cells",
        holds=method < _NEAR <= baseline,
        control=("the usual middle rate of 3e-3 for every cell", worst(stable, 3e-3)),
        notes="best rates: " + ", ".join(f"batch {b}, {t:,} bytes: {rate:g}" for (b, t), rate in optimal.items())
        + "; amplitude and rate each the best of those tried for all four cells together",
    )  # fmt: skip
