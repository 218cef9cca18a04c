"""Device profiles: what published data sheets say of accelerators, and what was measured of the machine one sits at.

``devices.json`` holds the published ones with their sources: dense figures (without sparsity), one device. A profile
of one's own is a JSON file of the same keys; that of this machine is measured by `pennyweight.measure.tune` and kept in
the cache.

This module imports no torch.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pennyweight.errors import DataError, OptionError

#: What products may be computed in, and the bits of their operands. "fp16" stands for bfloat16 too.
PRECISIONS = {"fp32": 32, "fp16": 16, "fp8": 8, "int8": 8}


@dataclass(frozen=True)
class Timed:
    """A matrix product as it was measured: weights streamed from memory, so that caches hold none of them.

    Attributes:
        precision: of `PRECISIONS`.
        rows: of the input.
        shape: (M, N) of the weight.
        seconds: it took.
    """

    precision: str
    rows: int
    shape: tuple[int, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device can do.

    Attributes:
        name: it is found by.
        source: data sheet, or where and when it was measured.
        flops_per_second: dense peak by precision, see `PRECISIONS`.
        bytes_per_second: of its main memory.
        memory_bytes: of its main memory; None where that is not said.
        buffer_bytes: on the chip, for fused attention; None where that is not said.
        aliases: other names.
        call_seconds: what one call of the framework takes besides; 0 for the data sheet's ideal.
        plain_bytes_per_second: of operations that are no products, as the framework runs them one by one; None for
            ``bytes_per_second``.
        attention_flops_per_second: of fused attention by precision and stage ("fp16 decode": one query, which is far
            from the peak); where one is not there, the peak counts.
        products: measured products; empty for the ideal.
        threads: that it was measured with; None for a data sheet.
    """

    name: str
    source: str
    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    memory_bytes: float | None = None
    buffer_bytes: float | None = None
    aliases: tuple[str, ...] = ()
    call_seconds: float = 0.0
    plain_bytes_per_second: float | None = None
    attention_flops_per_second: Mapping[str, float] = field(default_factory=dict)
    products: tuple[Timed, ...] = field(default=(), repr=False)
    threads: int | None = None

    def __post_init__(self) -> None:
        speeds = (*self.flops_per_second.values(), self.bytes_per_second)
        if not self.flops_per_second or not all(0 < speed < math.inf for speed in speeds):
            raise OptionError(f"device {self.name}: speeds {speeds}; give FLOP/s and bytes/s above 0")
        unknown = sorted(set(self.flops_per_second) - set(PRECISIONS))
        if unknown:
            raise OptionError(f"device {self.name}: precision {unknown[0]!r}; known are {', '.join(PRECISIONS)}")

    @property
    def measured(self) -> bool:
        """Whether it was measured, so that times and not only bounds can be told."""
        return bool(self.products)

    def peak(self, precision: str) -> float:
        """FLOP/s of products in ``precision``, or in the next wider one that it has.

        Raises:
            OptionError: none is as wide.
        """
        wide = [name for name, bits in PRECISIONS.items() if bits > PRECISIONS[precision]]
        for name in (precision, *reversed(wide)):
            if name in self.flops_per_second:
                return self.flops_per_second[name]
        raise OptionError(
            f"device {self.name} computes in {', '.join(self.flops_per_second)}; {precision} is wider than all of them"
        )

    def product_seconds(self, precision: str, rows: float, shape: tuple[int, int]) -> float | None:
        """The time of ``x @ W.T`` read off the measured ones; None where none is of this precision.

        Interpolated in the logarithms of rows and of M, a number of the weight; constant beyond both ends.
        """
        grid: dict[int, dict[int, float]] = {}
        for timed in self.products:
            if timed.precision == precision:
                grid.setdefault(timed.shape[0], {})[timed.rows] = timed.seconds / math.prod(timed.shape) / timed.rows
        if not grid:
            return None
        a_number = _between({tall: _between(curve, rows) for tall, curve in grid.items()}, shape[0])
        return a_number * rows * math.prod(shape)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as a profile's file has it."""
        speeds = {name: dict(getattr(self, name)) for name in ("flops_per_second", "attention_flops_per_second")}
        return asdict(self) | speeds


def _between(curve: Mapping[int, float], at: float) -> float:
    """The value at ``at``, linear in the logarithms of both; that of the nearest end beyond them."""
    known = sorted(curve)
    above = bisect_left(known, at)
    if above == 0 or above == len(known):
        return curve[known[min(above, len(known) - 1)]]
    low, high = known[above - 1], known[above]
    share = math.log(at / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(curve[low]) + share * math.log(curve[high]))


def from_json(found: Any, where: str) -> Device:
    """The inverse of `Device.to_json`.

    Args:
        found: plain data.
        where: it comes from, for messages.

    Raises:
        DataError: not a profile.
        OptionError: speeds that are none.
    """
    try:
        values = dict(found)
        timed = [Timed(one["precision"], one["rows"], tuple(one["shape"]), one["seconds"]) for one in
                 values.pop("products", ())]  # fmt: skip
        flops = {str(name): float(speed) for name, speed in values.pop("flops_per_second").items()}
        attention = {str(name): float(speed) for name, speed in values.pop("attention_flops_per_second", {}).items()}
        aliases = tuple(values.pop("aliases", ()))
        return Device(
            **values, flops_per_second=flops, attention_flops_per_second=attention, aliases=aliases,
            products=tuple(timed),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise DataError(
            f"{where}: no device profile ({type(error).__name__}: {error}); give name, source, flops_per_second by "
            "precision, and bytes_per_second"
        ) from error


@lru_cache(maxsize=1)
def published() -> tuple[Device, ...]:
    """The devices whose data sheets are here."""
    text = (files("pennyweight.measure") / "devices.json").read_text("utf-8")
    return tuple(from_json(one, "devices.json") for one in json.loads(text))


def find(name: str | Path) -> Device:
    """The device called ``name`` (see `published`), or of the profile in a ``.json`` file.

    Raises:
        OptionError: there is none.
        DataError: a file that is no profile.
    """
    path = Path(name)
    if path.suffix == ".json":
        try:
            return from_json(json.loads(path.read_text("utf-8")), str(path))
        except (OSError, ValueError) as error:
            if isinstance(error, (DataError, OptionError)):
                raise
            raise DataError(f"{path}: cannot be read ({error}); give a device profile as JSON") from error
    wanted = str(name).lower().removeprefix("nvidia-")
    for device in published():
        if wanted in (device.name, *device.aliases):
            return device
    names = [name for device in published() for name in (device.name, *device.aliases)]
    near = get_close_matches(wanted, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise OptionError(f"no device is called {str(name)!r}; {hint} Or give `here`, or a profile as a .json file")
