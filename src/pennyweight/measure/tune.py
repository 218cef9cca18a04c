"""This machine as a device: its roofs, and what products, calls and everything between them take here.

Everything is measured on matrices and a toy model made for it, never on a model whose time is predicted: products of
several shapes with weights streamed from memory, the time of one call of the framework (a model so narrow that nothing
else counts), plain operations, and fused attention. Kept in the cache, for each number of threads.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pennyweight.errors import OptionError
from pennyweight.measure import calls, decoding, devices, roofline
from pennyweight.measure.devices import Device, Timed
from pennyweight.model import assets
from pennyweight.safe_write import write_text

HERE = "here"
_DTYPES = {"fp32": torch.float32, "fp16": torch.bfloat16}
_INPUTS = 768
_TALL = (256, 1024, 16384)  # M: heads of keys, maps in a block, and a vocabulary behave differently
_ROWS = (1, 4, 16, 64, 256)
_STREAMED = 128 * 10**6  # bytes of weights a pass: more than caches hold
_WORK = 4 * 10**9  # FLOPs a pass at most
_LARGE = 10**6  # rows times M: larger products are only more of the same
_ROUNDS = 7
_SEEN = 256  # positions that attention is timed with
_ATTENTION = {
    f"{kind} {stage}": (dtype, queries)
    for kind, dtype in _DTYPES.items()
    for stage, queries in (("prefill", _SEEN), ("decode", 1))
}


@dataclass(frozen=True)
class Point:
    """A product to be timed: (rows, N) with a (``tall``, N) weight in precision ``kind``."""

    kind: str
    tall: int
    rows: int

    @property
    def numbers(self) -> int:
        """Of the weight."""
        return self.tall * _INPUTS

    @property
    def bytes(self) -> int:
        """Of the weight."""
        return self.numbers * _DTYPES[self.kind].itemsize


def find(name: str | Path) -> Device:
    """`devices.find`, and "here": this machine as it was measured, with as many threads as torch now uses.

    Raises:
        OptionError: none of that name; for "here", nothing measured yet.
    """
    if str(name) != HERE:
        return devices.find(name)
    path = place()
    if not path.is_file():
        raise OptionError(
            f"this machine has not been measured with {torch.get_num_threads()} threads; run `pennyweight tune` once"
        )
    return devices.find(path)


def place() -> Path:
    """Where the profile of this machine is kept: by its name, torch's version and threads."""
    return assets.cache() / "devices" / f"{platform.node()}-torch{torch.__version__}-{torch.get_num_threads()}.json"


def tune(*, report: Callable[[str, int, int], None] | None = None, keep: bool = True) -> Device:
    """Measure this machine (some 20 s) and keep its profile in the cache.

    Args:
        report: called with what is measured, rounds done, and how many there are.
        keep: whether to write it to `place`.

    Raises:
        OutputError: the cache cannot be written.
    """
    tuning = Tuning()
    for done in range(_ROUNDS):
        if report:
            report("measuring this machine", done, _ROUNDS)
        tuning.measure()
    if report:
        report("measuring this machine", _ROUNDS, _ROUNDS)
    found = tuning.device()
    if keep:
        path = place()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found.to_json(), indent=1) + "\n")
    return found


class Tuning:
    """Rounds of measurements, and the device that they show: medians over rounds, but roofs by the best of them.

    Rounds may lie far apart, so that another program's minute does not become a figure.
    """

    def __init__(self) -> None:
        self._products: dict[Point, list[float]] = {}
        self._others: list[tuple[float, float]] = []
        self._attention: list[dict[str, float]] = []

    def measure(self) -> None:
        """One more round."""
        for kind, dtype in _DTYPES.items():
            store = torch.full((_STREAMED // dtype.itemsize,), 0.01, dtype=dtype)
            for tall in _TALL:
                for rows in _ROWS:
                    if tall * rows < _LARGE:
                        point = Point(kind, tall, rows)
                        self._products.setdefault(point, []).append(_product(store, point))
        self._others.append(_between())
        self._attention.append({name: _attention(*setting) for name, setting in _ATTENTION.items()})

    def device(self) -> Device:
        """What the rounds so far show."""
        call, plain = (median(values) for values in zip(*self._others, strict=True))
        machines = {kind: roofline.this_machine(dtype) for kind, dtype in _DTYPES.items()}
        shortest = {point: min(seconds) for point, seconds in self._products.items()}
        moved = [point.bytes / seconds for point, seconds in shortest.items()]
        computed = {
            kind: [2 * p.rows * p.numbers / seconds for p, seconds in shortest.items() if p.kind == kind]
            for kind in _DTYPES
        }
        threads = torch.get_num_threads()
        return Device(
            name=HERE,
            source=f"measured {datetime.now(UTC).date()} with torch {torch.__version__} on {threads} threads",
            flops_per_second={kind: max(machines[kind].flops_per_second, *computed[kind]) for kind in _DTYPES},
            bytes_per_second=max(*(machine.bytes_per_second for machine in machines.values()), *moved),
            memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
            call_seconds=call,
            plain_bytes_per_second=1 / plain,
            attention_flops_per_second={
                name: 1 / median(seconds[name] for seconds in self._attention) for name in _ATTENTION
            },
            products=tuple(
                Timed(point.kind, point.rows, (point.tall, _INPUTS), median(seconds))
                for point, seconds in self._products.items()
            ),
            threads=threads,
        )


@torch.no_grad()
def _product(store: Tensor, point: Point) -> float:
    """Seconds of one product, its weights streamed from ``store``."""
    count = max(1, min(len(store) // point.numbers, _WORK // (2 * point.numbers * point.rows)))
    weights = store[: count * point.numbers].view(count, point.tall, _INPUTS).unbind()
    x = torch.ones(point.rows, _INPUTS, dtype=store.dtype)

    def stream() -> None:
        for weight in weights:
            functional.linear(x, weight)

    functional.linear(x, weights[0])
    return roofline.best(stream, repeats=1) / count


@torch.no_grad()
def _between() -> tuple[float, float]:
    """Seconds of a call, and of a byte that plain operations move."""
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=12, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=64,
    )  # fmt: skip
    toy = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    prompt = torch.arange(16)
    decoded = decoding.greedy(toy, prompt, tokens=24).decode
    call = decoded / calls.decode(toy).count
    norm, x = LlamaRMSNorm(_INPUTS), torch.ones(256, _INPUTS)

    def plain() -> Tensor:
        y: Tensor = norm(x)
        return x + functional.silu(y) * y

    count, moved, _ = calls.counted(plain)
    plain()
    seconds = roofline.best(plain, repeats=2) - count * call / 4  # alone, a call is cheaper than in a model
    return call, max(seconds, 1e-6) / moved


@torch.no_grad()
def _attention(dtype: torch.dtype, queries: int) -> float:
    """Seconds of a FLOP of fused attention: of all of a prompt, or of one token to all before it."""
    heads = torch.ones(1, 8, _SEEN, 64, dtype=dtype)
    asking = heads[:, :, -queries:]

    def attend() -> Tensor:
        return functional.scaled_dot_product_attention(asking, heads, heads, is_causal=queries == _SEEN)

    pairs = _SEEN * (_SEEN + 1) / 2 if queries == _SEEN else _SEEN
    return roofline.best(attend, repeats=4) / (4 * 8 * 64 * pairs)
