"""The processes that ``torchrun`` starts: joined on entering, parted on leaving, and nothing at all without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if joined() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if joined() else 1


def joined() -> bool:
    """Whether a process group is there."""
    return dist.is_available() and dist.is_initialized()


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
        dist.destroy_process_group()
