"""Run a given recipe on a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pennyweight.errors import RecipeError, UserError
from pennyweight.finish import Fitted, Solved, finish
from pennyweight.job import PRICED, Job, Progress, Settings, installed, quiet
from pennyweight.journal import Journal
from pennyweight.lever import needs_of
from pennyweight.measure.cost import cost
from pennyweight.model import anatomy, load
from pennyweight.model.model import Model, parameters
from pennyweight.model.saving import file_bytes
from pennyweight.plan.rounds import label_of_lever
from pennyweight.plan.slots import Slot, matrix_of, slots_of
from pennyweight.recipe import Recipe, Step
from pennyweight.safe_write import check_free
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.task import task_of
from pennyweight.weights import Dense, Weight
from pennyweight.work import Work


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
    if any(step.card.reach != "weight" for step in recipe.steps):
        return _run_in_place(job, recipe)
    needs = frozenset().union(*(needs_of(step.lever) for step in recipe.steps))
    slots = _slots(job, needs)
    weights: dict[str, Weight] = {}
    labels: dict[str, list[str]] = {}
    with job.stage("solving"):
        for number, step in enumerate(recipe.steps, 1):
            selected = [slot for slot in slots if step.selects(slot.map)]
            where = f"{recipe.source} step {number}, {step.name}"
            if not selected:
                raise _nothing(step, where)
            for done, slot in enumerate(selected):
                before = weights.get(slot.name) or Dense(matrix_of(job.model.module, slot))
                weights[slot.name] = _solved(step, before, slot, where)
                labels.setdefault(slot.name, []).append(label_of_lever(step.lever))
                job.progress("solving", done + 1, len(selected))
    with installed(job.model.module, slots, weights):
        written = file_bytes(job.model)
    return Solved(
        slots=slots, weights=weights, recipe=recipe, 
        labels={name: ", then ".join(said) for name, said in labels.items()},
        spent={"bytes": written, "params": _params(job, slots, weights)},
    )  # fmt: skip


def _run_in_place(job: Job, recipe: Recipe) -> Solved:
    """The same on a copy of the model, for recipes with steps that change whole models.

    Such a step sees the model that the steps before it left; so do the statistics of the steps after it.
    """
    changed = replace(job.model, module=copy.deepcopy(job.model.module))
    labels: dict[str, list[str]] = {}
    known: Mapping[str, Statistics] = {}
    asked: frozenset[str] = frozenset()
    with job.stage("solving"):
        for number, step in enumerate(recipe.steps, 1):
            where = f"{recipe.source} step {number}, {step.name}"
            maps = tuple(found for found in changed.anatomy.layers() if step.selects(found))
            if not maps:
                raise _nothing(step, where)
            work = Work(
                model=changed, windows=job.calibration[: job.settings.statistics], maps=maps, seed=job.settings.seed,
                draw=job.text, report=job.progress, original=job.model,
            )  # fmt: skip
            if step.card.reach == "weight":
                needs = needs_of(step.lever)
                if needs and not needs <= asked:
                    asked |= needs | PRICED
                    known = work.statistics(asked, gradient_tokens=job.settings.gradients * job.settings.length)
                for done, slot in enumerate(_chosen(changed, maps, known if needs else {})):
                    weight = _solved(step, current(changed.module, slot.map), slot, where)
                    anatomy.replace(changed.module, slot.map.path, weight)
                    job.progress("solving", done + 1, len(maps))
            else:
                try:
                    step.lever.change(changed, work)
                except UserError as error:
                    raise type(error)(f"{where}: {error}") from error
                known, asked = {}, frozenset()
                changed = replace(changed)  # its anatomy anew
            for found in maps:
                labels.setdefault(found.name, []).append(label_of_lever(step.lever))
    changed.module.eval()
    slots = _chosen(job.model, job.model.anatomy.layers(), {})
    return Solved(
        slots=slots, weights=_held(changed.module, slots), module=changed.module, recipe=recipe,
        labels={name: ", then ".join(said) for name, said in labels.items()},
        spent={"bytes": file_bytes(changed), "params": cost(changed).params_total},
    )  # fmt: skip


def _solved(step: Step, before: Weight, slot: Slot, where: str) -> Weight:
    try:
        made: Weight = step.lever.solve(before, slot.statistics)
    except ValueError as error:
        raise type(error)(f"{where}: {slot.name}: {error}") from error
    return made


def _nothing(step: Step, where: str) -> RecipeError:
    return RecipeError(f"{where}: where {list(step.where)} selects no map; `pennyweight measure` lists them")


def _chosen(model: Model, maps: Sequence[anatomy.Map], found: Mapping[str, Statistics]) -> tuple[Slot, ...]:
    """A slot for each of ``maps``, with statistics where there are some."""
    wanted = {layer.name for layer in maps}
    if found:
        return tuple(slot for slot in slots_of(model.anatomy, found) if slot.name in wanted)
    return tuple(Slot(layer, NO_STATISTICS, "blocks") for layer in model.anatomy.layers() if layer.name in wanted)


def current(module: torch.nn.Module, layer: anatomy.Map) -> Weight:
    """The weight of a layer as it is now: the compact one itself, or the matrix."""
    held = getattr(module.get_submodule(layer.path), layer.parameter)
    return held if isinstance(held, Weight) else Dense(anatomy.matrix(module, layer).detach())


def _held(module: torch.nn.Module, slots: Sequence[Slot]) -> dict[str, Weight]:
    """The compact weights that ``module`` holds in ``slots``."""
    layers = dict(module.named_modules(remove_duplicate=False))
    held = {slot.name: getattr(layers.get(slot.map.path), slot.map.parameter, None) for slot in slots}
    return {name: weight for name, weight in held.items() if isinstance(weight, Weight)}


def _slots(job: Job, needs: frozenset[str]) -> tuple[Slot, ...]:
    return _chosen(job.model, job.model.anatomy.layers(), job.statistics() if needs else {})


def _params(job: Job, slots: tuple[Slot, ...], weights: Mapping[str, Weight]) -> int:
    changed = [slot for slot in slots if slot.name in weights]
    inside = sum(slot.map.shape[0] * slot.map.shape[1] for slot in changed)
    return parameters(job.model.module) - inside + sum(weights[slot.name].cost().params for slot in changed)
