"""A measurement: figures with units and intervals, the samples behind them, and how they were taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pennyweight.errors import DataError
from pennyweight.measure.stats import Interval, paired_difference, paired_ratio
from pennyweight.units import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "pennyweight.measurement/1"

#: Every figure there is: key -> (title, unit, whether more is better; None where neither is).
FIGURES: dict[str, tuple[str, str, bool | None]] = {
    "bytes": ("stored size", "B", False),
    "bytes_bf16": ("size in bf16", "B", None),
    "params": ("parameters, non-embedding", "parameters", False),
    "params_total": ("parameters, total", "parameters", False),
    "flops": ("compute", "FLOPs", False),
    "attention_flops": ("attention at full context", "FLOPs", False),
    "bytes_read": ("weights read to decode a token", "B", False),
    "activation_bytes": ("activations, at least", "B", False),
    "kv_bytes_per_token": ("cache a token", "B", False),
    "kv_bytes": ("cache at full context", "B", False),
    "peak_memory": ("peak memory of a process", "B", False),
    "loss": ("loss", "nats/token", False),
    "perplexity": ("perplexity", "", False),
    "perplexity_ratio": ("perplexity ratio to the reference", "x", False),
    "kl": ("divergence from the reference", "nats/token", False),
    "agreement": ("same next token as the reference", "share", True),
    "cosine": ("cosine to the reference's embedding", "", True),
    "latency": ("latency", "s", False),
    "prefill": ("prefill", "tokens/s", True),
    "decode": ("decode", "tokens/s", True),
    "decode_bound": ("decode, roofline bound", "tokens/s", None),
    "energy": ("energy a token", "J", False),
}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        value: the number.
        unit: "B", "parameters", "FLOPs", "nats/token", "tokens/s", "s", "J", "x" (a ratio), "share", or "" for none.
        interval: around it; None for an exact figure, or one of a single run.
        note: what it is of, or where it comes from, where the key does not say.
    """

    value: float
    unit: str
    interval: Interval | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite end of an interval becomes None."""
        found: dict[str, Any] = {"value": self.value, "unit": self.unit, "interval": None, "note": self.note}
        if self.interval is not None:
            ends = {end: value if math.isfinite(value) else None for end, value in self._ends().items()}
            found["interval"] = {**vars(self.interval), **ends}
        return found

    def _ends(self) -> dict[str, float]:
        assert self.interval is not None
        return {"low": self.interval.low, "high": self.interval.high}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Figure:
        """The inverse of `to_json`; raises TypeError or KeyError on anything else."""
        ends = found["interval"]
        if ends is not None:
            low, high = ends["low"], ends["high"]
            ends = {**ends, "low": -math.inf if low is None else low, "high": math.inf if high is None else high}
            if not all(isinstance(ends[name], (int, float)) for name in ("value", "low", "high", "level", "n")):
                raise TypeError(f"interval {ends} does not consist of numbers")
        if isinstance(found["value"], bool) or not isinstance(found["value"], (int, float)):
            raise TypeError(f"value {found['value']!r} is not a number")
        return cls(found["value"], str(found["unit"]), None if ends is None else Interval(**ends), str(found["note"]))

    def show(self, value: float | None = None) -> str:
        """The value as people read it, or ``value`` in the same unit."""
        number = self.value if value is None else value
        match self.unit:
            case "B":
                return show_bytes(number)
            case "s":
                return show_seconds(number)
            case "share":
                return f"{100 * number:.2f} %"
            case "parameters":
                return show_count(number).rstrip()
            case "FLOPs":
                return show_count(number) + "FLOPs"
            case _:
                return f"{number:.4g} {self.unit}".rstrip()

    def show_interval(self) -> str:
        """``low to high``, or nothing."""
        ends = None if self.interval is None else self._ends()
        return "" if ends is None else f"{self.show(ends['low'])} to {self.show(ends['high'])}"


@dataclass(frozen=True)
class Measurement:
    """What a model costs and how good it is.

    Attributes:
        model: its name.
        kind: of model.
        figures: by key; the keys are those of `FIGURES`.
        samples: what lies behind figures, one value a window, so that two measurements can be paired: "loss", "kl",
            "agreement", "cosine".
        conditions: how it was measured: data and its hash, windows, length, seed, dtype, threads, versions.
    """

    model: str
    kind: str
    figures: dict[str, Figure]
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Figure:
        return self.figures[key]

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; keys are added in later versions, never renamed."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "kind": self.kind,
            "conditions": dict(self.conditions),
            "figures": {key: figure.to_json() for key, figure in self.figures.items()},
            "samples": {key: list(values) for key, values in self.samples.items()},
        }

    @classmethod
    def from_json(cls, found: Any) -> Measurement:
        """The inverse of `to_json`.

        Raises:
            DataError: not a measurement, or of another version.
        """
        schema = found.get("schema") if isinstance(found, Mapping) else None
        if schema != SCHEMA:
            raise DataError(f"measurement: schema {schema!r}; this version reads {SCHEMA!r}: measure again")
        try:
            return cls(
                model=str(found["model"]),
                kind=str(found["kind"]),
                figures={str(key): Figure.from_json(figure) for key, figure in found["figures"].items()},
                samples={str(key): tuple(map(float, values)) for key, values in found["samples"].items()},
                conditions=dict(found["conditions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"measurement: {type(error).__name__} {error}; the file is damaged: measure again"
            ) from error

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Every figure in words: what it is, its value, its interval, its note."""
        return [
            (title(key), figure.show(), figure.show_interval(), figure.note) for key, figure in self.figures.items()
        ]

    def table(self) -> Table:
        """A rich table of `rows`."""
        return plain_table(f"{self.model} ({self.kind})", ("", "value", "95 % interval", ""), self.rows())

    def compare(self, other: Measurement) -> Comparison:
        """``other`` beside this one, as the changed model beside the original.

        Figures behind which both have samples of the same windows are compared in pairs, with an interval.

        Raises:
            DataError: both have samples, but of different data.
        """
        shared = [key for key in self.samples if key in other.samples]
        data = [m.conditions.get("data_sha256") for m in (self, other)]
        if shared and data[0] != data[1]:
            raise DataError(
                f"{self.model} and {other.model} were measured on different windows (of {self.conditions.get('data')} "
                f"and {other.conditions.get('data')}); measure both with the same data, windows, length and seed"
            )
        changes = {}
        for key, before in self.figures.items():
            if (after := other.figures.get(key)) is not None:
                changes[key] = Change(before, after, _paired(key, self.samples, other.samples))
        return Comparison(self.model, other.model, changes)


@dataclass(frozen=True)
class Change:
    """One figure of two models.

    Attributes:
        before: of the first.
        after: of the second.
        paired: the ratio (of perplexities) or difference (of other figures) over the same windows; None for figures
            that are exact or were timed apart.
    """

    before: Figure
    after: Figure
    paired: Interval | None

    @property
    def ratio(self) -> float | None:
        """after / before; None where that is nothing."""
        return self.after.value / self.before.value if self.before.value else None


@dataclass(frozen=True)
class Comparison:
    """Two measurements side by side."""

    first: str
    second: str
    changes: dict[str, Change]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "first": self.first,
            "second": self.second,
            "changes": {
                key: {
                    "before": change.before.to_json(),
                    "after": change.after.to_json(),
                    "ratio": change.ratio,
                    "paired": Figure(0.0, "", change.paired).to_json()["interval"],
                }
                for key, change in self.changes.items()
            },
        }

    def table(self) -> Table:
        """A rich table of both, their ratio, and what the paired windows say."""
        rows = []
        for key, change in self.changes.items():
            paired = change.paired
            ratio = "" if change.ratio is None else f"x {change.ratio:.4g}"
            said = "" if paired is None else f"{paired.value:+.4g} ({paired.low:+.4g} to {paired.high:+.4g})"
            if paired is not None and key == "perplexity":
                said = f"x {paired.value:.4g} ({paired.low:.4g} to {paired.high:.4g})"
            rows.append((title(key), change.before.show(), change.after.show(), ratio, said))
        return plain_table("", ("", self.first, self.second, "ratio", "paired, 95 %"), rows)


def title(key: str) -> str:
    """What tables call the figure ``key``."""
    return FIGURES[key][0] if key in FIGURES else key


def exact(key: str, value: float, note: str = "") -> Figure:
    """The figure ``key`` of a number without sampling error."""
    return Figure(value, FIGURES[key][1], None, note)


def sampled(key: str, interval: Interval, note: str = "") -> Figure:
    """The figure ``key`` of an estimate with its interval."""
    return Figure(interval.value, FIGURES[key][1], interval, note)


def _paired(
    key: str, before: Mapping[str, tuple[float, ...]], after: Mapping[str, tuple[float, ...]]
) -> Interval | None:
    name = "loss" if key == "perplexity" else key
    if name not in before or name not in after or len(before[name]) < 2:
        return None
    compare = paired_ratio if key == "perplexity" else paired_difference
    return compare(before[name], after[name])


def plain_table(name: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    """A rich table without lines; all but the first and last columns are numbers."""
    from rich.table import Table
    from rich.text import Text

    found = Table(title=name or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(header):
        found.add_column(column, justify="right" if 0 < index < len(header) - 1 else "left")
    for row in rows:
        found.add_row(*map(Text, row))  # Text: brackets in names are not markup
    return found
