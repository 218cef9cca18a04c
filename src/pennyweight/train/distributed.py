"""The processes that ``torchrun`` starts: joined on entering, parted on leaving, and nothing at all without it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakMethod

import torch
import torch.distributed as dist

_parting: list[WeakMethod[Callable[[], None]]] = []


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if joined() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if joined() else 1


def joined() -> bool:
    """Whether a process group is there."""
    return dist.is_available() and dist.is_initialized()


def at_parting(release: Callable[[], None]) -> None:
    """Call a method, if its object still lives, before the processes part: it lets go of what holds the group.

    A group that outlives Python itself, in a ``DistributedDataParallel`` that nothing has collected yet, takes its
    process down with SIGABRT now and then, after all work was done.
    """
    _parting.append(WeakMethod(release))


@contextmanager
def processes(backend: str | None = None) -> Iterator[int]:
    """Join the processes of a ``torchrun``; yields the rank (0 alone, without it).

    Args:
        backend: "gloo", "nccl", ...; None for nccl where there is CUDA, else gloo.
    """
    if joined() or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield rank()
        return
    dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
    try:
        yield dist.get_rank()
        dist.barrier()  # who leaves while another still talks to it takes that one's threads down
    finally:
        for method in _parting:
            if (release := method()) is not None:
                release()
        _parting.clear()
        gc.collect()  # its reducers lie in cycles
        dist.destroy_process_group()
