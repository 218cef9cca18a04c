"""Forms that are no sum of power laws: rectified, mixture, accuracy, score of loss, logarithmic, exponential.

Each names its source in its registry entry. Shape letters as in `pennyweight.laws.forms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pennyweight.laws.forms import (
    Array,
    D,
    Form,
    N,
    Parameter,
    Space,
    Variable,
    coefficient,
    exponent,
    register,
)


def _columns(theta: Array) -> list[Array]:
    """Each internal parameter as (K, 1)."""
    return [theta[:, index, None] for index in range(theta.shape[1])]


@dataclass(frozen=True, kw_only=True, repr=False)
class Rectified(Form):
    """``L = B / (D_l + D^beta) + E``: a power law that starts from what the model already knows."""

    name: str = "rectified"
    formula: str = "L = B/(D_l + D^beta) + E"
    variables: tuple[Variable, ...] = (D,)
    parameters: tuple[Parameter, ...] = (
        Parameter("B", "target * tokens^beta", True, (-6.0, 2.0)),
        Parameter("D_l", "tokens^beta", True, (-6.0, 3.0)),
        exponent("beta"),
        coefficient("E"),
    )
    target: str = "error"
    space: Space = "log"
    row: int | None = 59
    paper: str = "Z. Qin et al., Scaling Laws of Synthetic Data for Language Models, arXiv:2503.19551"
    summary: str = "error of fine-tuning or continued training on D tokens, from a model that knows something already"

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        log_b, log_dl, beta, log_e = _columns(theta)
        log_d = np.log(x[0])
        denominator = np.logaddexp(log_dl, beta * log_d)
        term = log_b - denominator
        value = np.logaddexp(term, log_e)
        share = np.exp(term - value)  # of the reducible part
        known = np.exp(log_dl - denominator)  # of D_l in the denominator
        gradient = np.stack([share, -share * known, -share * (1 - known) * log_d, 1 - share], axis=-1)
        return value, gradient

    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        shift = theta[..., 2] * log_scale[0]
        return np.stack(
            [theta[..., 0] - shift - log_target, theta[..., 1] - shift, theta[..., 2], theta[..., 3] - log_target],
            axis=-1,
        )

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        b, d_l, beta, e = natural
        with np.errstate(invalid="ignore", divide="ignore"):
            room = b / (target - e) - d_l
            return np.where((target > e) & (room > 0), np.maximum(room, 0.0) ** (1 / beta), np.nan)


_RATIO = Variable("r", "share of the corpus whose loss is predicted", ("ratio",), 0.0, 1.0, True, False)
#: Where the slope by r is held negative, and by how much in its logarithm.
_RATIOS = np.array([1e-4, 1e-2, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
_MARGIN = 0.01
_K = Variable("K", "learnability of the domain, w1/k1 + w2*k2", ("learnability",), grows=False)


@dataclass(frozen=True, kw_only=True, repr=False)
class Mixture(Form):
    """``L = E + A/N^alpha + B*r^eta/D^beta + C/(r + epsilon)^gamma``, with ``F/K^mu`` added across domains."""

    cross: bool = False
    name: str = "dcpt"
    formula: str = "L = E + A/N^alpha + B*r^eta/D^beta + C/(r+epsilon)^gamma"
    variables: tuple[Variable, ...] = (N, D, _RATIO)
    parameters: tuple[Parameter, ...] = (
        coefficient("E"),
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
        exponent("beta"),
        exponent("eta", 0.5, 3.0),
        coefficient("C"),
        exponent("gamma", 0.05, 1.5),
        Parameter("epsilon", "share", True, (-5.0, 0.0)),
    )
    target: str = "loss"
    space: Space = "log"
    row: int | None = 85
    paper: str = "H. Que et al., D-CPT Law: Domain-specific Continual Pre-Training Scaling Law, arXiv:2406.01375"
    summary: str = "loss of continual pre-training from size, tokens and mixture ratio"

    def _log_terms(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        e, a, alpha, b, beta, eta, c, gamma, epsilon, *rest = _columns(theta)
        log_n, log_d = np.log(x[0]), np.log(x[1])
        with np.errstate(divide="ignore"):
            log_r = np.log(np.maximum(x[2], 1e-300))  # r = 0: the term is r^eta = 0, and its slope by eta too
        log_sum = np.logaddexp(np.log(np.maximum(x[2], 1e-300)), epsilon)
        terms = [e + 0 * log_n, a - alpha * log_n, b - beta * log_d + eta * log_r, c - gamma * log_sum]
        if self.cross:
            terms.append(rest[0] - rest[1] * np.log(x[3]))
        return np.stack(terms, axis=1), log_r, log_sum

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        logs, log_r, log_sum = self._log_terms(theta, x)
        gamma, epsilon = theta[:, 7, None], theta[:, 8, None]
        top = logs.max(1, keepdims=True)
        weights = np.exp(logs - top)
        total = weights.sum(1, keepdims=True)
        value, weights = (top + np.log(total))[:, 0], weights / total
        log_n, log_d = np.log(x[0]), np.log(x[1])
        part = weights.transpose(1, 0, 2)
        slopes = [
            part[0],
            part[1],
            -part[1] * log_n,
            part[2],
            -part[2] * log_d,
            part[2] * log_r,
            part[3],
            -part[3] * log_sum,
            -part[3] * gamma * np.exp(epsilon - log_sum),
        ]
        if self.cross:
            slopes += [part[4], -part[4] * np.log(x[3])]
        return value, np.stack(slopes, axis=-1)

    def limits(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """More of the domain must not raise its loss, even at the fewest tokens, or the best ratio is an artefact.

        dL/dr < 0 for all r: log(eta B r^(eta-1) / D^beta) below log(gamma C / (r+epsilon)^(gamma+1)).
        """
        beta, eta, gamma, epsilon = (theta[:, i, None] for i in (4, 5, 7, 8))
        b, c = theta[:, 3, None], theta[:, 6, None]
        r, log_d = np.log(_RATIOS), float(np.log(x[1].min()))
        log_sum = np.logaddexp(r, epsilon)
        positive = (np.maximum(eta, 1e-6), np.maximum(gamma, 1e-6))
        rise = np.log(positive[0]) + b + (eta - 1) * r - beta * log_d
        fall = np.log(positive[1]) + c - (gamma + 1) * log_sum
        slopes = np.zeros((*rise.shape, theta.shape[1]))
        slopes[..., 3], slopes[..., 6] = 1.0, -1.0
        slopes[..., 4] = -log_d
        slopes[..., 5] = 1 / positive[0] + r
        slopes[..., 7] = -1 / positive[1] + log_sum
        slopes[..., 8] = (gamma + 1) * np.exp(epsilon - log_sum)
        return rise - fall + _MARGIN, slopes

    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        theta = np.array(theta, dtype=float)
        theta[..., 1] -= theta[..., 2] * log_scale[0]
        theta[..., 3] -= theta[..., 4] * log_scale[1]
        for index in (0, 1, 3, 6, *((9,) if self.cross else ())):
            theta[..., index] -= log_target
        return theta

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        if wanted not in ("N", "D"):
            return super().inverse(natural, wanted, target, x)
        e, a, alpha, b, beta, eta, c, gamma, epsilon, *rest = natural
        others = e + c / (x["r"] + epsilon) ** gamma
        if self.cross:
            others = others + rest[0] / x["K"] ** rest[1]
        if wanted == "N":
            others, top, power = others + b * x["r"] ** eta / x["D"] ** beta, a, alpha
        else:
            others, top, power = others + a / x["N"] ** alpha, b * x["r"] ** eta, beta
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(target > others, (top / np.maximum(target - others, 0.0)) ** (1 / power), np.nan)


@dataclass(frozen=True, kw_only=True, repr=False)
class AccuracyOfCompute(Form):
    """``y = g + (1 - g) * exp(-a*C^-b - c)``: accuracy from compute, from the guess level ``g`` up to ``exp(-c)``."""

    name: str = "acc_exp"
    formula: str = "y = g + (1-g)*exp(-a*C^-b - c)"
    variables: tuple[Variable, ...] = (Variable("C", "compute, any one unit", ("compute", "flops")),)
    parameters: tuple[Parameter, ...] = (
        Parameter("a", "compute^b", True, (-3.0, 2.5)),
        exponent("b", 0.05, 2.0),
        Parameter("c", "nats", True, (-7.0, 0.5)),
        Parameter("g", "share of right guesses", False, (0.0, 0.6)),
    )
    target: str = "accuracy"
    space: Space = "linear"
    row: int | None = 154
    paper: str = "C. Xu et al., Unveiling Downstream Performance Scaling of LLMs, arXiv:2502.17262"
    summary: str = "accuracy of a cluster of items of like difficulty, from compute"

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        log_a, b, log_c, g = _columns(theta)
        log_x = np.log(x[0])
        loss = np.exp(log_a - b * log_x)
        floor = np.exp(log_c)
        right = np.exp(-loss - floor)
        scale = (1 - g) * right
        gradient = np.stack([-scale * loss, scale * loss * log_x, -scale * floor + 0 * log_x, 1 - right], axis=-1)
        return g + scale, gradient

    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        theta = np.array(theta, dtype=float)
        theta[..., 0] -= theta[..., 1] * log_scale[0]
        return theta

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        a, b, c, g = natural
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = -np.log((target - g) / (1 - g)) - c
            return np.where(loss > 0, (a / np.maximum(loss, 0.0)) ** (1 / b), np.nan)


@dataclass(frozen=True, kw_only=True, repr=False)
class ScoreOfLoss(Form):
    """``S = c / (1 + exp(-gamma*(L - l))) + d``: a task score from a loss; gamma < 0 when less loss is better."""

    name: str = "sigmoid_of_loss"
    formula: str = "S = c/(1 + exp(-gamma*(L - l))) + d"
    variables: tuple[Variable, ...] = (Variable("L", "nats", ("loss",), -float("inf"), grows=False),)
    parameters: tuple[Parameter, ...] = (
        Parameter("c", "score between chance and ceiling", True, (-2.0, 0.2)),
        Parameter("gamma", "1/nat", False, (-20.0, 0.0)),
        Parameter("l", "nats", False, (0.0, 1.0)),
        Parameter("d", "score of chance", False, (0.0, 0.6)),
    )
    target: str = "score"
    space: Space = "linear"
    row: int | None = 250
    paper: str = "C. Xiao et al., Densing Law of LLMs, arXiv:2412.04315"
    summary: str = "a bounded task score from a loss"

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        log_c, gamma, middle, d = _columns(theta)
        c = np.exp(log_c)
        at = gamma * (x[0] - middle)
        right = 0.5 * (1 + np.tanh(0.5 * at))  # the logistic function without overflow
        bend = c * right * (1 - right)
        gradient = np.stack([c * right, bend * (x[0] - middle), -bend * gamma, np.ones_like(right)], axis=-1)
        return c * right + d, gradient

    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        return np.array(theta, dtype=float)

    def start_box(self, x: Array, y: Array) -> tuple[Array, Array]:
        span, height = float(np.ptp(x[0])), float(np.ptp(y))
        low = np.array([np.log(0.8 * height), -40 / span, x[0].min(), y.min() - 0.2 * height])
        high = np.array([np.log(3 * height), 0.0, x[0].max(), y.min() + 0.1 * height])
        return low, high

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        c, gamma, middle, d = natural
        with np.errstate(invalid="ignore", divide="ignore"):
            found = middle - np.log(c / (target - d) - 1) / gamma
        return np.where((target > d) & (target < c + d), found, np.nan)


@dataclass(frozen=True, kw_only=True, repr=False)
class Logarithm(Form):
    """``V = intercept + slope * ln n``: no ceiling, so only for short ways."""

    name: str = "logn_projection"
    formula: str = "V = intercept + slope*ln(n)"
    variables: tuple[Variable, ...] = (Variable("n", "examples", ("N", "D", "samples")),)
    parameters: tuple[Parameter, ...] = (
        Parameter("intercept", "as the target", False, (0.0, 1.0)),
        Parameter("slope", "target per e-fold", False, (-1.0, 1.0)),
    )
    target: str = "score"
    space: Space = "linear"
    row: int | None = 65
    paper: str = "F. Kang et al., Performance Scaling via Optimal Transport, arXiv:2307.02460"
    summary: str = "a score extrapolated in the logarithm of the number of examples"

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        intercept, slope = _columns(theta)
        log_n = np.log(x[0])
        ones = np.ones((len(theta), x.shape[1]))
        return intercept + slope * log_n, np.stack([ones, ones * log_n], axis=-1)

    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        theta = np.array(theta, dtype=float)
        theta[..., 0] += theta[..., 1] * log_scale[0]
        return theta

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        intercept, slope = natural
        return np.asarray(np.exp((target - intercept) / slope))


@dataclass(frozen=True, kw_only=True, repr=False)
class ExponentialDecay(Form):
    """``y = floor + height * exp(-rate * x)``."""

    name: str = "exp_decay"
    formula: str = "y = floor + height*exp(-rate*x)"
    variables: tuple[Variable, ...] = (Variable("x", "any one unit", ("N", "D", "t"), low_included=True),)
    parameters: tuple[Parameter, ...] = (
        coefficient("floor"),
        coefficient("height"),
        Parameter("rate", "1/x", True, (-3.0, 2.5)),
    )
    target: str = "loss"
    space: Space = "log"
    row: int | None = None
    paper: str = "the textbook relaxation curve; no one source"
    summary: str = "decay to a floor at a constant rate"

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        floor, height, log_rate = _columns(theta)
        drop = np.exp(log_rate) * x[0]
        term = height - drop
        value = np.logaddexp(floor, term)
        share = np.exp(term - value)
        return value, np.stack([1 - share, share, -share * drop], axis=-1)

    def rescaled(self, theta: Array, log_scale: Array, log_target: float) -> Array:
        return np.stack([theta[..., 0] - log_target, theta[..., 1] - log_target, theta[..., 2] + log_scale[0]], axis=-1)

    def inverse(self, natural: Array, wanted: str, target: Array, x: Mapping[str, Array]) -> Array:
        floor, height, rate = natural
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(-np.log((target - floor) / height) / rate)


register(Rectified())
register(Mixture())
register(
    Mixture(
        cross=True,
        name="dcpt_cross",
        formula="L = E + A/N^alpha + B*r^eta/D^beta + C/(r+epsilon)^gamma + F/K^mu",
        variables=(N, D, _RATIO, _K),
        parameters=(*Mixture.parameters, coefficient("F"), exponent("mu")),
        summary="the same across domains, with the learnability K of each",
    )
)
register(AccuracyOfCompute())
register(ScoreOfLoss())
register(Logarithm())
register(ExponentialDecay())
