"""Quantities, budgets and floors, as people write them: "35MB", "25%", "kv=2GB", "latency=20ms", "perplexity<=1.10x".

Sizes are decimal (MB = 10^6 bytes); the binary units say so (MiB = 2^20). Numbers are read exactly, in decimal, so that
"67.3MB" is 67,300,000 bytes and not one less. A budget in percent is a share of what the original costs, and for bytes
that means its bf16 size. A floor with an ``x`` is a ratio to the original; without, it is the figure itself.

This module imports no torch: the command line reads its arguments before anything heavy is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from pennyweight.errors import UnitError

Kind = Literal["bytes", "params", "flops", "seconds", "joules", "share", "ratio", "count"]
Resource = Literal["bytes", "params", "flops", "kv", "latency", "memory", "energy"]
Metric = Literal["perplexity", "loss", "kl", "accuracy", "f1", "agreement", "cosine"]

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

#: kind -> unit -> how many of the base unit. The first unit of each kind is its base.
_UNITS: dict[Kind, dict[str, Decimal]] = {
    "bytes": {prefix + "B": Decimal(size) for prefix, size in (_DECIMAL | _BINARY).items()},
    "params": {prefix + " params": Decimal(size) for prefix, size in _DECIMAL.items()} | {"B params": Decimal(10**9)},
    "flops": {prefix + "FLOPs": Decimal(size) for prefix, size in (_DECIMAL | {"E": 10**18, "Z": 10**21}).items()},
    "seconds": {
        "s": Decimal(1), "us": Decimal("1e-6"), "ms": Decimal("1e-3"), "min": Decimal(60), "h": Decimal(3600),
        "d": Decimal(86400),
    },
    "joules": {
        "J": Decimal(1), "mJ": Decimal("1e-3"), "kJ": Decimal(1000), "Wh": Decimal(3600), "kWh": Decimal(3600000),
    },
    "share": {"": Decimal(1), "%": Decimal("0.01")},
    "ratio": {"x": Decimal(1)},
    "count": {"": Decimal(1), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "B": Decimal(10**9),
              "T": Decimal(10**12)},
}  # fmt: skip

# other spellings, looked up in lower case
_SPELLINGS = {
    "sec": "s", "second": "s", "seconds": "s", "minute": "min", "minutes": "min", "hour": "h", "hours": "h", "hr": "h",
    "day": "d", "days": "d", "byte": "B", "bytes": "B", "\u00b5s": "us", "\u00d7": "x",
}  # fmt: skip

_NUMBER = re.compile(r"\s*([+-]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(.*?)\s*", re.DOTALL)
_LARGEST = Decimal("1e30")


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, kept in the base unit of its kind.

    Args:
        value: in bytes, parameters, FLOPs, seconds or joules; a share of 1 for "25%"; a plain number for "1.1x".
        kind: which of these.

    >>> Quantity.parse("35MB")
    Quantity(value=Decimal('35000000'), kind='bytes')
    >>> str(Quantity.parse("0.5 GiB")), Quantity.parse("20ms").number
    ('536870912B', 0.02)
    """

    value: Decimal
    kind: Kind

    @classmethod
    def parse(cls, text: str, *, expect: tuple[Kind, ...] = ()) -> Quantity:
        """Read ``text``.

        Args:
            text: a number and a unit: "35MB", "1e9 params", "20ms", "10min", "25%", "1.10x".
            expect: the kinds that make sense here; empty takes any. A bare number (with k, M, G, B or T) is taken when
                params, flops or count is expected, being the only kinds that people write bare.

        Raises:
            UnitError: no number, an unknown unit, a kind that makes no sense here, or a value that is not above zero.
        """
        hint = _examples(expect)
        matched = _NUMBER.fullmatch(text)
        if matched is None:
            raise UnitError(f"{text!r} is not a quantity; write {hint}")
        digits, unit = matched.groups()
        try:
            number = Decimal(digits.replace("_", ""))
        except InvalidOperation:
            raise UnitError(f"{text!r} is not a quantity; write {hint}") from None
        for kind, scale in _readings(unit):
            if expect and kind not in expect:
                if kind == "count" and (bare := next((k for k in expect if k in ("params", "flops")), None)):
                    return cls(_positive(number * scale, text), bare)
                continue
            return cls(_positive(number * scale, text), kind)
        known = next(iter(_readings(unit)), None)
        if known is None:
            raise UnitError(f"{text!r}: no unit is called {unit!r}; write {hint}")
        if not unit or known[0] == "count":
            raise UnitError(f"{text!r} has no unit; write {hint}")
        raise UnitError(f"{text!r} is a quantity of {known[0]}, which makes no sense here; write {hint}")

    @property
    def number(self) -> float:
        """The value as a float, in the base unit."""
        return float(self.value)

    def __str__(self) -> str:
        """Exact and short: `Quantity.parse` reads it back unchanged."""
        hidden = ("i", "B params") if self.kind in ("bytes", "params") else ()  # read, never written
        units = {n: size for n, size in _UNITS[self.kind].items() if not any(part in n for part in hidden)}
        if self.kind == "share":
            units = {"%": units["%"]}
        units = {n: size for n, size in units.items() if self.value / size * size == self.value}
        texts = [_plain(self.value / units[n]) + n for n in sorted(units, key=lambda n: units[n], reverse=True)]
        return min(texts, key=lambda text: (len(text), "." in text))

    def show(self) -> str:
        """For people: three significant digits and a space before the unit, as in "67.3 MB"."""
        return {
            "bytes": lambda v: show_bytes(v),
            "seconds": lambda v: show_seconds(v),
            "share": lambda v: f"{100 * v:.3g} %",
            "ratio": lambda v: f"{v:.3g}x",
            "joules": lambda v: f"{v:.3g} J",
            "params": lambda v: f"{show_count(v)} params",
            "flops": lambda v: f"{show_count(v)}FLOPs",
            "count": lambda v: show_count(v).strip(),
        }[self.kind](self.number)


def _readings(unit: str) -> list[tuple[Kind, Decimal]]:
    """Every kind that ``unit`` may mean, with its scale: "M" alone is a count; "B" is bytes before it is a billion."""
    unit = _SPELLINGS.get(unit.lower(), unit)
    found: list[tuple[Kind, Decimal]] = []
    for kind, table in _UNITS.items():
        for name, size in table.items():
            if name == "":
                if unit == "" and kind == "count":
                    found.append((kind, size))
            elif unit == name or (_careless(kind) and unit.lower().replace(" ", "") == name.lower().replace(" ", "")):
                found.append((kind, size))
                break
    return found


def _careless(kind: Kind) -> bool:
    """Whether case leaves no doubt: "mb" can only be megabytes here, but "mJ" and "MJ" differ."""
    return kind in ("bytes", "params", "flops", "ratio", "count")


def _positive(value: Decimal, text: str) -> Decimal:
    if value <= 0:
        raise UnitError(f"{text!r} is not above zero; give a positive quantity")
    if value > _LARGEST:
        raise UnitError(f"{text!r} is beyond anything that exists; give a smaller quantity")
    return value


def _plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _examples(expect: tuple[Kind, ...]) -> str:
    words: dict[Kind, str] = {
        "bytes": "35MB or 0.5GiB", "params": "90M", "flops": "200M or 2GFLOPs", "seconds": "20ms or 10min",
        "joules": "2J", "share": "25%", "ratio": "1.10x", "count": "0.9",
    }  # fmt: skip
    return " or ".join(words[kind] for kind in expect) if expect else "a number and a unit, such as 35MB, 25% or 20ms"


def show_bytes(count: float) -> str:
    """``67.3 MB``: three significant digits, decimal units.

    >>> show_bytes(67_286_016), show_bytes(999), show_bytes(999_950)
    ('67.3 MB', '999 B', '1.00 MB')
    """
    return _three_digits(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def show_count(count: float) -> str:
    """``134 M``: three significant digits with k, M, G or T; the caller adds what is counted.

    >>> show_count(134_515_008), show_count(12)
    ('135 M', '12 ')
    """
    return _three_digits(count, ("", "k", "M", "G", "T", "P", "E", "Z"))


def show_seconds(seconds: float) -> str:
    """``12.3 ms``, ``4.56 s``, ``2 min 05 s``, ``1 h 02 min``.

    >>> show_seconds(0.01234), show_seconds(125), show_seconds(3720), show_seconds(59.99)
    ('12.3 ms', '2 min 05 s', '1 h 02 min', '60.0 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:#.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _three_digits(count: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(count) < 999.5:
            break
        count, unit = count / 1000, units[units.index(unit) + 1]
    whole = unit == units[0] and count == int(count)
    return f"{int(count)} {unit}" if whole else f"{count:#.3g} {unit}".replace(". ", " ")


#: resource -> (kinds it is written in, what it is)
RESOURCES: dict[Resource, tuple[tuple[Kind, ...], str]] = {
    "bytes": (("bytes", "share"), "bytes of the written model files"),
    "params": (("params", "share"), "stored parameters"),
    "flops": (("flops", "share"), "FLOPs per token"),
    "kv": (("bytes", "share"), "bytes of the KV cache at full context"),
    "latency": (("seconds", "share"), "time per token on this machine"),
    "memory": (("bytes", "share"), "peak memory when running"),
    "energy": (("joules", "share"), "energy per token"),
}
_RESOURCE_SPELLINGS = {"size": "bytes", "parameters": "params", "flop": "flops", "time": "latency", "ram": "memory"}


#: Plans count in whole units: so many of them make one of the base unit, where that does not come in whole numbers.
_WHOLE = {"latency": 10**9, "energy": 10**12}


def whole(resource: str, value: float) -> int:
    """``value`` of a resource in the whole units of plans: nanoseconds, picojoules, bytes, parameters, FLOPs.

    >>> whole("latency", 0.02), whole("bytes", 35_000_000)
    (20000000, 35000000)
    """
    return int(value * _WHOLE.get(resource, 1))


def base(resource: str, value: int) -> float | int:
    """The base unit again: seconds, joules."""
    return value / _WHOLE[resource] if resource in _WHOLE else value


def show_whole(resource: str, value: int) -> str:
    """For people: whole units exactly where they count, three digits where they are measured.

    >>> show_whole("bytes", 67_257_504), show_whole("latency", 20_300_000)
    ('67,257,504 bytes', '20.3 ms of latency')
    """
    if resource == "latency":
        return f"{show_seconds(value / _WHOLE[resource])} of latency"
    if resource == "energy":
        return f"{value / _WHOLE[resource]:.3g} J of energy"
    return f"{value:,} {'bytes of ' if resource in ('memory', 'kv') else ''}{resource}"


@dataclass(frozen=True)
class Budget:
    """What may be spent at most of one resource.

    Args:
        resource: what is limited; see `RESOURCES`.
        limit: the limit, absolute or (kind "share") relative to the original; for bytes, to its bf16 size.

    >>> Budget.parse("25%").limit_for(269_030_016)
    67257504
    >>> str(Budget.parse("kv<=50MB")), str(Budget.parse("params=90M"))
    ('kv=50MB', 'params=90M params')
    """

    resource: Resource
    limit: Quantity

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "25%", "35MB" (bytes are meant when nothing is named), "kv=50MB", "params=90M" or "latency<=20ms".

        Raises:
            UnitError: an unknown resource or a limit that is not one.
        """
        name, found, value = _split(text)
        if not found:
            name, value = "bytes", text
        if found in (">=", ">", "<"):
            raise UnitError(f"budget {text!r}: a budget is an upper limit; write {name or 'bytes'}={value or '25%'}")
        resource = _RESOURCE_SPELLINGS.get(name.lower(), name.lower()) or "bytes"
        if resource not in RESOURCES:
            if resource in METRICS:
                raise UnitError(f"budget {text!r}: {resource} is a quality; give it as --floor {text!r}")
            raise UnitError(f"budget {text!r}: no resource is called {name!r}; there are {', '.join(RESOURCES)}")
        try:
            return cls(resource, Quantity.parse(value, expect=RESOURCES[resource][0]))
        except UnitError as error:
            raise UnitError(f"budget {text!r}: {error}" if value != text else f"budget {error}") from None

    @property
    def relative(self) -> bool:
        """Whether the limit is a share of what the original costs."""
        return self.limit.kind == "share"

    def limit_for(self, reference: float) -> float | int:
        """The limit in the base unit, rounded down for what comes in whole numbers.

        Args:
            reference: what the original costs in the base unit (for bytes: at bf16); read when `relative`.
        """
        value = self.limit.value * Decimal(reference) if self.relative else self.limit.value
        return float(value) if self.resource in ("latency", "energy") else int(value)

    def __str__(self) -> str:
        return str(self.limit) if self.resource == "bytes" else f"{self.resource}={self.limit}"


#: metric -> (whether lower is better, whether it already compares with the original, what it is)
METRICS: dict[Metric, tuple[bool, bool, str]] = {
    "perplexity": (True, False, "exp of the mean loss per token"),
    "loss": (True, False, "mean loss in nats per token"),
    "kl": (True, True, "mean KL divergence from the original in nats per token"),
    "accuracy": (False, False, "share of right answers"),
    "f1": (False, False, "macro F1"),
    "agreement": (False, True, "share of top-1 predictions that equal the original's"),
    "cosine": (False, True, "mean cosine of the embeddings to the original's"),
}


@dataclass(frozen=True)
class Floor:
    """The least quality that is accepted: a bound on a metric, itself or as a ratio to the original.

    Args:
        metric: see `METRICS`.
        bound: the limit, or (with ``ratio``) the limit over the original's figure.
        ratio: whether the bound is a ratio.

    >>> Floor.parse("perplexity<=1.10x").holds(27.0, reference=25.4)
    True
    >>> str(Floor.parse("cosine >= 0.99"))
    'cosine>=0.99'
    """

    metric: Metric
    bound: float
    ratio: bool

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Read "perplexity<=1.10x", "accuracy>=0.99x", "agreement>=0.9" or "cosine>=99%".

        Raises:
            UnitError: an unknown metric, the wrong direction, or a bound the metric cannot take.
        """
        name, found, value = _split(text)
        metric = {"ppl": "perplexity"}.get(name.lower(), name.lower())
        if metric not in METRICS:
            raise UnitError(
                f"floor {text!r}: no metric is called {name or text!r}; write {Floor.example()} ({', '.join(METRICS)})"
            )
        lower, compares, _ = METRICS[metric]
        sign = "<=" if lower else ">="
        if found != sign:
            better = "lower" if lower else "higher"
            raise UnitError(f"floor {text!r}: {metric} is better {better}; write {metric}{sign}{value or '...'}")
        try:
            quantity = Quantity.parse(value, expect=("ratio", "share", "count"))
        except UnitError as error:
            raise UnitError(f"floor {text!r}: {error}") from None
        ratio, bound = quantity.kind == "ratio", quantity.number
        if ratio and compares:
            raise UnitError(
                f"floor {text!r}: {metric} compares with the original already; write {metric}{sign}{bound:g}"
            )
        if not ratio and not lower and bound > 1:
            raise UnitError(f"floor {text!r}: {metric} is at most 1; write {metric}{sign}0.9 or a ratio like 0.99x")
        if not ratio and metric == "perplexity" and bound < 1:
            raise UnitError(f"floor {text!r}: perplexity is at least 1; write a ratio such as {metric}{sign}1.10x")
        return cls(metric, bound, ratio)

    @staticmethod
    def example() -> str:
        """A floor to show in help and errors."""
        return '"perplexity<=1.10x"'

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is better when lower."""
        return METRICS[self.metric][0]

    def limit_for(self, reference: float | None) -> float:
        """The bound on the figure itself, ``reference`` being the original's figure (read when `ratio`)."""
        if not self.ratio:
            return self.bound
        assert reference is not None, "a ratio needs the original's figure"
        return self.bound * reference

    def holds(self, value: float, reference: float | None = None) -> bool:
        """Whether ``value`` meets the bound; NaN does not."""
        limit = self.limit_for(reference)
        return value <= limit if self.lower_is_better else value >= limit

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if self.lower_is_better else '>='}{self.bound:.6g}{'x' if self.ratio else ''}"


def _split(text: str) -> tuple[str, str, str]:
    """(name, comparison, value); the comparison is empty when there is none."""
    text = " ".join(text.split())  # messages repeat parts of it, and they are one line
    matched = re.fullmatch(r"\s*([^<>=≤≥]*?)\s*(<=|>=|==|=|<|>|≤|≥)\s*(.*?)\s*", text, re.DOTALL)
    if matched is None:
        return text.strip(), "", ""
    name, found, value = matched.groups()
    return name, {"≤": "<=", "≥": ">="}.get(found, found), value


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as "10min".

    Raises:
        UnitError: not a duration.

    >>> parse_seconds("10min")
    600.0
    """
    return Quantity.parse(text, expect=("seconds",)).number
