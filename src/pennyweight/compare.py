"""Several levers or recipes on the same model, the same text and the same budget, in one table.

A lever given by name is planned against the budget by itself (the best of its own settings, matrix by matrix); a recipe
runs as it is. All are scored on the same held-out windows, and their p-values against the best are Holm-corrected: a
comparison of many finds a winner by chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from scipy.stats import ttest_1samp

from pennyweight.apply import run
from pennyweight.errors import OptionError
from pennyweight.finish import Solved
from pennyweight.fit import first_plan, solved_cost
from pennyweight.job import Job, Progress, Settings, chosen_levers, quiet
from pennyweight.journal import Journal
from pennyweight.measure.stats import holm
from pennyweight.model import bf16_bytes, load
from pennyweight.model.model import Model
from pennyweight.plan.slots import slots_of
from pennyweight.recipe import Recipe
from pennyweight.safe_write import write_text
from pennyweight.task import task_of
from pennyweight.units import Budget, whole


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: lever or recipe.
        bytes: of its files.
        effect: as people read it, with its 95 % interval.
        low: lower end.
        high: upper end.
        p_worse: Holm-corrected p-value of "no worse than the best"; None for the best itself.
    """

    name: str
    bytes: int
    effect: float
    low: float
    high: float
    p_worse: float | None


@dataclass(frozen=True)
class Comparison:
    """The table, best first."""

    model: str
    metric: str
    windows: int
    rows: tuple[Row, ...]

    def table(self) -> str:
        """The table as text."""
        width = max(len(row.name) for row in self.rows)
        head = f"{self.model}, {self.windows} held-out windows\n{'':{width}}  {'bytes':>13}  {self.metric} (95 %)"
        lines = [
            f"{row.name:<{width}}  {row.bytes:>13,}  {row.effect:.4f} [{row.low:.4f}, {row.high:.4f}]"
            + ("  best" if row.p_worse is None else f"  p {row.p_worse:.2g}" + ("  tied" if row.p_worse > 0.05 else ""))
            for row in self.rows
        ]
        return "\n".join([head, *lines])

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)


def compare(
    model: str | Path | torch.nn.Module | Model,
    contenders: Sequence[str | Path | Recipe],
    *,
    budgets: Sequence[str | Budget] = (),
    data: Any = "wiki",
    out: str | Path | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    progress: Progress = quiet,
) -> Comparison:
    """Run every contender and score them side by side.

    Args:
        model: as for `pennyweight.fit.fit`.
        contenders: lever names ("quantize.gptq"), recipe files, or recipes.
        budgets: what levers are planned against; needed when a contender is a lever.
        data: text to calibrate and judge on.
        out: a directory for ``compare.json``.
        seed: of every draw.
        settings: how much text is read.
        progress: called with (stage, done, total).

    Raises:
        OptionError: no contender, or a lever without a budget.
        BudgetError: a lever that cannot meet the budget.
    """
    if not contenders:
        raise OptionError("compare: nothing to compare; name levers (quantize.gptq) or recipe files")
    limits = tuple(Budget.parse(b) if isinstance(b, str) else b for b in budgets)
    loaded = model if isinstance(model, Model) else load(model)
    with TemporaryDirectory() as folder:
        job = Job(
            model=loaded, task=task_of(loaded), data=data, budgets=limits, floor=None, cards=(),
            settings=settings or Settings(seed=seed), progress=progress, journal=Journal(folder),
        )  # fmt: skip
        before = job.scores("measuring the original", "original", loaded.module, job.heldout, exact=True)
        found = []
        for contender in contenders:
            name, solved = _solve(job, contender)
            with solved.computing(loaded.module) as changed:
                after = job.scores(f"measuring {name}", solved.digest, changed, job.heldout, exact=True)
            found.append((name, int(solved.spent["bytes"]), after))
    found.sort(key=lambda each: float(job.task.harm(before, each[2]).double().mean()))
    best = job.task.harm(before, found[0][2]).double()
    tests = [
        float(ttest_1samp((job.task.harm(before, after).double() - best).numpy(), 0, alternative="greater").pvalue)
        for _, _, after in found[1:]
    ]
    p_values: list[float | None] = [None, *(float(p) for p in holm(tests))] if tests else [None]
    rows = []
    for (name, size, after), p_worse in zip(found, p_values, strict=True):
        effect = job.task.effect(before, after)
        rows.append(Row(name, size, effect.value, effect.low, effect.high, p_worse))
    table = Comparison(loaded.name, job.task.metric, len(job.heldout), tuple(rows))
    if out is not None:
        write_text(Path(out) / "compare.json", table.to_json())
    return table


def _solve(job: Job, contender: str | Path | Recipe) -> tuple[str, Solved]:
    if isinstance(contender, Recipe) or str(contender).endswith((".yaml", ".yml")):
        recipe = contender if isinstance(contender, Recipe) else Recipe.read(contender)
        return recipe.source, run(job, recipe)
    if not job.budgets:
        raise OptionError(f"compare: {contender} is a lever, and levers are planned; give a budget (--budget 25%)")
    job.cards = chosen_levers(str(contender), job.budgets)
    slots = slots_of(job.model.anatomy, job.statistics())
    offers = job.offers(slots)
    prices, allowed = first_plan(job, slots, offers, bf16_bytes(job.model))
    room = {name: whole(name, limit) for name, limit in allowed.items()}
    for _ in range(2):  # the second time the bytes beside the weights are known
        plan = prices.plan(slots, offers, room)
        weights = job.solve(slots, plan)
        prices, spent = solved_cost(job, prices, plan, weights, slots)
        if all(spent[name] <= limit for name, limit in room.items()):
            break
    recipe = Recipe.of({name: offer.lever for name, offer in plan.picked.items() if offer.lever is not None})
    return str(contender), Solved(slots=slots, weights=weights, recipe=recipe, labels={}, spent=spent)
