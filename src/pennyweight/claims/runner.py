"""Running claims: one record a claim, and the page generated from the records."""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.claims.assets import Assets
from pennyweight.claims.claim import PACES, Claim, Outcome, Pace, claims
from pennyweight.claims.sources import digest
from pennyweight.errors import DataError
from pennyweight.rows import row


@dataclass(frozen=True)
class Record:
    """What one claim gave; figures are None where it broke.

    Attributes:
        row, name, pace, headline: of the claim.
        holds: the verdict; False where it broke.
        method, baseline, control, unit, lower_is_better, interval, notes: see `Outcome`.
        seconds: what it took here.
        error: why it broke.
    """

    row: int
    name: str
    pace: Pace
    headline: str
    holds: bool
    method: float | None
    baseline: float | None
    control: tuple[str, float] | None
    unit: str
    lower_is_better: bool
    interval: tuple[float, float] | None
    notes: str
    seconds: float
    error: str | None = None

    def plain(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return dataclasses.asdict(self)

    @property
    def line(self) -> str:
        """The record in one line of plain words."""
        if self.error is not None:
            return f"row {self.row} {self.name}: BROKEN after {self.seconds:.1f} s: {self.error}"
        said = "holds" if self.holds else "DOES NOT HOLD"
        control = f"; {self.control[0]}: {self.control[1]:.4g}" if self.control else ""
        interval = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""
        return (
            f"row {self.row} {self.name}: {said}: {self.method:.4g}{interval} against {self.baseline:.4g} "
            f"({self.unit}){control}; {self.seconds:.1f} s"
        )


def run(
    rows: Iterable[int] | None = None, *, slow: bool = False, assets: Assets | None = None, keep: Path | None = None
) -> Iterator[Record]:
    """Run claims and yield a record each.

    Args:
        rows: those about these rows, quick and slow; None runs all quick ones.
        slow: with ``rows=None``, the slow ones too.
        assets: shared with other runs; None makes its own.
        keep: a file of records, one appended as each claim ends. Those that it has of a claim's very code come
            first, and are not run again.

    Raises:
        OptionError: a row without a claim, before anything runs.
        DataError: ``keep`` holds something else.
    """
    chosen = [one for one in claims(rows) if rows is not None or slow or one.pace == "quick"]
    return _run(chosen, assets or Assets(), keep)


def _run(chosen: list[Claim], assets: Assets, keep: Path | None) -> Iterator[Record]:
    known = {} if keep is None else current(keep)
    yield from (known[one.name] for one in chosen if one.name in known)
    for one in chosen:
        if one.name in known:
            continue
        record = run_one(one, assets)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            with keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"sources": digest(one), "record": record.plain()}, ensure_ascii=False) + "\n")
        yield record


def _kept(keep: Path, *, changed: bool) -> dict[str, Record]:
    found, here = {}, {one.name: digest(one) for one in claims()}
    for number, line in enumerate(keep.read_text(encoding="utf-8").splitlines() if keep.exists() else (), 1):
        try:
            entry = json.loads(line)
            record = Record(**entry["record"])
            if record.name in here and (entry["sources"] != here[record.name]) is changed and not record.error:
                pairs = (tuple(pair) if (pair := getattr(record, name)) else None for name in ("control", "interval"))
                control, interval = pairs
                found[record.name] = dataclasses.replace(record, control=control, interval=interval)
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{keep}: line {number} is no record of a claim; give another file") from None
    return found


def current(keep: Path) -> dict[str, Record]:
    """By name, the last record in ``keep`` of each claim, unbroken, and of its code as it is.

    Raises:
        DataError: ``keep`` holds something else.
    """
    return _kept(keep, changed=False)


def earlier(keep: Path) -> dict[str, Record]:
    """By name, the last record in ``keep`` of each claim, unbroken, that an earlier state of its code gave.

    Raises:
        DataError: ``keep`` holds something else.
    """
    return _kept(keep, changed=True)


def run_one(one: Claim, assets: Assets) -> Record:
    """Run one claim. One that raises gives a record that says so, so that the others still run."""
    begun = time.perf_counter()
    try:
        outcome: Outcome | None = one.check(assets)
        error = None
    except Exception as broken:  # whatever a claim raises is its verdict: the report, not this loop, must go red
        outcome = None
        last = traceback.extract_tb(broken.__traceback__)[-1]
        error = f"{type(broken).__name__}: {' '.join(str(broken).split())} ({last.name}, line {last.lineno})"
    seconds = time.perf_counter() - begun
    return Record(
        row=one.row,
        name=one.name,
        pace=one.pace,
        headline=one.headline,
        holds=outcome is not None and outcome.holds,
        method=outcome.method if outcome else None,
        baseline=outcome.baseline if outcome else None,
        control=outcome.control if outcome else None,
        unit=outcome.unit if outcome else "",
        lower_is_better=outcome.lower_is_better if outcome else True,
        interval=outcome.interval if outcome else None,
        notes=outcome.notes if outcome else "",
        seconds=seconds,
        error=error,
    )


def page(
    records: Iterable[Record], *, machine: str, waiting: Iterable[str] = (), before: Mapping[str, Record] | None = None
) -> str:
    """The Markdown of ``docs/claims.md``.

    Args:
        records: of a full run, or of as much of it as is done.
        machine: where it ran, in words.
        waiting: names of claims that are still to be run.
        before: what `earlier` has of those; they are shown, and marked.
    """
    old = {name: (before or {})[name] for name in waiting if name in (before or {})}
    left = sorted(set(waiting) - set(old))
    found = sorted([*records, *old.values()], key=lambda record: (record.row, record.name))
    held = sum(record.holds for record in found)
    lines = [
        "# Claims",
        "",
        f"{held} of {len(found)} claims hold. Written by `make claims` on {machine}; do not edit.",
        "",
        "A claim runs a row's method beside its baseline on a real small model. The control is what the same budget",
        "buys the plain way; it is printed even where it wins.",
        "",
        "| row | claim | holds | method | baseline | control | unit | the paper's own figure | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in found:
        cells = [
            f"{record.row} {row(record.row).name}",
            record.name.replace("_", " ") + (" †" if record.name in old else ""),
            "broken: " + (record.error or "") if record.error else "yes" if record.holds else "**no**",
            _figure(record.method) + (_interval(record.interval) if record.interval else ""),
            _figure(record.baseline),
            f"{_figure(record.control[1])} ({record.control[0]})" if record.control else "",
            record.unit + ("" if record.lower_is_better else " (higher is better)"),
            record.headline,
            f"{record.seconds:.1f}"
            + ("" if record.seconds <= PACES[record.pace] else f" (over {PACES[record.pace]:.0f})"),
        ]
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    if old:
        lines += ["", "† run with an earlier state of the code it reaches."]
    if left:
        lines += ["", f"Not run when this was written: {', '.join(name.replace('_', ' ') for name in left)}."]
    notes = [f"* Row {record.row}: {record.notes}" for record in found if record.notes]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _interval(interval: tuple[float, float]) -> str:
    return f" [{interval[0]:.4g}, {interval[1]:.4g}]"
