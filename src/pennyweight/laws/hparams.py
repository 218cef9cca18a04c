"""Learning rate and batch size from model size and tokens (Step Law).

Row 63. Source: H. Li et al., "Predictable Scale: Part I -- Optimal Hyperparameter Scaling Law in Large Language Model
Pretraining", arXiv:2503.04715, and the mean of the authors' 1,000 bootstrap coefficient sets (step-law/steplaw):
lr = c * N^a * D^b, batch in tokens = d * D^e.

The law belongs to its recipe: AdamW, cosine to a fixed final rate of 1e-5, N without embedding and head. With a final
rate of a tenth of the peak the best peak is lower. Differs from the source: the plateau is ours, from the mean
curvature of the 16 released dense grids (relative smoothed loss against log lr and log batch, within 2 % of each grid's
best).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pennyweight.errors import DataError, OptionError
from pennyweight.laws.forms import Array
from pennyweight.laws.law import Range
from pennyweight.laws.table import columns, numbers

#: Runs within this share of their group's best loss count as optimal when the law is fitted.
TOLERANCE = 0.0025
#: Second derivatives of the relative loss by (log lr, log batch): median over the released dense grids.
CURVATURE = ((0.01273, -0.00540), (-0.00540, 0.01211))


class Plateau(NamedTuple):
    """Where the loss stays within ``tolerance`` of its best: each range at the best value of the other setting."""

    tolerance: float
    lr: Range
    batch_tokens: Range


class Hyperparameters(NamedTuple):
    """Peak learning rate, batch in tokens and in sequences, and the plateau around them."""

    lr: float
    batch_tokens: float
    batch_seqs: float
    plateau: Plateau


@dataclass(frozen=True)
class StepLaw:
    """``lr = exp(lr_constant) * N^lr_params * D^lr_tokens`` and ``batch = exp(batch_constant) * D^batch_tokens``.

    Attributes:
        samples: (B, 5) bootstrap coefficients in that order, when fitted here.
        points: near-optimal runs the fit used.
        curvature: of the relative loss around the optimum, by (log lr, log batch).
    """

    lr_constant: float = 0.5863078
    lr_params: float = -0.7129223
    lr_tokens: float = 0.3074910
    batch_constant: float = -0.5435422
    batch_tokens: float = 0.5709444
    samples: Array | None = field(default=None, repr=False)
    points: int | None = None
    curvature: tuple[tuple[float, float], tuple[float, float]] = CURVATURE

    def step(self, N: Any, D: Any, seq_len: int = 2048, *, tolerance: float = TOLERANCE) -> Hyperparameters:
        """Settings for ``N`` non-vocabulary parameters and ``D`` tokens in sequences of ``seq_len``.

        Arrays of N and D give arrays of settings.
        """
        for name, value in (("N", N), ("D", D), ("seq_len", seq_len), ("tolerance", tolerance)):
            try:
                each = np.asarray(value, float)
            except (TypeError, ValueError):
                each = np.array(np.nan)
            if not ((each > 0) & np.isfinite(each)).all():
                raise OptionError(f"hparams.step: {name} = {value!r}; give a positive number")
        log_n, log_d = np.broadcast_arrays(*(np.log(np.asarray(value, float)) for value in (N, D)))
        lr = _plain(np.exp(self.lr_constant + self.lr_params * log_n + self.lr_tokens * log_d))
        batch = _plain(np.exp(self.batch_constant + self.batch_tokens * log_d))
        # relative loss = d^T H d / 2; along one axis, the other at its best, the half width is sqrt(2 eps (H^-1)_ii)
        wide = np.sqrt(2 * tolerance * np.diag(np.linalg.inv(np.array(self.curvature))))
        plateau = Plateau(
            tolerance,
            Range(lr * math.exp(-wide[0]), lr * math.exp(wide[0])),
            Range(batch * math.exp(-wide[1]), batch * math.exp(wide[1])),
        )
        return Hyperparameters(lr, batch, batch / seq_len, plateau)

    def intervals(self, N: float, D: float, level: float = 0.95) -> tuple[Range, Range] | None:
        """Bootstrap intervals of lr and of batch in tokens; None for the published constants."""
        if self.samples is None:
            return None
        log_lr = self.samples[:, 0] + self.samples[:, 1] * math.log(N) + self.samples[:, 2] * math.log(D)
        log_batch = self.samples[:, 3] + self.samples[:, 4] * math.log(D)
        at = [(1 - level) / 2, (1 + level) / 2]
        lr, batch = (np.exp(np.quantile(values, at)) for values in (log_lr, log_batch))
        return Range(float(lr[0]), float(lr[1])), Range(float(batch[0]), float(batch[1]))


def _plain(values: Array) -> Any:
    return float(values) if values.ndim == 0 else values


PUBLISHED = StepLaw()


def step(N: Any, D: Any, seq_len: int = 2048, *, tolerance: float = TOLERANCE) -> Hyperparameters:
    """The published law at N (non-vocabulary) parameters and D tokens: peak lr, batch, and the plateau around them."""
    return PUBLISHED.step(N, D, seq_len, tolerance=tolerance)


def _grid(grid: Any, seq_len: int) -> dict[str, Array]:
    rows = columns(grid, "hparams.fit")
    names = {"N": ("N",), "D": ("D",), "lr": ("lr",), "loss": ("smooth_loss", "loss")}
    names["batch"] = ("batch_tokens", "batch_seqs")
    found: dict[str, Array] = {}
    for name, candidates in names.items():
        key = next((c for c in candidates if c in rows), None)
        if key is None:
            raise DataError(
                f"hparams.fit: no column {candidates[-1]}; give N, D, lr, loss and batch_tokens or batch_seqs"
            )
        found[name] = numbers(rows[key], key)
    if "batch_tokens" not in rows:
        found["batch"] *= seq_len
    for name, values in found.items():
        if not (np.isfinite(values) & (values > 0)).all():
            raise DataError(f"hparams.fit: {name} must be positive and finite in every row")
    return found


def fit(
    grid: Any, *, seq_len: int = 2048, tolerance: float = TOLERANCE, bootstrap: int = 1000, seed: int = 0
) -> StepLaw:
    """Fit the law to grids of runs over lr and batch.

    Per (N, D) the runs within ``tolerance`` of the best loss (``smooth_loss`` if there) are kept; least squares of
    log lr on (1, log N, log D) and of log batch on (1, log D); intervals by resampling the kept runs.

    Args:
        grid: columns or rows with N, D, lr, loss, and batch_tokens or batch_seqs; or the path of a CSV file with them.
        seq_len: tokens a sequence, for ``batch_seqs``.
        tolerance: of "near the best".
        bootstrap: resamples; 0 for none.
        seed: of the bootstrap.

    Raises:
        DataError: fewer than two N or D, or a column missing.
    """
    table = _grid(grid, seq_len)
    groups = np.unique(np.stack([table["N"], table["D"]]), axis=1).T
    if len({n for n, _ in groups}) < 2 or len({d for _, d in groups}) < 2:
        raise DataError(f"hparams.fit: {len(groups)} (N, D) groups; the law needs two sizes and two token counts")
    kept = np.zeros(table["lr"].size, dtype=bool)
    for n, d in groups:
        here = (table["N"] == n) & (table["D"] == d)
        kept |= here & (table["loss"] <= table["loss"][here].min() * (1 + tolerance))
    log_n, log_d = np.log(table["N"][kept]), np.log(table["D"][kept])
    ones = np.ones(log_n.size)
    for_lr, for_batch = np.stack([ones, log_n, log_d], 1), np.stack([ones, log_d], 1)
    if np.linalg.matrix_rank(for_lr) < 3:
        raise DataError("hparams.fit: N and D only vary together in the near-optimal runs; add groups off that line")
    log_lr, log_batch = np.log(table["lr"][kept]), np.log(table["batch"][kept])

    def solve(index: Array | slice) -> Array:
        lr = np.linalg.lstsq(for_lr[index], log_lr[index], rcond=None)[0]
        return np.concatenate([lr, np.linalg.lstsq(for_batch[index], log_batch[index], rcond=None)[0]])

    best = solve(slice(None))
    samples = None
    if bootstrap:
        draws = np.random.default_rng(seed).integers(0, log_n.size, (bootstrap, log_n.size))
        samples = np.stack([solve(draw) for draw in draws])
    names = ("lr_constant", "lr_params", "lr_tokens", "batch_constant", "batch_tokens")
    coefficients: dict[str, Any] = dict(zip(names, best.tolist(), strict=True))
    return StepLaw(**coefficients, samples=samples, points=int(kept.sum()))


class Landscape(NamedTuple):
    """The quadratic through one grid of runs: its optimum, its curvature, and how well it fits."""

    lr: float
    batch: float
    loss: float
    curvature: Array
    r_squared: float


def landscape(lr: Any, batch: Any, loss: Any, *, within: float = 0.02) -> Landscape:
    """Fit relative loss near the best of one (N, D) by a quadratic in (log lr, log batch).

    Args:
        lr: of each run.
        batch: of each run, any unit; the optimum comes in the same one.
        loss: of each run.
        within: only runs this close to the best count, as a share.

    Raises:
        DataError: fewer than 6 such runs, or no interior minimum.
    """
    log_lr, log_batch, losses = np.log(np.asarray(lr, float)), np.log(np.asarray(batch, float)), np.asarray(loss, float)
    relative = losses / losses.min() - 1
    near = relative <= within
    x, y, z = log_lr[near], log_batch[near], relative[near]
    design = np.stack([np.ones_like(x), x, y, x * x / 2, x * y, y * y / 2], 1)
    if near.sum() < 6 or np.linalg.matrix_rank(design) < 6:
        raise DataError(f"landscape: {int(near.sum())} runs within {within:.1%} of the best; a quadratic needs 6")
    beta = np.linalg.lstsq(design, z, rcond=None)[0]
    curvature = np.array([[beta[3], beta[4]], [beta[4], beta[5]]])
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        raise DataError("landscape: no minimum inside these runs (the quadratic is not convex); widen the grid")
    optimum = -np.linalg.solve(curvature, beta[1:3])
    height = float(beta[0] + beta[1:3] @ optimum + optimum @ curvature @ optimum / 2)
    spread = ((z - z.mean()) ** 2).sum()
    fitted = float(1 - ((z - design @ beta) ** 2).sum() / spread) if spread > 0 else 1.0
    lr_best, batch_best = np.exp(optimum).tolist()
    return Landscape(lr_best, batch_best, float(losses.min() * (1 + height)), curvature, fitted)
