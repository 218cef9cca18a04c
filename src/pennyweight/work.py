"""What a lever that changes whole models may draw on while it does.

Shape letters: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from pennyweight import calibrate
from pennyweight.errors import DataError
from pennyweight.statistics import Statistics

if TYPE_CHECKING:
    from pennyweight.calibrate.walk import Windows
    from pennyweight.model.anatomy import Map
    from pennyweight.model.model import Model

Report = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Data, selection and seed of one step.

    Attributes:
        model: what is changed.
        windows: (B, T) token ids, (B, ...) pixels, or inputs by name, to calibrate and train on; None without data.
        maps: those that the step selects, in order of the model.
        seed: of every draw.
        draw: gives (count, T) further calibration windows of the same text; None where there is no more than
            ``windows``.
        report: called with (stage, done, total).
        original: the model before the first step of the recipe; None where there is no recipe.
    """

    model: Model
    windows: Windows | None
    maps: tuple[Map, ...]
    seed: int = 0
    draw: Callable[[int], Tensor] | None = None
    report: Report = silent
    original: Model | None = None

    def inputs(self, lever: str) -> Windows:
        """The windows, or a DataError that says who needs them."""
        if self.windows is None:
            raise DataError(f"{lever}: needs calibration data; give some (data=...)")
        return self.windows

    def text(self, count: int) -> Tensor:
        """(count, T) calibration windows: more than ``windows`` where the text has them, as many as there are else.

        Raises:
            DataError: windows that are no token ids, or none.
        """
        found = self.inputs("training")
        if not isinstance(found, Tensor):
            raise DataError("training: needs token ids as one tensor (windows, tokens)")
        if count > len(found) and self.draw is not None:
            found = self.draw(count)
        return found[:count]

    def statistics(self, needs: Collection[str], *, gradient_tokens: int = 4096) -> dict[str, Statistics]:
        """Statistics of the model as it is now, by map name; see `pennyweight.calibrate.collect`."""
        return calibrate.collect(
            self.model, self.inputs("statistics"), needs=needs, gradient_tokens=gradient_tokens, seed=self.seed,
            report=self.report,
        )  # fmt: skip


@runtime_checkable
class ModelLever(Protocol):
    """A lever of reach ``block`` or ``model``."""

    def change(self, model: Model, work: Work) -> None:
        """Change ``model.module`` in place; what it holds then is what is saved.

        Layers are replaced with `pennyweight.model.anatomy.replace`. A lever that adds or takes away layers leaves a
        module whose `pennyweight.model.anatomy.of` is right again; ``model.anatomy`` is renewed by the caller.
        """
