"""The rows: the 255 published systems that Pennyweight holds or means to hold, and what of each is here.

A row has a number, a room, a short name and the title of its paper. What is here is computed from the registries of
levers, laws and claims; nothing is kept by hand.

This module imports no torch; `coverage` loads the levers and does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files

from pennyweight.errors import OptionError


@dataclass(frozen=True)
class Row:
    """One published system."""

    number: int
    room: str
    name: str
    paper: str


@dataclass(frozen=True)
class Coverage:
    """What of a row is here, by name."""

    levers: tuple[str, ...] = ()
    laws: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """``lever quantize.gptq; claim taxonomy_keeps_its_bounds``; empty when nothing is."""
        kinds = (("lever", self.levers), ("law", self.laws), ("claim", self.claims))
        return "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds if names)


@lru_cache(maxsize=1)
def _all() -> tuple[Row, ...]:
    return tuple(Row(**row) for row in json.loads((files("pennyweight") / "rows.json").read_text("utf-8")))


def rooms() -> tuple[str, ...]:
    """The rooms, sorted."""
    return tuple(sorted({row.room for row in _all()}))


def rows(room: str | None = None) -> tuple[Row, ...]:
    """Every row, or those of one room, by number.

    Raises:
        OptionError: no such room.
    """
    if room is not None and room not in rooms():
        near = get_close_matches(room, rooms(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(rooms())}"
        raise OptionError(f"no room is called {room!r}; {hint}")
    return tuple(row for row in _all() if room in (None, row.room))


def row(number: int) -> Row:
    """The row of that number.

    Raises:
        OptionError: there is none.
    """
    if not 1 <= number <= len(_all()):
        raise OptionError(f"there is no row {number}; rows go from 1 to {len(_all())}")
    return _all()[number - 1]


@dataclass
class _Found:
    levers: list[str] = field(default_factory=list)
    laws: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)


def coverage() -> dict[int, Coverage]:
    """What of each row is here: row number -> names of its levers, laws and claims. Loads all of them."""
    from pennyweight.claims import claims
    from pennyweight.laws import forms
    from pennyweight.lever import levers

    found = {one.number: _Found() for one in _all()}
    for card in levers():
        if card.row is not None:
            found[card.row].levers.append(card.name)
    for form in forms.all_forms():
        if form.row is not None:
            found[form.row].laws.append(form.name)
    for claim in claims():
        found[claim.row].claims.append(claim.name)
    return {number: Coverage(tuple(f.levers), tuple(f.laws), tuple(f.claims)) for number, f in found.items()}
