"""What a report says, as plain numbers and strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from pennyweight.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number and the 95 % interval it was measured with; an exact number has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of the before/after table.

    Attributes:
        name: what was measured, "Perplexity on held-out text".
        unit: of ``before`` and ``after``; "bytes" and "params" are scaled for reading (67.3 MB), all others written as
            they are, "" for a bare number.
        before: of the original model; None where it has no such figure.
        after: of the fitted model.
        ratio: after / before, with the interval of the paired comparison where there is one.
        note: how it was measured, in a few words.
    """

    name: str
    unit: str = ""
    before: Figure | None = None
    after: Figure | None = None
    ratio: Figure | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model in the picture of size against quality.

    Attributes:
        bytes: of its files.
        ratio: its quality as a ratio to the original (perplexity ratio: 1 is the original, more is worse).
        kind: "chosen" is what was written (one point); "frontier" are the best plans, joined by a line; "candidate"
            what else was tried or predicted; "reference" a fixed recipe or another tool, always labelled.
        label: short name; needed for references.
        predicted: whether the ratio was predicted rather than measured.
    """

    bytes: int
    ratio: float
    kind: Literal["chosen", "frontier", "candidate", "reference"]
    label: str = ""
    predicted: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One weight matrix in the map of bits.

    Attributes:
        block: index of its block, None outside of the blocks.
        role: its role, as the anatomy names it; experts of one block are shown together.
        params: weights it stands for.
        bytes: what it is stored in.
        sparsity: share of zeros.
        rank: of its low-rank part, None without.
        lever: what made it, as the recipe says it ("quantize.gptq bits 4, group_size 64"); "" for untouched.
    """

    block: int | None
    role: str
    params: int
    bytes: int
    sparsity: float = 0.0
    rank: int | None = None
    lever: str = ""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was predicted before the fit, and what came out; ``unit`` as in `Measure`."""

    name: str
    predicted: float
    measured: float
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The same prompt continued by the original and by the fitted model, greedily."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of the fit and what it took."""

    name: str
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the page shows. What is left empty leaves its section out.

    Attributes:
        model: short name of the model.
        original_bytes: what it is measured against: its bf16 size.
        fitted_bytes: of the files written.
        budget: the budget as it was asked for ("25%"), "" without.
        budget_bytes: the same in bytes, None for a budget of another kind.
        quality: of the fitted model as a ratio to the original, with its interval.
        quality_name: what that is a ratio of.
        floor: the largest ratio allowed, None without a floor.
        floor_holds: the outcome of the test of the floor; None when none was made.
        verdict: that outcome in words, with the level, the upper limit and the sample size.
        measures: the before/after table.
        points: of the picture of size against quality.
        cells: of the map of bits, every stored matrix once.
        predictions: predicted against measured.
        samples: generations side by side.
        steps: time and memory of the fit.
        recipe: the recipe file.
        receipt: (name, value) of hashes, versions, seeds and data, in the order to be shown.
        notes: sentences the reader must not miss (ties, what was left out); shown under the verdict.
        created: date and time, as it should be read.
        version: of Pennyweight.
    """

    model: str
    original_bytes: int
    fitted_bytes: int
    budget: str = ""
    budget_bytes: int | None = None
    quality: Figure | None = None
    quality_name: str = "perplexity"
    floor: float | None = None
    floor_holds: bool | None = None
    verdict: str = ""
    measures: Sequence[Measure] = ()
    points: Sequence[Point] = ()
    cells: Sequence[Cell] = ()
    predictions: Sequence[Prediction] = ()
    samples: Sequence[Sample] = ()
    steps: Sequence[Step] = ()
    recipe: str = ""
    receipt: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    created: str = ""
    version: str = ""

    @classmethod
    def of(cls, found: ReportData | Mapping[str, Any]) -> ReportData:
        """``found`` itself, or built from a mapping of these names (nested mappings for nested parts).

        Raises:
            DataError: a name that is unknown or missing, or a value of the wrong type; the first is named.
        """
        if isinstance(found, ReportData):
            return found
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(found) - known):
            raise DataError(f"report: unknown entry {unknown[0]!r}; it takes {', '.join(sorted(known))}")
        try:
            return TypeAdapter(cls).validate_python(dict(found))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"report: {where}: {first['msg']}, not {first['input']!r:.60}") from error
