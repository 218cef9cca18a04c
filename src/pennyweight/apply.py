"""Run a given recipe on a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pennyweight.errors import RecipeError
from pennyweight.finish import Fitted, Solved, finish
from pennyweight.job import Job, Progress, Settings, installed, quiet
from pennyweight.journal import Journal
from pennyweight.lever import needs_of
from pennyweight.model import load
from pennyweight.model.model import Model, parameters
from pennyweight.model.saving import file_bytes
from pennyweight.plan.rounds import label_of_lever
from pennyweight.plan.slots import Slot, matrix_of, slots_of
from pennyweight.recipe import Recipe
from pennyweight.safe_write import check_free
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.task import task_of
from pennyweight.weights import Dense, Weight


def apply(
    model: str | Path | torch.nn.Module | Model,
    recipe: str | Path | Recipe,
    *,
    data: Any = "wiki",
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    settings: Settings | None = None,
    progress: Progress = quiet,
) -> Fitted:
    """Run ``recipe`` and write the model with its receipt, measured before and after, to ``out``.

    Args:
        model: as for `pennyweight.fit.fit`.
        recipe: the path of a ``recipe.yaml``, or a recipe.
        data: text to calibrate and judge on.
        out: directory to write to.
        overwrite: replace an earlier result in ``out``.
        seed: of every draw.
        settings: how much text is read.
        progress: called with (stage, done, total).

    Raises:
        RecipeError: a recipe that is malformed, or that selects nothing in this model.
    """
    check_free(out, overwrite=overwrite)
    found = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    loaded = model if isinstance(model, Model) else load(model)
    job = Job(
        model=loaded, task=task_of(loaded), data=data, budgets=(), floor=None,
        cards=tuple(dict.fromkeys(step.card for step in found.steps)),
        settings=settings or Settings(seed=seed), progress=progress, journal=Journal.beside(out, resume=False),
    )  # fmt: skip
    return finish(job, run(job, found), Path(out), overwrite=overwrite)


def run(job: Job, recipe: Recipe) -> Solved:
    """Carry ``recipe`` out: each step on the maps it selects, on what the steps before it left."""
    needs = frozenset().union(*(needs_of(step.lever) for step in recipe.steps))
    slots = _slots(job, needs)
    weights: dict[str, Weight] = {}
    labels: dict[str, list[str]] = {}
    with job.stage("solving"):
        for number, step in enumerate(recipe.steps, 1):
            selected = [slot for slot in slots if step.selects(slot.map)]
            where = f"{recipe.source} step {number}, {step.name}"
            if step.card.reach != "weight":
                raise RecipeError(f"{where}: acts on the whole model, and apply runs levers of single matrices")
            if not selected:
                raise RecipeError(f"{where}: where {list(step.where)} selects no map; `pennyweight measure` lists them")
            for done, slot in enumerate(selected):
                before = weights.get(slot.name) or Dense(matrix_of(job.model.module, slot))
                try:
                    weights[slot.name] = step.lever.solve(before, slot.statistics)
                except ValueError as error:
                    raise type(error)(f"{where}: {slot.name}: {error}") from error
                labels.setdefault(slot.name, []).append(label_of_lever(step.lever))
                job.progress("solving", done + 1, len(selected))
    with installed(job.model.module, slots, weights):
        written = file_bytes(job.model)
    return Solved(
        slots=slots, weights=weights, recipe=recipe, 
        labels={name: ", then ".join(said) for name, said in labels.items()},
        spent={"bytes": written, "params": _params(job, slots, weights)},
    )  # fmt: skip


def _slots(job: Job, needs: frozenset[str]) -> tuple[Slot, ...]:
    found: Mapping[str, Statistics]
    if needs:
        return slots_of(job.model.anatomy, job.statistics())
    found = {layer.name: NO_STATISTICS for layer in job.model.anatomy.layers()}
    return tuple(Slot(layer, found[layer.name], "blocks") for layer in job.model.anatomy.layers())


def _params(job: Job, slots: tuple[Slot, ...], weights: Mapping[str, Weight]) -> int:
    changed = [slot for slot in slots if slot.name in weights]
    inside = sum(slot.map.shape[0] * slot.map.shape[1] for slot in changed)
    return parameters(job.model.module) - inside + sum(weights[slot.name].cost().params for slot in changed)
