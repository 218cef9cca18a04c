"""Re-measure a fitted directory against its receipt: files, hashes, budgets, and the held-out figures themselves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pennyweight.errors import DataError
from pennyweight.export.targets import target
from pennyweight.finish import RECIPE
from pennyweight.job import Job, Progress, Settings, quiet
from pennyweight.journal import Journal
from pennyweight.model import load
from pennyweight.model.saving import saved_bytes
from pennyweight.receipt import FileLine, Receipt
from pennyweight.recipe import Recipe
from pennyweight.task import task_of
from pennyweight.units import Floor

#: A figure measured again may differ by what another order of sums does.
_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Check:
    """One thing a receipt says, and whether it is so."""

    what: str
    said: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Verified:
    """The checks of a receipt."""

    directory: Path
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    def table(self) -> str:
        """One line a check."""
        width = max(len(check.what) for check in self.checks)
        lines = [
            f"{'ok ' if check.holds else 'NOT'}  {check.what:<{width}}  {check.said}"
            + ("" if check.holds else f", found {check.found}")
            for check in self.checks
        ]
        return "\n".join([*lines, f"{self.directory}: the receipt {'holds' if self.holds else 'DOES NOT HOLD'}"])

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps({"holds": self.holds, "checks": [asdict(check) for check in self.checks]}, indent=2)


def verify(directory: str | Path, *, model: str | Path | None = None, progress: Progress = quiet) -> Verified:
    """Check the receipt in ``directory``.

    Args:
        directory: of a fit.
        model: the original, when the receipt's name no longer finds it.
        progress: called with (stage, done, total).

    Raises:
        UserError: there is no receipt, or it cannot be read.
        ModelError: the fitted or the original model cannot be loaded.
    """
    directory = Path(directory)
    receipt = Receipt.read(directory)
    checks = []
    for line in receipt.files:
        path = directory / line.name
        now = FileLine.of(path).sha256 if path.is_file() else "missing"
        checks.append(Check(f"file {line.name}", line.sha256[:16], now[:16], now == line.sha256))
    recipe = Recipe.read(directory / RECIPE)
    checks.append(_equal("recipe", receipt.recipe_sha256, recipe.sha256))
    for budget in receipt.budgets:
        if budget.resource == "bytes":
            aim = receipt.request.target
            size = saved_bytes(directory) if aim is None else target(aim).size(directory)
            checks.append(Check(f"budget {budget.asked}", f"{budget.spent:,}", f"{size:,}", size <= budget.allowed))
    original = load(model if model is not None else receipt.model.name)
    checks.append(_equal("original model", receipt.model.sha256, original.fingerprint))
    checks += _figures(directory, receipt, original.name if model is None else str(model), progress)
    return Verified(directory, tuple(checks))


def _equal(what: str, said: str, found: str) -> Check:
    return Check(what, said[:16], found[:16], said == found)


def _figures(directory: Path, receipt: Receipt, original: str, progress: Progress) -> list[Check]:
    if receipt.data is None:
        return []
    settings = Settings(
        length=receipt.data.window, heldout=receipt.data.heldout_tokens // receipt.data.window,
        seed=receipt.seeds.get("windows", 0),
    )  # fmt: skip
    first, second = load(original), load(directory)
    if receipt.data.name.startswith("["):
        raise DataError(f"{directory}: was judged on text given from memory, which a receipt cannot bring back")
    jobs = [
        Job(
            model=each, task=task_of(first), data=receipt.data.name, budgets=(), floor=None, cards=(),
            settings=settings, progress=progress, journal=Journal.beside(directory.absolute() / f"verify-{n}"),
        )
        for n, each in enumerate((first, second))
    ]  # fmt: skip
    windows = jobs[0].heldout
    task = jobs[0].task
    before, after = (
        task.scores(job.model.module, windows, exact=True, report=lambda d, n: progress("measuring", d, n))
        for job in jobs
    )
    effect = task.effect(before, after)
    figure = receipt.figures[0]
    said = figure.ratio.value if figure.ratio is not None else figure.after.value
    close = abs(effect.value - said) <= _TOLERANCE * abs(said)
    found = [Check(figure.name, f"{said:.5g}", f"{effect.value:.5g}", close)]
    if receipt.floor is not None:
        verdict = task.judge(Floor.parse(receipt.floor.asked), before, after)
        found.append(
            Check(f"floor {receipt.floor.asked}", f"{receipt.floor.upper:.5g}", f"{verdict.upper:.5g}", verdict.holds)
        )
    return found
