"""Recipes: what is done to a model, in what order and to which of its maps, as a small YAML file.

    pennyweight: 1
    steps:
    - quantize.gptq: {bits: 4, group_size: 64}
      where: role:ffn.*
    - quantize.rtn: {bits: 8}
      where: ['model.layers.{0,28-29}.self_attn.*', '!*.o_proj']

A step names a lever, its options (those left out have their defaults) and the maps it is for: every map when ``where``
is left out. The steps run in order, each on what the ones before it left; a map that two steps select gets both.

A pattern is a map's name or, after ``role:``, its role. ``*`` stands for any text, ``?`` for one character, ``{a,b}``
for alternatives and ``{3-7}`` for a range of whole numbers; everything else, brackets too (names of experts have them),
stands for itself. A pattern after ``!`` takes away from what the others selected.

This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from pennyweight.errors import RecipeError, UserError
from pennyweight.lever import Card, find, make, options_of

FORMAT = 1
_KEY = "pennyweight"
_LARGEST_BYTES = 10_000_000  # a hand on a keyboard or a planner of 10^5 maps stays far below


class Named(Protocol):
    """What a pattern looks at; `pennyweight.model.anatomy.Map` is one."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


MapType = TypeVar("MapType", bound=Named)


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Args:
        lever: an instance of a registered lever.
        where: patterns of the maps it is for; see the module's text.
    """

    lever: Any
    where: tuple[str, ...] = ("*",)

    @property
    def name(self) -> str:
        """The lever's name, "room.method"."""
        return str(self.lever.lever_name)

    @property
    def card(self) -> Card:
        """The lever's card in the registry."""
        return find(self.name)

    def selects(self, one: Named) -> bool:
        """Whether this step is for the map ``one``."""
        taken = any(_matches(pattern, one) for pattern in self.where if not pattern.startswith("!"))
        return taken and not any(_matches(pattern[1:], one) for pattern in self.where if pattern.startswith("!"))

    def plain(self) -> dict[str, Any]:
        """The step as YAML has it: only what differs from the defaults."""
        found: dict[str, Any] = {self.name: {key: _listed(value) for key, value in options_of(self.lever).items()}}
        if self.where != ("*",):
            found["where"] = self.where[0] if len(self.where) == 1 else list(self.where)
        return found


@dataclass(frozen=True)
class Recipe:
    """Ordered steps; equal when the steps are.

    Args:
        steps: at least one.
        source: where it was read, for messages.

    >>> recipe = Recipe.parse("pennyweight: 1\\nsteps:\\n- quantize.rtn: {bits: 4}\\n  where: role:ffn.*\\n")
    >>> recipe.steps[0].lever.bits, recipe.steps[0].where
    (4, ('role:ffn.*',))
    """

    steps: tuple[Step, ...]
    source: str = field(default="recipe", compare=False)

    @classmethod
    def parse(cls, text: str, *, source: str = "recipe") -> Recipe:
        """Read YAML.

        Raises:
            RecipeError: text that is not a recipe; the message names the step and, where it can, the remedy.
        """
        found = load_yaml(text, source)
        if not isinstance(found, dict) or _KEY not in found:
            raise RecipeError(f"{source}: not a recipe; it begins with `{_KEY}: {FORMAT}` and then has `steps:`")
        if found[_KEY] != FORMAT or isinstance(found[_KEY], bool):
            raise RecipeError(f"{source}: recipe format {found[_KEY]!r} is unknown; this version reads {FORMAT}")
        unknown = [key for key in found if key not in (_KEY, "steps")]
        if unknown:
            raise RecipeError(f"{source}: unknown key {unknown[0]!r}; a recipe has {_KEY} and steps")
        steps = found.get("steps")
        if not isinstance(steps, list) or not steps:
            raise RecipeError(f"{source}: steps is {_said(steps)}; give a list of at least one `- lever: {{options}}`")
        return cls(tuple(_step(step, f"{source} step {n}") for n, step in enumerate(steps, 1)), source)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a file.

        Raises:
            RecipeError: a file that cannot be read, or that is not a recipe.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _LARGEST_BYTES:
                raise RecipeError(f"{path}: {path.stat().st_size} bytes are too many for a recipe; give a recipe.yaml")
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe.yaml") from None
        except UnicodeDecodeError:
            raise RecipeError(f"{path}: not UTF-8 text; give the path of a recipe.yaml") from None
        return cls.parse(text, source=path.name)

    @classmethod
    def of(cls, chosen: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
        """The shortest recipe that gives each named map its own lever: maps of equal levers share a step.

        Args:
            chosen: map name -> lever instance; None leaves the map as it is. Order decides the order of the steps.
            source: see the class.

        Raises:
            RecipeError: every map is left as it is.
        """
        groups: dict[Hashable, list[str]] = {}
        for name, lever in chosen.items():
            if lever is not None:
                groups.setdefault(lever, []).append(name)
        if not groups:
            raise RecipeError(f"{source}: no map gets a lever; a recipe has at least one step")
        return cls(tuple(Step(lever, shorten(names)) for lever, names in groups.items()), source)

    def text(self, *, comment: str = "") -> str:
        """The recipe in YAML; `parse` reads it back equal. ``comment`` lines come first."""
        head = "".join(f"# {line}\n" for line in comment.splitlines())
        steps = [{key: _OneLine([value]) for key, value in step.plain().items()} for step in self.steps]
        plain = {_KEY: FORMAT, "steps": steps}
        body: str = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
        return head + body

    def write(self, path: str | Path, *, comment: str = "") -> None:
        """Write `text` to ``path``, atomically.

        Raises:
            OutputError: a place that cannot be written.
        """
        from pennyweight.safe_write import write_text

        write_text(path, self.text(comment=comment))

    @cached_property
    def sha256(self) -> str:
        """Hash of what the recipe does: spelling, comments and whether a default is written out do not matter."""
        steps = [
            {
                "lever": step.name,
                "options": {f.name: _listed(getattr(step.lever, f.name)) for f in fields(step.lever)},
                "where": list(step.where),
            }
            for step in self.steps
        ]
        canonical = json.dumps({_KEY: FORMAT, "steps": steps}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def selected(self, maps: Sequence[MapType]) -> list[tuple[Step, list[MapType]]]:
        """Each step with the maps it is for, both in order.

        Steps of reach "model" or "block" are for the whole model unless they say ``where``.

        Raises:
            RecipeError: a pattern that selects none of ``maps``: an option without effect is a mistake.
        """
        found = []
        for number, step in enumerate(self.steps, 1):
            for pattern in step.where if maps or step.card.reach == "weight" else ():
                if not any(_matches(pattern.removeprefix("!"), one) for one in maps):
                    raise RecipeError(
                        f"{self.source} step {number}, {step.name}: where {pattern!r} selects none of the model's "
                        f"{len(maps)} maps{_nearest(pattern, maps)}"
                    )
            found.append((step, [one for one in maps if step.selects(one)]))
        return found


def shorten(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns that select exactly ``names``: names that differ in one whole number share a pattern.

    >>> shorten(["h.0.fc", "h.1.fc", "h.2.fc", "h.7.fc", "head"])
    ('h.{0-2,7}.fc', 'head')
    """
    # a name is text and whole numbers in turn; a number becomes the set of those it stands for
    boxes = [
        tuple(frozenset({int(part)}) if n % 2 else part for n, part in enumerate(_NUMBERS.split(name)))
        for name in dict.fromkeys(names)
    ]
    for place in range(max(map(len, boxes), default=0) - 1, 0, -1):
        if place % 2 == 0:
            continue
        merged: dict[Hashable, tuple[Any, ...]] = {}
        for box in boxes:
            rest = box[:place] + box[place + 1 :] if place < len(box) else (box,)
            key = (len(box), rest)
            if key in merged:
                both = merged[key][place] | box[place]  # boxes that differ in one side only: their union is a box
                merged[key] = (*box[:place], both, *box[place + 1 :])
            else:
                merged[key] = box
        boxes = list(merged.values())
    return tuple("".join(part if isinstance(part, str) else _written(part) for part in box) for box in boxes)


# whole numbers that stand alone between dots, brackets or ends; "0", "17", but not "03"
_NUMBERS = re.compile(r"(?<![^.\[])(0|[1-9][0-9]*)(?![^.\]#])", re.ASCII)


def _written(numbers: frozenset[int]) -> str:
    if len(numbers) == 1:
        return str(min(numbers))
    runs = []
    for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        inside = [number for _, number in run]
        runs += [f"{inside[0]}-{inside[-1]}"] if len(inside) > 1 else [str(inside[0])]
    return "{" + ",".join(runs) + "}"


def _matches(pattern: str, one: Named) -> bool:
    if pattern.startswith("role:"):
        return compiled(pattern.removeprefix("role:")).fullmatch(one.role) is not None
    return compiled(pattern).fullmatch(one.name) is not None


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern.

    Raises:
        RecipeError: a brace that is not closed, or a range that is empty or absurd.
    """
    parts = []
    for token in re.findall(r"\*+|\?|\{[^{}]*\}|[^*?]", pattern, re.DOTALL):
        if token.startswith("*"):
            parts.append(".*")
        elif token == "?":
            parts.append(".")
        elif token in "{}":
            raise RecipeError(f"pattern {pattern!r}: a brace is not closed; write {{a,b}} or {{3-7}}")
        elif token.startswith("{"):
            parts.append("(?:" + "|".join(_alternative(a, pattern) for a in token[1:-1].split(",")) + ")")
        else:
            parts.append(re.escape(token))
    return re.compile("".join(parts), re.DOTALL)


def _alternative(text: str, pattern: str) -> str:
    matched = re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6})", text.strip())
    if matched is None:
        return re.escape(text.strip())
    low, high = int(matched[1]), int(matched[2])
    if not low <= high < low + 10_000:
        raise RecipeError(f"pattern {pattern!r}: the range {text.strip()} holds nothing; write {{3-7}}")
    return "(?:" + "|".join(map(str, range(low, high + 1))) + ")"


def _nearest(pattern: str, maps: Sequence[Named]) -> str:
    role = pattern.removeprefix("!").startswith("role:")
    known = list(dict.fromkeys(f"role:{one.role}" if role else one.name for one in maps))
    near = get_close_matches(pattern.removeprefix("!"), known, n=3, cutoff=0.3) or known[:3]
    return f"; near it are {', '.join(near)}" if near else ""


def _step(found: Any, where: str) -> Step:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise RecipeError(f"{where}: is {_said(found)}; write `- lever: {{options}}`")
    names = [key for key in found if key != "where"]
    if len(names) != 1:
        raise RecipeError(f"{where}: names {len(names)} levers ({', '.join(names) or 'none'}); give one a step")
    name, options = names[0], found[names[0]]
    if options is not None and not isinstance(options, dict):
        raise RecipeError(f"{where}, {name}: options are {_said(options)}; write {{bits: 4}} or {{}}")
    patterns = found.get("where", "*")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise RecipeError(f"{where}, {name}: where is {_said(found['where'])}; give a pattern or a list of patterns")
    if all(pattern.startswith("!") for pattern in patterns):
        raise RecipeError(f"{where}, {name}: where only takes away; begin with '*' or another pattern")
    try:
        for pattern in patterns:
            compiled(pattern)
        lever = make(name, {key: _tupled(value) for key, value in (options or {}).items()})
    except UserError as error:
        raise RecipeError(f"{where}, {error}") from None
    return Step(lever, tuple(patterns))


def load_yaml(text: str, source: str) -> Any:
    """YAML of plain values, every key once.

    Raises:
        RecipeError: anything else; the message says where.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{source}{line}: not YAML ({' '.join(str(error.problem).split())}); mend it") from None
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError, KeyError, IndexError) as error:
        # SafeLoader lets its scalar constructors' own exceptions through: dates such as 2024-13-01, "0b", "!!int x"
        reason = " ".join(str(error).split())[:120]
        raise RecipeError(f"{source}: not YAML ({reason or type(error).__name__}); mend it") from None
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply for a recipe; a recipe has steps and options") from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML lets the last one win in silence) and aliases.

    What has a colon in it is text: 2:4 is a pattern of zeros, where YAML 1.1 reads 124, in base 60.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases have no place in a recipe", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_float(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


class _OneLine(list[Any]):
    """Holds one value that is written in flow style, however deep: options take a line, steps their own."""


class _Dumper(yaml.SafeDumper):
    def one_line(self, held: _OneLine) -> yaml.Node:
        node: yaml.Node = self.represent_data(held[0])
        if isinstance(node, yaml.CollectionNode):
            node.flow_style = True  # and with it all that is inside
        return node


_Dumper.add_representer(_OneLine, _Dumper.one_line)


def _tupled(value: Any) -> Any:
    """Lists as tuples: options are frozen."""
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _said(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
