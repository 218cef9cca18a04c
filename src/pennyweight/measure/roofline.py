"""The roofline: how fast a job could at best be, on this machine or on one whose data sheet is known.

A job that computes F FLOPs and moves B bytes takes at least ``max(F / peak, B / bandwidth)`` seconds. Source:
S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model for multicore
architectures", 2009. Differs from the source: of `this_machine` the roofs are measured, a matrix product and a sum over
memory.

`roofline` (row 227) bounds every operation of a model so (`pennyweight.measure.operations`); of a device that
`pennyweight.measure.tune` has measured it also predicts the time: products as they were timed there, and what the
framework takes for each call and for what it moves between products.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from pennyweight.errors import OptionError
from pennyweight.measure import calls
from pennyweight.measure.devices import PRECISIONS, Device
from pennyweight.measure.operations import Operation, Pass, Skeleton, Stage, Widths, operations, skeleton
from pennyweight.model.model import Model
from pennyweight.units import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from rich.table import Table

_MATRIX = 1024
_MEMORY = 2**28  # bytes read: far more than caches hold
_REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """What a machine can do at best.

    Attributes:
        flops_per_second: of a large matrix product.
        bytes_per_second: read from memory.
        threads: that torch computed with.
        dtype: of the product.
    """

    flops_per_second: float
    bytes_per_second: float
    threads: int
    dtype: str

    @property
    def balance(self) -> float:
        """FLOPs a byte above which a job is bound by computing."""
        return self.flops_per_second / self.bytes_per_second


@dataclass(frozen=True)
class Bound:
    """The least time a job can take.

    Attributes:
        seconds: of the slower roof.
        limit: which roof that is.
        intensity: FLOPs a byte.
    """

    seconds: float
    limit: Literal["compute", "memory"]
    intensity: float


def bound(flops: float, moved_bytes: float, machine: Machine) -> Bound:
    """The bound of a job of ``flops`` FLOPs that moves ``moved_bytes`` bytes."""
    computing, moving = flops / machine.flops_per_second, moved_bytes / machine.bytes_per_second
    return Bound(
        max(computing, moving),
        "compute" if computing >= moving else "memory",
        flops / moved_bytes if moved_bytes else float("inf"),
    )


def this_machine(dtype: torch.dtype = torch.float32) -> Machine:
    """The roofs of this machine, measured once a process for each number of threads (some 0.3 s)."""
    return _measured(dtype, torch.get_num_threads())


@lru_cache(maxsize=8)
def _measured(dtype: torch.dtype, threads: int) -> Machine:
    with torch.no_grad():
        square = torch.ones(_MATRIX, _MATRIX, dtype=dtype)
        product = best(lambda: square @ square)
        memory = torch.ones(_MEMORY // 4, dtype=torch.float32)
        reading = best(memory.sum)
    return Machine(2 * _MATRIX**3 / product, _MEMORY / reading, threads, str(dtype).removeprefix("torch."))


def best(fn: Callable[[], Any], *, repeats: int = _REPEATS) -> float:
    """The seconds of the shortest of a few runs: a roof is what is possible, not what is usual."""
    shortest = float("inf")
    for _ in range(repeats):
        start = perf_counter()
        fn()
        shortest = min(shortest, perf_counter() - start)
    return shortest


@dataclass(frozen=True)
class Bounded:
    """An operation on a device.

    Attributes:
        operation: what it computes and moves.
        bound: the least time it takes there.
        seconds: predicted where the device was measured, else that of the bound.
    """

    operation: Operation
    bound: Bound
    seconds: float


@dataclass(frozen=True)
class Roofline:
    """A pass of a model on a device.

    Attributes:
        model: its name.
        device: what it runs on.
        one: the pass.
        precision: that products are computed in.
        rows: every operation, in the order of the model's layers.
        framework_seconds: of calls and of what they move between products; 0 for a data sheet.
        weight_bytes: of all weights at the widths of the pass.
        cache_bytes: after its context, of all sequences.
    """

    model: str
    device: Device
    one: Pass
    precision: str
    rows: tuple[Bounded, ...]
    framework_seconds: float
    weight_bytes: float
    cache_bytes: float

    @property
    def flops(self) -> float:
        """Of all operations."""
        return sum(row.operation.flops for row in self.rows)

    @property
    def moved(self) -> float:
        """Bytes of all operations."""
        return sum(row.operation.moved for row in self.rows)

    @property
    def bound_seconds(self) -> float:
        """The sum of the bounds: operations run one after the other."""
        return sum(row.bound.seconds for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """What it will take; None for a device that was not measured."""
        return sum(row.seconds for row in self.rows) + self.framework_seconds if self.device.measured else None

    @property
    def activation_bytes(self) -> float:
        """The largest inputs and outputs of one operation together: what must be held besides weights and cache."""
        return max(row.operation.read + row.operation.written for row in self.rows)

    @property
    def memory_bytes(self) -> float:
        """Weights, cache and activations."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data, an operation a line."""
        found = []
        for row in self.rows:
            bounds = {"bound": row.bound.limit, "bound_seconds": row.bound.seconds, "seconds": row.seconds}
            found.append({**vars(row.operation), "moved": row.operation.moved, **bounds})
        totals: dict[str, float | None] = {
            "flops": self.flops,
            "bytes": self.moved,
            "bound_seconds": self.bound_seconds,
        }
        totals |= {"seconds": self.seconds, "framework_seconds": self.framework_seconds}
        memory = {"weights": self.weight_bytes, "cache": self.cache_bytes, "activations": self.activation_bytes}
        setting: dict[str, Any] = {"stage": self.one.stage, "batch": self.one.batch, "context": self.one.context}
        setting |= {"widths": vars(self.one.widths), "precision": self.precision}
        device = {"name": self.device.name, "source": self.device.source}
        return {
            "model": self.model, "device": device, "setting": setting, "totals": totals, "memory": memory,
            "operations": found,
        }  # fmt: skip

    def table(self) -> Table:
        """A rich table, operations of one role in all blocks together."""
        from pennyweight.measure.figures import plain_table

        by_role: dict[str, list[Bounded]] = {}
        for row in self.rows:
            by_role.setdefault(re.sub(r"\[\d+\]", "", row.operation.role), []).append(row)
        lines: list[tuple[str, ...]] = [_line(role, rows) for role, rows in by_role.items()]
        if self.framework_seconds:
            lines.append(("between products", "", "", "", "", "", "", show_seconds(self.framework_seconds)))
        took = self.seconds if self.seconds is not None else self.bound_seconds
        lines.append((
            "all", str(len(self.rows)), show_count(self.flops), show_bytes(self.moved),
            f"{self.flops / self.moved:.4g}", "", show_seconds(self.bound_seconds), show_seconds(took),
        ))  # fmt: skip
        lines.append(("memory", "", "", show_bytes(self.memory_bytes), "", "", "", ""))
        one = self.one
        title = f"{self.model} on {self.device.name} ({self.precision}): {one.stage}, batch {one.batch}"
        header: tuple[str, ...] = ("", "times", "FLOPs", "moved", "FLOPs/byte", "bound by", "at least", "predicted")
        if self.seconds is None:
            header, lines = header[:-1], [line[:-1] for line in lines]
        return plain_table(f"{title}, context {one.context}", header, lines)


def _line(role: str, rows: list[Bounded]) -> tuple[str, ...]:
    flops, moved = (sum(getattr(row.operation, name) for row in rows) for name in ("flops", "moved"))
    limits = sorted({row.bound.limit for row in rows})
    return (
        role, str(len(rows)), show_count(flops), show_bytes(moved), f"{flops / moved:.4g}" if moved else "",
        " and ".join(limits), show_seconds(sum(row.bound.seconds for row in rows)),
        show_seconds(sum(row.seconds for row in rows)),
    )  # fmt: skip


def widths(text: str) -> Widths:
    """Bits from words such as "w4a16", "w4a16kv8", "fp16" or "int8"; a part left out is as the model has it.

    Raises:
        OptionError: other words.
    """
    if text in PRECISIONS:
        return Widths(PRECISIONS[text], PRECISIONS[text], PRECISIONS[text])
    found = re.fullmatch(r"(?:w(?P<w>[\d.]+))?(?:a(?P<a>[\d.]+))?(?:kv(?P<kv>[\d.]+))?", text)
    if not text or found is None:
        raise OptionError(f"precision {text!r}; give bits as w4a16 or w4a16kv8, or one of {', '.join(PRECISIONS)}")
    return Widths(*(float(part) if part else None for part in found.group("w", "a", "kv")))


def roofline(
    model: Model | nn.Module | Skeleton,
    *,
    device: Device | str | Path,
    stage: Stage = "decode",
    batch: int = 1,
    context: int = 512,
    precision: Widths | str | None = None,
    fused: bool | None = None,
    compat: bool = False,
) -> Roofline:
    """Every operation of one pass of ``model`` on ``device``: FLOPs, bytes, what bounds it, and how long it takes.

    Args:
        model: dense or compact, on any device; `operations.bare` makes one of a configuration alone. What
            `operations.skeleton` read of it serves for many passes on data sheets; a measured device needs the model.
        device: see `devices.find`; "here" is this machine as `tune` measured it.
        stage: "prefill" reads ``context`` tokens of each sequence, "decode" one that sees as many.
        batch: sequences, or images.
        context: tokens.
        precision: see `widths`; None for what the model has.
        fused: whether attention keeps its scores on the chip; None where the device was measured, as torch does.
        compat: count as LLM-Viewer does, see `operations`.

    Raises:
        OptionError: no such device, or settings that are none.
        ModelError: a model that cannot be run or decoded with.
    """
    from pennyweight.measure import tune

    there = device if isinstance(device, Device) else tune.find(device)
    found = model if isinstance(model, Skeleton) else skeleton(model)
    bits = precision if isinstance(precision, Widths) else Widths() if precision is None else widths(precision)
    one = Pass(stage, batch, context, bits, there.measured if fused is None else fused, there.buffer_bytes, compat)
    kind = _precision(found, bits)
    rows = tuple(_bounded(operation, there, kind, stage) for operation in operations(found, one))
    framework = 0.0
    if there.measured:
        if isinstance(model, Skeleton):
            raise OptionError(f"roofline: {there.name} was measured; give the model itself, its calls are counted")
        framework = _framework(model.module if isinstance(model, Model) else model, there, one)
    prompt = Pass("prefill", batch, context, bits, fused=True)
    written = sum(operation.cache_written for operation in operations(found, prompt))
    counted = bits.weights is None
    weights = found.costs.bytes if counted else found.costs.params_dense * (bits.weights or 0) / 8
    kept = batch * found.costs.kv_bytes(context) if bits.cache is None and bits.activations is None else written
    return Roofline(found.name, there, one, kind, rows, framework, weights, kept)


def _precision(found: Skeleton, bits: Widths) -> str:
    """What products are computed in: in bytes only where weights, inputs and cache all fit into them."""
    inputs = bits.activations or found.bits
    stored = (bits.weights or found.bits, inputs, bits.cache or inputs)
    return "int8" if max(stored) <= 8 else "fp16" if inputs <= 16 else "fp32"


def _bounded(operation: Operation, device: Device, precision: str, stage: Stage) -> Bounded:
    machine = Machine(device.peak(precision), device.bytes_per_second, device.threads or 0, precision)
    least = bound(operation.flops, operation.moved, machine)
    if not device.measured:
        return Bounded(operation, least, least.seconds)
    if operation.rows:
        timed = device.product_seconds(precision, operation.rows, operation.shape)
        return Bounded(operation, least, least.seconds if timed is None else timed)
    if operation.role == "attention.fused":
        speed = device.attention_flops_per_second.get(f"{precision} {stage}", machine.flops_per_second)
        computing = operation.flops / speed
        return Bounded(operation, least, max(computing, operation.moved / device.bytes_per_second))
    return Bounded(operation, least, 0.0)  # counted call by call, as the framework runs it


def _framework(module: nn.Module, device: Device, one: Pass) -> float:
    speed = device.plain_bytes_per_second or device.bytes_per_second
    if one.stage == "decode":
        found = calls.decode(module)
        moved = found.moved(one.batch, one.batch * one.context)
    else:
        found = calls.prefill(module)
        moved = found.moved(one.batch * one.context, 0)
    return found.count * device.call_seconds + moved / speed
