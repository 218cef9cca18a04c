"""Run a recipe on a checkpoint that is larger than memory: one block at a time, read and written as it comes.

What needs the whole model in memory is left out: gradients, figures before and after, steps that change whole models.
`pennyweight measure` and `pennyweight verify` judge the result where it fits.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pennyweight import calibrate
from pennyweight.data import windows
from pennyweight.errors import RecipeError
from pennyweight.job import Progress, Settings, quiet
from pennyweight.lever import needs_of
from pennyweight.model.anatomy import Map
from pennyweight.model.loading import read_tokenizer
from pennyweight.model.saving import Saved
from pennyweight.recipe import Recipe, Step
from pennyweight.safe_write import check_free, staged, write_text
from pennyweight.statistics import Statistics
from pennyweight.weights import Weight


def apply_streaming(
    checkpoint: str | Path,
    recipe: str | Path | Recipe,
    *,
    data: Any = "wiki",
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    settings: Settings | None = None,
    progress: Progress = quiet,
) -> Saved:
    """Run the steps of ``recipe`` block by block and write the result to ``out``.

    Args:
        checkpoint: a directory as ``transformers`` writes it: ``config.json``, safetensors, tokenizer.
        recipe: of levers that change one matrix, without gradients.
        data: text to calibrate on; read only where a lever needs it.
        out: directory to write to.
        overwrite: replace an earlier result in ``out``.
        seed: of every draw.
        settings: how much text is read (``length``, ``statistics``).
        progress: called with (stage, done, total).

    Raises:
        RecipeError: a step that needs the whole model, or that selects nothing.
        ModelError, DataError, OutputError: as `pennyweight.calibrate.stream`.
    """
    check_free(out, overwrite=overwrite)
    found = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    asked, directory = settings or Settings(seed=seed), Path(checkpoint)
    for number, step in enumerate(found.steps, 1):
        where = f"{found.source} step {number}, {step.name}"
        if step.card.reach != "weight":
            raise RecipeError(f"{where}: it changes the whole model, which streaming never holds; apply it in memory")
        if "gradient" in needs_of(step.lever):
            raise RecipeError(f"{where}: it needs gradients, and they take the whole model; leave it out")
    needs = frozenset().union(*(needs_of(step.lever) for step in found.steps))
    ids = None
    if needs:
        tokenizer, _ = read_tokenizer(directory)
        ids = windows(data, tokenizer, part="calibration", length=asked.length, count=asked.statistics, seed=asked.seed)
    taken: dict[int, int] = dict.fromkeys(range(len(found.steps)), 0)

    def solve(layer: Map, weight: Weight, statistics: Statistics) -> Weight | None:
        steps = [(number, step) for number, step in enumerate(found.steps) if step.selects(layer)]
        for number, step in steps:
            taken[number] += 1
            weight = _solved(step, weight, statistics, layer)
        return weight if steps else None

    with staged(Path(out), overwrite=overwrite) as aside:
        saved = calibrate.stream(directory, aside / "model", ids, solve, needs=needs, report=progress)
        for number, step in enumerate(found.steps):
            if not taken[number]:
                raise RecipeError(
                    f"{found.source} step {number + 1}, {step.name}: where {list(step.where)} selects no map"
                )
        for file in (aside / "model").iterdir():
            shutil.move(file, aside / file.name)
        (aside / "model").rmdir()
        write_text(aside / "recipe.yaml", found.text())
    return Saved(Path(out), (*saved.files, "recipe.yaml"), saved.bytes)


def _solved(step: Step, weight: Weight, statistics: Statistics, layer: Map) -> Weight:
    try:
        made: Weight = step.lever.solve(weight, statistics)
    except ValueError as error:
        raise type(error)(f"{step.name}: {layer.name}: {error}") from error
    return made
