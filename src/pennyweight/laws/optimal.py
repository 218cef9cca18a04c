"""The best split of a training budget under a law of size N and tokens D.

Source: J. Hoffmann et al., arXiv:2203.15556, section 3.3: with L = E + A/N^alpha + B/D^beta and C = 6 N D,
N* = G (C/6)^(beta/(alpha+beta)), G = (alpha A / (beta B))^(1/(alpha+beta)). Other laws, and limits on either side, are
solved in one dimension. Lifetime cost (training plus inference) after N. Sardana et al., "Beyond Chinchilla-Optimal",
arXiv:2401.00448.

Shape letters: B bootstrap samples, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from pennyweight.errors import BudgetError, OptionError
from pennyweight.laws import flops as accounting
from pennyweight.laws.law import Law, LawReceipt, Range


@dataclass(frozen=True)
class Allocation:
    """A split of compute between size and data.

    Attributes:
        N: parameters.
        D: training tokens.
        loss: predicted, in the unit of the law.
        train_flops: 6 N D.
        inference_flops: 2 N for every token served; 0 when none are.
        binding: which limit holds the optimum back, if any.
        intervals: 95 % bootstrap intervals of N, D, ratio and loss, when the law carries samples.
        receipt: of the law at this point.
    """

    N: float
    D: float
    loss: float
    train_flops: float
    inference_flops: float
    binding: str | None
    intervals: dict[str, Range] = field(default_factory=dict)
    receipt: LawReceipt | None = None

    @property
    def ratio(self) -> float:
        """Tokens a parameter."""
        return self.D / self.N

    @property
    def total_flops(self) -> float:
        """Training and inference together."""
        return self.train_flops + self.inference_flops


def _closed(natural: np.ndarray, per_pair: float) -> tuple[np.ndarray, np.ndarray]:
    """N* and D* of (..., 5) Chinchilla constants for ``per_pair`` = N*D."""
    _, a, alpha, b, beta = np.moveaxis(natural, -1, 0)
    with np.errstate(all="ignore"):  # a bootstrap sample with a vanished term gives inf or nan; intervals skip those
        scale = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
        size = scale * per_pair ** (beta / (alpha + beta))
    return size, per_pair / size


def allocate(
    law: Law,
    train_flops: float,
    *,
    inference_tokens: float = 0.0,
    max_params: float | None = None,
    max_tokens: float | None = None,
    max_bytes: float | None = None,
    bits: float = 16.0,
    flops_per_pair: float = 6.0,
) -> Allocation:
    """The (N, D) of least predicted loss whose compute is at most ``train_flops``.

    Args:
        law: a law of N and D (``chinchilla``, ``reference``, or any other with these two variables).
        train_flops: compute for training; with ``inference_tokens``, for training and serving together.
        inference_tokens: tokens served over the model's life, at 2 N FLOPs each.
        max_params: largest model allowed.
        max_tokens: tokens there are.
        max_bytes: memory at deployment, at ``bits`` a parameter.
        bits: of a deployed parameter.
        flops_per_pair: FLOPs of one parameter seeing one token, 6 unless something is frozen or sparse.

    Raises:
        OptionError: the law is not one of N and D, or a budget that is not positive.
    """
    names = [v.name for v in law.form.variables]
    if names != ["N", "D"]:
        raise OptionError(f"allocate: {law.form.name} is a law of {', '.join(law.variables)}; give one of N and D")
    for name, value in (("train_flops", train_flops), ("flops_per_pair", flops_per_pair), ("bits", bits)):
        if not (value > 0 and math.isfinite(value)):
            raise OptionError(f"allocate: {name} = {value!r}; give a positive number")
    limits = {"max_params": max_params, "max_bytes": None if max_bytes is None else max_bytes * 8 / bits}
    largest, binding = math.inf, None
    for name, limit in limits.items():
        if limit is not None and limit < largest:
            if limit <= 0:
                raise OptionError(f"allocate: {name} leaves no parameters; give a positive limit")
            largest, binding = limit, name
    scales = 1.0 if inference_tokens == 0 else None

    def tokens_for(size: float) -> float:
        return (train_flops - accounting.INFERENCE * size * inference_tokens) / (flops_per_pair * size)

    if scales and law.form.name == "chinchilla" and law.alpha > 0 and law.beta > 0:
        free = float(_closed(law.parameters, train_flops / flops_per_pair)[0])
    else:
        free = _best_size(law, tokens_for, train_flops, inference_tokens)
    size, tokens = free, tokens_for(free)
    if size > largest:
        size, tokens = largest, tokens_for(largest)
    else:
        binding = None
    if max_tokens is not None and tokens > max_tokens:
        # a law falls in N and in D: with D at its limit the rest of the compute is best spent on size
        size = train_flops / (flops_per_pair * max_tokens + accounting.INFERENCE * inference_tokens)
        tokens, binding = max_tokens, "max_tokens"
        if size > largest:
            size, binding = (
                largest,
                "max_tokens and " + ("max_params" if limits["max_params"] == largest else "max_bytes"),
            )
    intervals = {}
    if law.samples is not None and binding is None and scales and law.form.name == "chinchilla":
        per_pair = train_flops / flops_per_pair
        for name, part in (("N", 0), ("D", 1)):
            found = law.interval(lambda theta, part=part: _closed(law.form.natural(theta), per_pair)[part])
            if found is not None:
                intervals[name] = found
        ratio = law.interval(lambda theta: np.divide(*_closed(law.form.natural(theta), per_pair)[::-1]))
        if ratio is not None:
            intervals["ratio"] = ratio
    loss = law.predict(N=size, D=tokens)
    if loss.interval is not None:
        intervals["loss"] = loss.interval
    return Allocation(
        N=size,
        D=tokens,
        loss=loss.value,
        train_flops=flops_per_pair * size * tokens,
        inference_flops=accounting.INFERENCE * size * inference_tokens,
        binding=binding,
        intervals=intervals,
        receipt=loss.receipt,
    )


def _best_size(law: Law, tokens_for: Callable[[float], float], train_flops: float, inference_tokens: float) -> float:
    high = math.log(train_flops) - 1e-9
    if inference_tokens:
        high = min(high, math.log(train_flops / (accounting.INFERENCE * inference_tokens)) - 1e-9)
    grid = np.exp(np.linspace(min(0.0, high - 1.0), high, 2001)[:-1])
    tokens = np.array([tokens_for(size) for size in grid])
    usable = tokens > 0
    losses = np.full(grid.size, np.inf)
    losses[usable] = law(N=grid[usable], D=tokens[usable])
    at = int(np.argmin(losses))
    low, top = grid[max(at - 1, 0)], grid[min(at + 1, grid.size - 1)]
    found = minimize_scalar(
        lambda log_size: law(N=math.exp(log_size), D=max(tokens_for(math.exp(log_size)), 1e-300)),
        bounds=(math.log(low), math.log(top)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return math.exp(float(found.x))


def cheapest(law: Law, loss: float, *, inference_tokens: float = 0.0, flops_per_pair: float = 6.0) -> Allocation:
    """The split that reaches ``loss`` with the fewest FLOPs over the model's life.

    Raises:
        BudgetError: the law never comes that low.
    """

    def gap(log_flops: float) -> float:
        return (
            allocate(law, math.exp(log_flops), inference_tokens=inference_tokens, flops_per_pair=flops_per_pair).loss
            - loss
        )

    low, high = math.log(1e6), math.log(1e40)
    if (above := gap(high)) > 0:
        raise BudgetError(
            f"{law.form.name} does not reach a loss of {loss:g} below 1e40 FLOPs; it comes to {loss + above:.4g} there"
        )
    if gap(low) < 0:
        raise BudgetError(
            f"{law.form.name} is below a loss of {loss:g} at 1e6 FLOPs already; the law says nothing there"
        )
    found = brentq(gap, low, high, xtol=1e-12)
    return allocate(law, math.exp(found), inference_tokens=inference_tokens, flops_per_pair=flops_per_pair)
