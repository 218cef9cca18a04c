"""Row 42, time-series laws: likelihood falls as a power of size inside the distribution, and not outside it here."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight import laws
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets

CONTEXT, PATCH = 48, 8
_STEPS, _BATCH = 500, 64
_WIDTHS, _SEEDS = (2, 4, 8, 16, 32, 64), (0, 1)


def series_of(count: int, g: torch.Generator, *, outside: bool) -> Tensor:
    """(count, T) standardized series: seasons and an autoregression; outside, other seasons, jumps and a trend."""
    t = torch.arange(CONTEXT + PATCH, dtype=torch.float32)
    period = (4 + 16 * torch.rand(count, 2, generator=g)) * (1.6 if outside else 1.0)
    phase = 6.28 * torch.rand(count, 2, generator=g)
    seasons = torch.sin(6.2832 * t / period[..., None] + phase[..., None]).sum(1)
    noise = 0.3 * torch.randn(count, len(t), generator=g)
    for at in range(1, len(t)):
        noise[:, at] += 0.7 * noise[:, at - 1]
    found = seasons + noise
    if outside:
        jump = torch.randint(8, CONTEXT, (count, 1), generator=g)
        found = found + 1.0 * (t >= jump) + 0.02 * t
    past = found[:, :CONTEXT]
    return (found - past.mean(1, keepdim=True)) / past.std(1, keepdim=True)


class _Forecaster(nn.Module):
    """Patches of the past to a Student-t distribution of each value of the next patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(CONTEXT, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, 3 * PATCH)

    def loss(self, series: Tensor) -> Tensor:
        """Negative log likelihood of a value, plus log 10 so that it stays positive (the unit of a value is moved)."""
        location, scale, freedom = self.head(self.body(series[:, :CONTEXT])).chunk(3, -1)
        spread = nn.functional.softplus(scale) + 1e-3
        student = torch.distributions.StudentT(2 + nn.functional.softplus(freedom), location, spread)
        found: Tensor = 2.302585 - student.log_prob(series[:, CONTEXT:]).mean()  # type: ignore[no-untyped-call]  # of torch
        return found


@claim(row=42, pace="slow", headline="in- and out-of-distribution losses follow power laws of size alike (abstract)")
@tiny.one_thread()
def likelihood_falls_with_size_inside_the_distribution(assets: Assets) -> Outcome:
    """Patch forecasters of six sizes, two seeds, on simulated series; judged on the same generator and on another."""
    judge = {
        name: series_of(2000, torch.Generator().manual_seed(10**6), outside=name == "outside")
        for name in ("inside", "outside")
    }
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in judge}
    for width in _WIDTHS:
        for seed in _SEEDS:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _Forecaster(width)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
            g = torch.Generator().manual_seed(seed)
            for _ in range(_STEPS):
                optimizer.zero_grad()
                model.loss(series_of(_BATCH, g, outside=False)).backward()  # type: ignore[no-untyped-call]  # of torch
                optimizer.step()
                schedule.step()
            size = float(sum(p.numel() for p in model.parameters()))
            with torch.no_grad():
                for name, series in judge.items():
                    rows[name].append((size, float(model.loss(series))))
    found = laws.compare_slopes(rows["inside"], rows["outside"], bootstrap=1000)
    largest = max(size for size, _ in rows["inside"])
    small = [point for point in rows["inside"] if point[0] < largest]
    law = laws.fit(small, form="power", axis="N", holdout=False)
    next_smaller = max(size for size, _ in small)
    truth, unchanged = (
        float(np.mean([loss for size, loss in rows["inside"] if size == one])) for one in (largest, next_smaller)
    )
    guesses = (float(law(N=largest)), unchanged, float(np.mean([loss for _, loss in small])))
    method, baseline, control = (abs(guess / truth - 1) for guess in guesses)
    return Outcome(
        method=method,
        baseline=baseline,
        unit="relative error on the largest size, fitted without it; the baseline is the loss of the next smaller one",
        holds=bool(found.a.interval.high < 0 and method < 0.7 * baseline),
        control=("the mean loss of all smaller ones", control),
        notes=(
            f"slope inside {found.a.slope:.4f} [{found.a.interval.low:.4f}, {found.a.interval.high:.4f}], outside "
            f"{found.b.slope:.4f} [{found.b.interval.low:.4f}, {found.b.interval.high:.4f}]; likelihoods of continuous "
            "values are moved by log 10, since a power law needs positive losses"
        ),
    )
