"""The roofline: how fast a job could at best be on this machine.

A job that computes F FLOPs and moves B bytes takes at least ``max(F / peak, B / bandwidth)`` seconds. Source:
S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model for multicore
architectures", 2009. Differs from the source: the roofs are not a data sheet's but measured, a matrix product and a sum
over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any, Literal

import torch

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
        product = _best(lambda: square @ square)
        memory = torch.ones(_MEMORY // 4, dtype=torch.float32)
        reading = _best(memory.sum)
    return Machine(2 * _MATRIX**3 / product, _MEMORY / reading, threads, str(dtype).removeprefix("torch."))


def _best(fn: Callable[[], Any]) -> float:
    """The shortest of a few runs: a roof is what is possible, not what is usual."""
    shortest = float("inf")
    for _ in range(_REPEATS):
        start = perf_counter()
        fn()
        shortest = min(shortest, perf_counter() - start)
    return shortest
