"""Points of a law, from whatever people hold them in: columns, rows, arrays, a CSV file.

Shape letters: V variables, n points.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.errors import DataError, OptionError, UnitError
from pennyweight.laws.forms import Array, Form

_LOSSES = ("loss", "L", "y")


@dataclass(frozen=True)
class Points:
    """Variables (V, n) and target (n,) of a form, checked; ``axis`` is the column a one-variable form was given."""

    x: Array
    y: Array
    axis: str | None
    notes: tuple[str, ...]


def read_csv(path: str | Path) -> dict[str, list[str]]:
    """The columns of a CSV file with a header, as text; with semicolons or tabs where the header has no comma.

    Raises:
        DataError: no such file, no rows, a row of another length, or two columns of one name.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            top = file.readline()
            while top and not top.strip():
                top = file.readline()
            mark = next((mark for mark in ",;\t" if mark in top), ",")
            rows = [row for row in csv.reader(itertools.chain([top], file), delimiter=mark) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}); give a UTF-8 file with a header line") from error
    if len(rows) < 2:
        raise DataError(f"{path}: {max(len(rows) - 1, 0)} rows below the header; give one row a run")
    header = [name.strip() for name in rows[0]]
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise DataError(f"{path}: {twice[0]!r} names more than one column; give each a name of its own")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise DataError(f"{path} line {number}: {len(row)} fields where the header names {len(header)}")
    return {name: [row[index] for row in rows[1:]] for index, name in enumerate(header)}


def numbers(values: Any, name: str) -> Array:
    """A column as numbers.

    Raises:
        DataError: a value that is none.
    """
    found = []
    for row, value in enumerate(values, start=1):
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            shown = value if isinstance(value, str) else repr(value)
            raise DataError(
                f"column {name}, row {row}: {shown[:40]!r} is none; give plain numbers (1.4e12, not 1.4T or 1,4)"
            ) from None
    return np.asarray(found, dtype=float)


def columns(points: Any, where: str) -> dict[str, Any]:
    """Columns by name, of a mapping or DataFrame of them, of rows by name, or of a CSV file given by its path.

    Raises:
        DataError: none of these, or columns or rows that do not go together.
    """
    if isinstance(points, (str, Path)):
        return dict(read_csv(points))
    if hasattr(points, "keys") and hasattr(points, "__getitem__"):
        found = {str(name): np.asarray(points[name], dtype=object).reshape(-1) for name in points.keys()}
        lengths = {name: len(values) for name, values in found.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DataError(f"{where}: columns of different lengths ({said}); give one value a run")
        return found
    rows = None
    if hasattr(points, "__iter__"):
        rows = list(points)
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(
            f"{where}: {type(points).__name__} given; give columns by name, rows by name, or the path of a CSV file"
        )
    first = list(rows[0]) if rows else []
    for number, row in enumerate(rows, start=1):
        if set(row) != set(first):
            raise DataError(
                f"{where}: point {number} has {', '.join(map(str, row))}; the first has {', '.join(map(str, first))}"
            )
    return {str(name): np.array([row[name] for row in rows], dtype=object) for name in first}


def _columns(points: Any, form: Form, axis: str | None) -> dict[str, Any]:
    if isinstance(points, (str, Path)) or not hasattr(points, "__iter__") or hasattr(points, "keys"):
        return columns(points, form.name)
    rows = list(points)
    if rows and isinstance(rows[0], Mapping):
        return columns(rows, form.name)
    try:
        table = np.asarray(rows, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError(f"points: {error}; give columns by name, rows by name, or a table of numbers") from error
    width = len(form.variables) + 1
    if table.ndim == 2 and table.shape[1] != width and table.shape[0] == width:
        table = table.T  # (x, y) given as a pair of columns
    if table.ndim != 2 or table.shape[1] != width:
        names = ", ".join([*(v.name for v in form.variables), form.target])
        raise DataError(f"points of shape {table.shape}: {form.name} takes rows of {width} numbers ({names})")
    shown: list[str] = [axis or v.name for v in form.variables] if width == 2 else [v.name for v in form.variables]
    return dict(zip([*shown, form.target], table.T, strict=True))


def _pick(columns: Mapping[str, Any], wanted: tuple[str, ...]) -> str | None:
    lower = {name.lower(): name for name in reversed(list(columns))}
    for name in wanted:
        if name in columns:
            return name
    return next((lower[name.lower()] for name in wanted if len(name) > 1 and name.lower() in lower), None)


def read(
    points: Any,
    form: Form,
    *,
    axis: str | None = None,
    target: str | None = None,
    units: Mapping[str, float] | None = None,
) -> Points:
    """The points a form is fitted to.

    Args:
        points: columns by name (a mapping or DataFrame), rows by name, an (n, V+1) table with the target last, or the
            path of a CSV file.
        form: the form.
        axis: the column that is the one variable of a one-variable form.
        target: the column predicted; by default the form's own name for it, or "loss".
        units: factors by column: ``{"D": 1e9}`` says that D is written in billions.

    Raises:
        DataError: a column missing, a value that is no number or outside the law's domain.
        UnitError: columns whose units cannot belong together.
        OptionError: ``axis`` on a form of several variables, or a unit for no column.
    """
    if axis is not None and len(form.variables) != 1:
        raise OptionError(f"{form.name} is a law of {len(form.variables)} variables; axis = {axis!r} has no effect")
    table = _columns(points, form, axis)
    units = dict(units or {})
    if unknown := [name for name in units if name not in table]:
        raise OptionError(f"units: no column {unknown[0]!r}; there are {', '.join(table)}")
    scaled = {}

    def column(name: str) -> Array:
        if name not in scaled:
            scaled[name] = numbers(table[name], name) * float(units.get(name, 1.0))
        return scaled[name]

    notes = []
    target_name = _pick(table, (target,) if target else (form.target, *_LOSSES))
    if target_name is None:
        raise DataError(
            f"no column {target or form.target!r} to predict; there are {', '.join(table)}; name it (target=...)"
        )
    picked: str | None = axis
    x = []
    for variable in form.variables:
        name = axis if axis is not None else _pick(table, (variable.name, *variable.synonyms))
        if name is None and len(form.variables) == 1:
            rest = [c for c in table if c != target_name]
            name = rest[0] if len(rest) == 1 else None
        if name is None and variable.name == "D":  # tokens follow from compute and size
            params, compute = (
                _pick(table, ("N", "params", "parameters")),
                _pick(table, ("C", "train_flop", "flops")),
            )
            if params and compute:
                x.append(column(compute) / (6.0 * column(params)))
                notes.append(f"D taken as {compute} / (6 {params})")
                continue
        if name is None or name not in table:
            raise DataError(f"{form.name} needs a column {name or variable.name!r}; there are {', '.join(table)}")
        picked = name if len(form.variables) == 1 else None
        x.append(column(name))
    y = column(target_name)
    variables = np.stack(x)
    form.check(variables)
    if not np.isfinite(y).all():
        raise DataError(f"{target_name} of point {int(np.flatnonzero(~np.isfinite(y))[0]) + 1} is not a finite number")
    if form.space == "log" and (y <= 0).any():
        at = int(np.flatnonzero(y <= 0)[0])
        raise DataError(
            f"{target_name} is {y[at]:g} in point {at + 1}: {form.name} has no value at or below 0 (a likelihood of "
            "continuous data can be negative); fit a loss that is positive, such as CRPS or a normalized loss"
        )
    _units_agree(form, variables)
    return Points(variables, y, picked, tuple(notes))


def _units_agree(form: Form, x: Array) -> None:
    names = [v.name for v in form.variables]
    if not {"N", "D"} <= set(names):
        return
    params, tokens = x[names.index("N")], x[names.index("D")]
    # billions of tokens reach 1e5, billions of parameters 1e3; a tiny model of 20,000 parameters is no mistake
    for name, raw, top, other_name, other in (("D", tokens, 1e5, "N", params), ("N", params, 1e3, "D", tokens)):
        if raw.max() < top and other.min() >= 1e6:
            raise UnitError(
                f"{name} goes up to {raw.max():g} while {other_name} starts at {other.min():g}: {name} looks like "
                f"billions; give single units, or say so: units={{'{name}': 1e9}}, or --unit {name}=1e9"
            )
