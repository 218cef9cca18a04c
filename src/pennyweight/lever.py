"""The contract of a lever, the options it declares, and the registry.

A lever is a frozen dataclass of options plus what it does at one of three reaches: ``weight`` (solve one matrix),
``block`` (change a block), ``model`` (change the whole). Options are declared once, with `option`; recipes, the command
line and the documentation read them from there. The registry is filled when a room (``pennyweight.levers.<room>``) is
imported; third parties register through the entry-point group ``pennyweight.levers``.

This module imports no torch: listing the levers must stay cheap.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from pennyweight.errors import OptionError, RecipeError

if TYPE_CHECKING:
    from pennyweight.statistics import Statistics
    from pennyweight.weights import Weight

Reach = Literal["weight", "block", "model"]
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """A range of allowed values: the words that describe it, and the test."""

    words: str
    allows: Callable[[Any], bool]


def between(low: float, high: float) -> Check:
    """``low <= value <= high``."""
    return Check(f"between {low} and {high}", lambda value: low <= value <= high)


def at_least(low: float) -> Check:
    """``value >= low``."""
    return Check(f"at least {low}", lambda value: value >= low)


def one_of(*values: Any) -> Check:
    """``value`` is one of ``values``."""
    return Check("one of " + ", ".join(map(str, values)), lambda value: value in values)


ANY = Check("any value", lambda value: True)


def option(default: Any, check: Check, text: str) -> Any:
    """Declare an option of a lever: its default, its range, and what it is, in one line of plain words."""
    return field(default=default, metadata={"check": check, "text": text})


@dataclass(frozen=True)
class Option:
    """One option of a lever, as recipes, help and documentation show it."""

    name: str
    type: str
    default: Any
    range: str
    text: str


@runtime_checkable
class WeightLever(Protocol):
    """A lever of reach ``weight``: a pure solver of one matrix."""

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        """The compact weight that stands for ``weight``; neither argument is changed."""


@dataclass(frozen=True)
class Card:
    """What the registry knows of a lever."""

    name: str
    cls: type
    reach: Reach
    row: int | None
    needs: frozenset[str]
    paper: str

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.cls.__doc__ or "").strip().splitlines()[0]

    @property
    def options(self) -> tuple[Option, ...]:
        """Its options in order of declaration."""
        return tuple(
            Option(f.name, _words(f.type), f.default, f.metadata["check"].words, f.metadata["text"])
            for f in dataclasses.fields(self.cls)
        )


_REGISTRY: dict[str, Card] = {}
LeverClass = TypeVar("LeverClass", bound=type)

#: What a weight lever may ask the calibration walk for; see `pennyweight.statistics.Statistics`.
STATISTICS = frozenset({"second_moment", "absolute", "gradient"})


def lever(
    name: str, *, reach: Reach, row: int | None = None, needs: tuple[str, ...] = (), paper: str = ""
) -> Callable[[LeverClass], LeverClass]:
    """Register a frozen dataclass as the lever ``name`` ("room.method").

    Args:
        name: "room.method", as recipes say it.
        reach: what it changes.
        row: its row in `pennyweight rows`.
        needs: statistics it reads, out of `STATISTICS`.
        paper: title and where to find it.
    """
    assert set(needs) <= STATISTICS, f"{name}: unknown statistics {set(needs) - STATISTICS}"

    def register(cls: LeverClass) -> LeverClass:
        assert name not in _REGISTRY or _REGISTRY[name].cls.__module__ == cls.__module__, f"{name} registered twice"
        assert dataclasses.is_dataclass(cls), f"{name}: a lever is a frozen dataclass"
        for f in dataclasses.fields(cls):
            assert "check" in f.metadata, f"{name}.{f.name}: declare it with option(...)"
        cls.lever_name = name  # type: ignore[attr-defined]
        _REGISTRY[name] = Card(name, cls, reach, row, frozenset(needs), paper)
        # options are checked before the class's own __post_init__, so that it may rely on them; a dataclass calls that
        # only when it was there while the class was made, and else nothing would be checked
        made, own = vars(cls)["__init__"], getattr(cls, "__post_init__", None)

        @functools.wraps(made)
        def init(self: Any, *args: Any, **options: Any) -> None:
            made(self, *args, **options)
            _check_options(name, self)

        def post_init(self: Any) -> None:
            _check_options(name, self)
            assert own is not None
            own(self)

        if own is None:
            setattr(cls, "__init__", init)  # noqa: B010  (mypy: assigning to a method)
        else:
            setattr(cls, "__post_init__", post_init)  # noqa: B010
        return cls

    return register


def _check_options(name: str, instance: Any) -> None:
    hints = typing.get_type_hints(type(instance))
    for f in dataclasses.fields(instance):
        value, check = getattr(instance, f.name), f.metadata["check"]
        if not _is_a(value, hints[f.name]):
            raise OptionError(
                f"{name}: {f.name} = {value!r} is a {type(value).__name__}; give {_words(f.type)}, {check.words}"
            )
        if value is not None and not check.allows(value):
            raise OptionError(f"{name}: {f.name} = {value!r} is out of range; give {check.words}")


def _words(annotation: Any) -> str:
    """``int``, ``int | None``: a field's type is text or the type itself, as its module annotates."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, inner) for inner in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is Any or hint is ClassVar:
        return True
    if hint is type(None) or hint is None:
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def load_rooms() -> None:
    """Import every room of levers, and every installed plug-in, so that the registry is full."""
    import pennyweight.levers as street

    for room in pkgutil.iter_modules(street.__path__):
        module = importlib.import_module(f"{street.__name__}.{room.name}")
        for method in pkgutil.iter_modules(getattr(module, "__path__", [])):
            importlib.import_module(f"{module.__name__}.{method.name}")
    from importlib.metadata import entry_points

    for point in entry_points(group="pennyweight.levers"):
        point.load()


def levers(room: str | None = None) -> tuple[Card, ...]:
    """Every lever, or those of one room, sorted by name."""
    load_rooms()
    return tuple(card for name, card in sorted(_REGISTRY.items()) if room is None or name.split(".")[0] == room)


def find(name: str) -> Card:
    """The card of lever ``name``.

    Raises:
        RecipeError: no such lever; the nearest names are offered.
    """
    if name not in _REGISTRY:
        load_rooms()
    if name not in _REGISTRY:
        near = get_close_matches(name, _REGISTRY, n=3) or sorted(_REGISTRY)
        raise RecipeError(f"no lever is called {name!r}; did you mean {', '.join(near)}? list: `pennyweight levers`")
    return _REGISTRY[name]


def make(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The lever ``name`` with ``options``, checked.

    Raises:
        RecipeError: an unknown lever.
        OptionError: an unknown option, a wrong type, or a value out of range.
    """
    card, options = find(name), dict(options or {})
    known = [o.name for o in card.options]
    for key in options:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise OptionError(f"{name} has no option {key!r}; {hint}")
    return card.cls(**options)


def options_of(instance: Any) -> dict[str, Any]:
    """The options of a lever that differ from their defaults, in order: what a recipe writes down."""
    return {f.name: value for f in dataclasses.fields(instance) if (value := getattr(instance, f.name)) != f.default}


def needs_of(instance: Any) -> frozenset[str]:
    """The statistics that a lever reads with these very options: its own ``needs`` where it has one, or its card's."""
    own: frozenset[str] | None = getattr(instance, "needs", None)
    return find(instance.lever_name).needs if own is None else own


def candidates_of(card: Card, shape: tuple[int, int]) -> Iterator[Any]:
    """The settings of a lever worth offering the planner for a matrix of ``shape``; none when it declares none."""
    offer = getattr(card.cls, "candidates", None)
    return iter(()) if offer is None else offer(shape)
