"""The whole loss curve of a run from size, steps and batch.

Row 90. Source: H. Su et al., "Unraveling the Mystery of Scaling Laws: Part I", arXiv:2403.06563, and J. Kaplan et al.,
arXiv:2001.08361: L(N, S_min) = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S with S_min = S/(1 + B_crit(L)/B) and
B_crit(L) = B_*/L^(1/alpha_B). L stands on both sides; it is solved for, not iterated once. Differs from the source: all
six constants are fitted together, by the robust fitter.

Units: N non-embedding parameters, S optimizer steps, B tokens, L nats a token. There is no irreducible term: the law
holds over a small range. Shape letters: K parameter sets, n points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pennyweight.elementwise import elementwise
from pennyweight.errors import DataError, OptionError
from pennyweight.laws.fitter import fit as fit_form
from pennyweight.laws.forms import Array, Form, N, Parameter, S, Space, Variable, exponent, find, register
from pennyweight.laws.law import Law
from pennyweight.laws.table import columns, numbers


@dataclass(frozen=True, kw_only=True, repr=False)
class ImplicitLoss(Form):
    """``L = (N_c/N)^alpha_N + (S_c (1 + B_*/(B L^(1/alpha_B))) / S)^alpha_S``."""

    name: str = "kaplan_LNSB"
    formula: str = "L = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S, S_min = S/(1 + B_star/(B*L^(1/alpha_B)))"
    variables: tuple[Variable, ...] = (N, S, Variable("B", "tokens a batch", ("batch", "batch_tokens")))
    parameters: tuple[Parameter, ...] = (
        Parameter("N_c", "parameters", True, (-3.0, 0.3)),
        exponent("alpha_N", 0.02, 0.6),
        Parameter("S_c", "steps", True, (-4.0, 0.3)),
        exponent("alpha_S", 0.1, 1.2),
        Parameter("B_star", "tokens * nats^(1/alpha_B)", True, (-4.0, 3.0)),
        Parameter("alpha_B", "exponent", True, (-3.0, 0.0)),
    )
    target: str = "loss"
    space: Space = "log"
    row: int | None = 90
    paper: str = "H. Su et al., Unraveling the Mystery of Scaling Laws: Part I, arXiv:2403.06563"
    summary: str = "a whole loss curve from size, steps and batch, with the critical batch"

    def value(self, theta: Array, x: Array) -> Array:
        return self._solve(theta, x)[0]

    def _solve(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        a_n, alpha_n, a_s, alpha_s, log_b, log_alpha_b = (theta[:, i, None] for i in range(6))
        log_n, log_s, log_batch = np.log(x)
        size = a_n - alpha_n * log_n
        best = a_s - alpha_s * log_s  # the step term at an infinite batch
        power = np.exp(-log_alpha_b)
        # convex and falling in u = log L, and positive at the infinite-batch loss: Newton from there is monotone
        u = np.logaddexp(size, best)
        for _ in range(60):
            z = log_b - log_batch - u * power
            steps = best + alpha_s * np.logaddexp(0.0, z)
            whole = np.logaddexp(size, steps)
            share = np.exp(steps - whole)
            inside = 0.5 * (1 + np.tanh(0.5 * z))
            change = (whole - u) / (1 + share * alpha_s * inside * power)
            u = u + change
            if not (np.abs(change) > 1e-14 * (1 + np.abs(u))).any():
                break
        return u, share, inside

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        u, share, inside = self._solve(theta, x)
        _, _, _, alpha_s, log_b, log_alpha_b = (theta[:, i, None] for i in range(6))
        log_n, log_s, log_batch = np.log(x)
        power = np.exp(-log_alpha_b)
        z = log_b - log_batch - u * power
        direct = [
            1 - share,
            -(1 - share) * log_n,
            share,
            share * (np.logaddexp(0.0, z) - log_s),
            share * alpha_s * inside,
            share * alpha_s * inside * u * power,
        ]
        implicit = 1 + share * alpha_s * inside * power
        return u, np.stack(direct, axis=-1) / implicit[..., None]

    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        theta = np.array(theta, dtype=float)
        theta[..., 0] -= theta[..., 1] * log_scale[0] + log_target
        theta[..., 2] -= theta[..., 3] * log_scale[1] + log_target
        theta[..., 4] -= log_scale[2] + log_target * np.exp(-theta[..., 5])
        return theta

    def natural(self, theta: Array) -> Array:
        theta = np.array(theta, dtype=float)
        theta[..., 0] /= theta[..., 1]
        theta[..., 2] /= theta[..., 3]
        with np.errstate(over="ignore"):
            return super().natural(theta)

    def internal(self, natural: Array) -> Array:
        theta = super().internal(natural)
        theta[..., 0] *= theta[..., 1]
        theta[..., 2] *= theta[..., 3]
        return theta

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        n_c, alpha_n, s_c, alpha_s, b_star, alpha_b = natural
        critical = b_star / target ** (1 / alpha_b)
        with np.errstate(invalid="ignore", divide="ignore"):
            if wanted == "N":
                room = target - (s_c * (1 + critical / x["B"]) / x["S"]) ** alpha_s
                return np.where(room > 0, n_c * np.maximum(room, 0.0) ** (-1 / alpha_n), np.nan)
            room = target - (n_c / x["N"]) ** alpha_n
            least = s_c * np.where(room > 0, room, np.nan) ** (-1 / alpha_s)
            if wanted == "S":
                return np.asarray(least * (1 + critical / x["B"]))
            found = critical / (x["S"] / least - 1)
        return np.where(found > 0, found, np.nan)


register(ImplicitLoss())


@dataclass(frozen=True)
class Trajectory:
    """The law with its questions."""

    law: Law

    def loss(self, N: Any, steps: Any, batch: Any) -> Any:
        """Test loss after ``steps`` at ``batch`` tokens a step."""
        return self.law(N=N, S=steps, B=batch)

    @elementwise
    def critical_batch(self, L: float) -> float:
        """B_*/L^(1/alpha_B) tokens: twice the least steps and twice the least tokens there."""
        if not 0 < L < math.inf:
            raise OptionError(f"critical_batch: L = {L!r}; give a loss above 0")
        return float(self.law.B_star / L ** (1 / self.law.alpha_B))

    def min_steps(self, steps: float, batch: float, L: float) -> float:
        """Steps that an infinite batch would have needed: S/(1 + B_crit/B)."""
        return steps / (1 + self.critical_batch(L) / batch)

    def min_tokens(self, steps: float, batch: float, L: float) -> float:
        """Tokens that a vanishing batch would have needed: S B/(1 + B/B_crit)."""
        return steps * batch / (1 + batch / self.critical_batch(L))

    @elementwise
    def steps_for(self, L: float, N: float, batch: float) -> float:
        """Steps to reach ``L``.

        Raises:
            DataError: a model of that size never does.
        """
        if not (0 < L < math.inf and 0 < N < math.inf and batch > 0):
            raise OptionError(f"steps_for: L = {L!r}, N = {N!r}, batch = {batch!r}; give positive numbers")
        found = float(self.law.inverse("S", L, N=N, B=batch))
        if np.isnan(found):
            floor = (self.law.N_c / N) ** self.law.alpha_N
            raise DataError(f"steps_for: {N:g} parameters do not reach a loss of {L:g}; at best {floor:.4g}")
        return found

    @elementwise
    def tokens_for(self, L: float, N: float, batch: float) -> float:
        """Tokens to reach ``L``."""
        return self.steps_for(L, N, batch) * batch


def trajectory(
    *, N_c: float, alpha_N: float, S_c: float, alpha_S: float, B_star: float, alpha_B: float, source: str = "given"
) -> Trajectory:
    """The law with given constants."""
    constants = {"N_c": N_c, "alpha_N": alpha_N, "S_c": S_c, "alpha_S": alpha_S, "B_star": B_star, "alpha_B": alpha_B}
    return Trajectory(Law(find("kaplan_LNSB"), constants, source=source))


KAPLAN = trajectory(
    N_c=6.5e13, alpha_N=0.077, S_c=2.1e3, alpha_S=0.76, B_star=2.1e8, alpha_B=0.21, source="J. Kaplan et al."
)
C4 = trajectory(
    N_c=1.5e14, alpha_N=0.076, S_c=2.6e3, alpha_S=0.67, B_star=1.7e8, alpha_B=0.205, source="H. Su et al., C4"
)


def fit(runs: Any, *, warmup_steps: float = 0.0, **options: Any) -> Trajectory:
    """Fit the law to loss curves of small runs, several batches among them.

    Args:
        runs: columns or rows with N, steps (S), batch in tokens (B) and loss; a path reads a CSV.
        warmup_steps: points before this step are left out; the law does not hold in warm-up.
        options: passed to `pennyweight.laws.fit`.

    Raises:
        DataError: fewer than two sizes, or two batches: their constants could not be told.
    """
    table = {name: numbers(values, name) for name, values in columns(runs, "trajectory.fit").items()}
    steps = next((table[name] for name in ("S", "steps") if name in table), None)
    if steps is None:
        raise DataError(f"trajectory.fit: no column steps; there are {', '.join(table) or 'none'}")
    if not (steps >= 0).all():
        raise DataError("trajectory.fit: steps must be 0 or more in every row")
    kept = steps > warmup_steps
    if not kept.any():
        raise DataError(f"trajectory.fit: no point after {warmup_steps:g} steps of warm-up")
    return Trajectory(fit_form({name: values[kept] for name, values in table.items()}, "kaplan_LNSB", **options))


def loss(N: Any, steps: Any, batch: Any, *, constants: Trajectory = KAPLAN) -> Any:
    """`Trajectory.loss` with published constants (Kaplan et al. by default)."""
    return constants.loss(N, steps, batch)


def critical_batch(L: float, *, constants: Trajectory = KAPLAN) -> float:
    """`Trajectory.critical_batch` with published constants."""
    return constants.critical_batch(L)


def steps_for(L: float, N: float, batch: float, *, constants: Trajectory = KAPLAN) -> float:
    """`Trajectory.steps_for` with published constants."""
    return constants.steps_for(L, N, batch)


def tokens_for(L: float, N: float, batch: float, *, constants: Trajectory = KAPLAN) -> float:
    """`Trajectory.tokens_for` with published constants."""
    return constants.tokens_for(L, N, batch)
