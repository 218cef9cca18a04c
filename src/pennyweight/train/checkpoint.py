"""Checkpoints of a training run: ``state.safetensors`` and ``state.json``, which together resume it bit for bit.

Held are the state dicts of module and optimizer, the callbacks', how far training has come, and torch's random numbers
in each process. Floats in the JSON are written with all their digits. Nothing is pickled. What processes share is put
together first and dealt out again afterwards, so that a checkpoint does not know how many there were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pennyweight.errors import ModelError, OptionError, OutputError
from pennyweight.model import safetensors_file
from pennyweight.safe_write import staged
from pennyweight.train.distributed import dealt_like, rank, whole, world

_TENSORS, _PLAIN = "state.safetensors", "state.json"
_FORMAT = 1


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


def save(
    directory: Path, module: nn.Module, optimizer: Optimizer, callbacks: Sequence[object], place: Mapping[str, int]
) -> None:
    """See `Trainer.save`."""
    random = _random_states(module)
    weights, moments = whole(module.state_dict()), whole(optimizer.state_dict())  # all take part in this
    failure: Exception | None = None
    if rank() == 0:
        try:
            _write(directory, weights, moments, callbacks, place, random)
        except (OptionError, ModelError, OutputError) as error:
            failure = error
    if world() > 1:  # so that the others neither run ahead of a checkpoint nor wait for ever for one that failed
        failed = torch.tensor(float(failure is not None), device=_exchange_device(module))
        dist.all_reduce(failed)
        if failed and failure is None:
            raise OutputError(f"{directory}: the first process could not write the checkpoint; see its message")
    if failure is not None:
        raise failure


def _write(
    directory: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Any],
    callbacks: Sequence[object],
    place: Mapping[str, int],
    random: Mapping[str, Tensor],
) -> None:
    held = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    if strange := sorted(held - {_TENSORS, _PLAIN}):
        raise OutputError(f"{directory}: holds {strange[0]}, which is no checkpoint's; give a directory of its own")
    tensors = {f"module.{name}": tensor for name, tensor in weights.items()} | dict(random)
    plain = {
        "format": _FORMAT,
        "processes": world(),
        **place,
        "optimizer": _plain(moments, "optimizer", tensors),
        "callbacks": [
            _plain(callback.state_dict(), f"callbacks.{index}", tensors) if isinstance(callback, _Stateful) else None
            for index, callback in enumerate(callbacks)
        ],
    }
    with staged(directory, overwrite=True) as aside:
        safetensors_file.write(aside / _TENSORS, tensors)
        (aside / _PLAIN).write_text(json.dumps(plain, indent=1), "utf-8")


def load(
    directory: Path, module: nn.Module, optimizer: Optimizer, callbacks: Sequence[object], *, exact: bool
) -> dict[str, int]:
    """See `Trainer.resume`; returns the place."""
    plain, tensors = _read(directory)
    if exact and plain["processes"] != world():
        raise ModelError(
            f"{directory}: the checkpoint of {plain['processes']} processes, and {world()} here; start as many, or "
            "resume with exact=False"
        )
    if len(plain["callbacks"]) != len(callbacks):
        raise ModelError(f"{directory}: holds {len(plain['callbacks'])} callbacks, and there are {len(callbacks)}")
    weights = {name.removeprefix("module."): found for name, found in tensors.items() if name.startswith("module.")}
    here = module.state_dict()
    _check_fits(directory, weights, here)
    state = _restored(plain["optimizer"], tensors)
    # JSON has no tuples, and knows names only
    state["state"] = {int(index): found for index, found in state["state"].items()}
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        group.update({name: tuple(value) for name, value in group.items() if isinstance(own.get(name), tuple)})
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, weight in enumerate(trained):
        for name, held in state["state"].get(index, {}).items():
            if isinstance(held, Tensor):
                state["state"][index][name] = dealt_like(held, weight)
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise ModelError(f"{directory}: the checkpoint of another optimizer ({error})") from error
    module.load_state_dict({name: dealt_like(tensor, here[name]) for name, tensor in weights.items()})
    for callback, found in zip(callbacks, plain["callbacks"], strict=True):
        if isinstance(callback, _Stateful) and found is not None:
            callback.load_state_dict(_restored(found, tensors))
    _set_random_state(tensors, module)
    return {name: int(plain[name]) for name in ("steps", "samples", "tokens")}


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        plain = json.loads((directory / _PLAIN).read_text("utf-8"))
        if plain["format"] != _FORMAT:
            raise ModelError(f"{directory}: a checkpoint of format {plain['format']}; this version reads {_FORMAT}")
        for name, kind in (("processes", int), ("steps", int), ("samples", int), ("tokens", int), ("callbacks", list)):
            if not isinstance(plain[name], kind):
                raise TypeError(f"{name} is {plain[name]!r}")
    except FileNotFoundError as error:
        raise ModelError(f"{directory}: no checkpoint there; give a directory that Trainer.save wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{directory / _PLAIN}: cannot be read as a checkpoint ({error!r})") from error
    path = directory / _TENSORS
    header = safetensors_file.read_header(path)
    return plain, {name: safetensors_file.read_tensor(path, entry) for name, entry in header.entries.items()}


def _check_fits(directory: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        held, here = (
            f"{side[name].dtype} {tuple(side[name].shape)}" if name in side else "nothing" for side in (found, wanted)
        )
        if held != here:
            raise ModelError(f"{directory}: holds {held} for {name}, and the model has {here}; make it as it was")


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON has it, its tensors put into ``tensors`` and named."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {str(key): _plain(found, f"{name}.{key}", tensors) for key, found in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(found, f"{name}.{index}", tensors) for index, found in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise OptionError(
        f"checkpoint: {name} is a {type(value).__name__}; only tensors, numbers, texts and lists are saved"
    )


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _restored(found, tensors) for key, found in value.items()}
    return [_restored(found, tensors) for found in value] if isinstance(value, list) else value


def _exchange_device(module: nn.Module) -> torch.device:
    """Where the processes' backend can sum: gloo on the CPU, nccl on the module's device."""
    device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
    return device if dist.get_backend() == "nccl" else torch.device("cpu")


def _generators(module: nn.Module) -> dict[str, torch.Generator]:
    found = {"cpu": torch.default_generator}
    for device in sorted({weight.device.index for weight in module.parameters() if weight.device.type == "cuda"}):
        found["cuda"] = torch.cuda.default_generators[device]
    return found


def _random_states(module: nn.Module) -> dict[str, Tensor]:
    """The states of torch's generators in every process, by name."""
    found = {}
    for kind, generator in _generators(module).items():
        state = generator.get_state()
        if world() == 1:
            found[f"random.{kind}.0"] = state
            continue
        here = state.to(_exchange_device(module))
        states = [torch.empty_like(here) for _ in range(world())]
        dist.all_gather(states, here)
        found |= {f"random.{kind}.{index}": other.cpu() for index, other in enumerate(states)}
    return found


def _set_random_state(tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    for kind, generator in _generators(module).items():
        state = tensors.get(f"random.{kind}.{rank()}")
        if state is not None:  # another number of processes, or another device: allowed by exact=False alone
            generator.set_state(state)
