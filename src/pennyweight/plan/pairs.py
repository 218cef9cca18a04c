"""The knapsack of `pennyweight.plan.choose` with what pairs of offers do to each other: an integer quadratic program.

Every product of two choices becomes a variable of its own, tied to them by equalities: over the offers of one layer the
products with a given offer of another sum to that offer. The program is then linear, and HiGHS proves its optimum.

Source: Z. Deng et al., "Mixed-Precision Quantization with Cross-Layer Dependencies" (CLADO), arXiv:2307.05657 (the
quadratic program over pairs); W. Adams and H. Sherali, "A tight linearization and an algorithm for zero-one quadratic
programming problems", 1986 (the equalities). Differs from the sources: costs are sums of exact integers.

Shape letters: F offers of all layers together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix, csr_matrix

from pennyweight.errors import BudgetError, OptionError
from pennyweight.plan.choose import Certificate, Pick, Problem, _hushed

#: Products of two offers that the solver still gets through in seconds to minutes.
MOST_PRODUCTS = 60_000


def choose_with_pairs(
    problem: Problem, pairs: NDArray[np.float64], budgets: Mapping[str, int], *, seconds: float = 30.0
) -> tuple[Pick, Certificate]:
    """The choice of least ``damage + sum of pairs`` under ``budgets``, proven.

    Args:
        problem: layers and their offers.
        pairs: (F, F) symmetric; entries within a layer are not looked at.
        budgets: resource -> most that may be used, the fixed part included.
        seconds: time limit; the certificate then says how far from the optimum the choice can be.

    Raises:
        BudgetError: no choice meets the budgets.
        OptionError: more products than the solver gets through.
    """
    began = time.perf_counter()
    offers = [list(part) for part in problem.slots.values()]
    starts = [0, *np.cumsum([len(part) for part in offers]).tolist()]
    size, flat = starts[-1], [offer for part in offers for offer in part]
    couples = [
        (i, j)
        for i in range(len(offers))
        for j in range(i + 1, len(offers))
        if np.any(pairs[starts[i] : starts[i + 1], starts[j] : starts[j + 1]])
    ]
    products = [
        (a, b) for i, j in couples for a in range(starts[i], starts[i + 1]) for b in range(starts[j], starts[j + 1])
    ]
    if len(products) > MOST_PRODUCTS:
        raise OptionError(
            f"bits: {len(products):,} products of offers are too many to solve exactly (at most {MOST_PRODUCTS:,}); "
            "search by greedy or bisect, or offer fewer widths"
        )
    total = size + len(products)
    objective = np.array([offer.damage for offer in flat] + [pairs[a, b] for a, b in products])
    one_each = csr_matrix(
        (np.ones(size), (np.repeat(np.arange(len(offers)), [len(part) for part in offers]), np.arange(size))),
        shape=(len(offers), total),
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    if products:
        constraints.append(LinearConstraint(_ties(starts, couples, size, total), 0, 0))
    for name, limit in budgets.items():
        unit = max(abs(limit), 1)
        row = np.array([offer.cost.get(name, 0) for offer in flat] + [0] * len(products), dtype=float) / unit
        constraints.append(LinearConstraint(csr_matrix(row), -np.inf, (limit - problem.fixed.get(name, 0)) / unit))
    scale = float(np.abs(objective).max()) or 1.0
    with _hushed():
        found = milp(
            objective / scale,
            constraints=constraints,
            # a product of two whole choices is whole by the ties alone
            integrality=np.array([1] * size + [0] * len(products)),
            bounds=Bounds(0, 1),
            options={"time_limit": seconds, "mip_rel_gap": 1e-9, "presolve": True},
        )
    if found.x is None:
        smallest = ", ".join(f"{problem.least(name):,} {name}" for name in budgets)
        asked = " and ".join(f"{limit:,} {name}" for name, limit in budgets.items())
        raise BudgetError(f"bits: {asked} cannot be met (smallest {smallest}); raise the budget")
    pick = tuple(int(np.argmax(found.x[a:b])) for a, b in pairwise(starts))
    over = [name for name, limit in budgets.items() if problem.total(pick, name) > limit]
    if over:  # the solver's tolerance is a millionth of a row; one unit over is over, and solved again without it
        tighter = {
            name: limit - (name in over) * max(1, math.ceil(2e-6 * abs(limit))) for name, limit in budgets.items()
        }
        return choose_with_pairs(problem, pairs, tighter, seconds=seconds)
    at = [start + index for start, index in zip(starts, pick, strict=False)]
    part = pairs[np.ix_(at, at)]
    value = problem.damage(pick) + float((part.sum() - part.trace()) / 2)
    bound = float(found.mip_dual_bound if found.mip_dual_bound is not None else found.fun) * scale
    status = "optimal" if found.status == 0 else "gap"
    gap = max(0.0, (value - bound) / abs(value)) if value else 0.0
    return pick, Certificate(status, bound, gap, time.perf_counter() - began, ())


def _ties(starts: list[int], couples: list[tuple[int, int]], size: int, total: int) -> csr_matrix:
    """Rows ``sum_b y_ab - x_a = 0`` for every offer a of either layer of a couple."""
    rows, columns, values = [], [], []
    row, at = 0, size
    for i, j in couples:
        first, second = starts[i + 1] - starts[i], starts[j + 1] - starts[j]
        index = at + np.arange(first * second).reshape(first, second)
        for layer, grid in ((i, index), (j, index.T)):
            for offer, line in enumerate(grid):
                rows += [row] * (len(line) + 1)
                columns += [*line.tolist(), starts[layer] + offer]
                values += [1.0] * len(line) + [-1.0]
                row += 1
        at += first * second
    return coo_matrix((values, (rows, columns)), shape=(row, total)).tocsr()
