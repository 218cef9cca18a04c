"""The processes that ``torchrun`` starts: joined on entering, parted on leaving, and nothing at all without it.

Each holds the whole model (``DistributedDataParallel``) unless `sharded` deals its parameters out among them (FSDP2:
``torch.distributed.fsdp.fully_shard``).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def sharded(module: nn.Module) -> nn.Module:
    """Deal out the parameters of ``module`` among the processes, block by block; alone it stays as it is.

    Each process keeps its share of every weight, gradient and moment; a block is put together while it computes. Do it
    before the optimizer is made, for parameters become others (``DTensor``). `whole` puts them together.

    Returns:
        The module itself.
    """
    if world() > 1:
        from torch.distributed.fsdp import fully_shard

        for part in module.modules():
            if isinstance(part, nn.ModuleList):
                for block in part:
                    fully_shard(block)
        fully_shard(module)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether `sharded`, or ``fully_shard``, has dealt out this module."""
    if world() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict, nested ones too, with its sharded tensors put together. All processes call it, all get all."""
    return {name: _whole(value) for name, value in state.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _whole(found) for name, found in value.items()}
    if isinstance(value, Tensor) and world() > 1:
        from torch.distributed.tensor import DTensor

        return value.full_tensor().detach() if isinstance(value, DTensor) else value
    return value


def dealt_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, dealt out as ``like`` is; itself where ``like`` is whole or of another shape."""
    if world() == 1 or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
