"""What a merge reads: the tensors of a model by name, a stretch of elements at a time, as float32.

A source never holds more than what is asked for, so that a model of any size is walked through a few megabytes; it may
be read by several threads at once.

Shape letters: n elements of a stretch, M out features, N in features, R rank.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pennyweight.errors import ModelError
from pennyweight.model.checkpoint import Checkpoint
from pennyweight.model.safetensors_file import Entry, read_header, read_tensor


class Source(Protocol):
    """Tensors by name, read in stretches of their elements in row-major order."""

    @property
    def label(self) -> str:
        """What errors call it."""
        ...

    def kinds(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor."""
        ...

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Elements ``start`` to ``start + n`` of tensor ``name`` into ``out`` (n,) float32."""
        ...

    def close(self) -> None:
        """Let go of open files; reading opens them again."""
        ...


class Shards:
    """The safetensors of a directory, read by offset: nothing is mapped, and how they are sharded does not matter.

    Raises:
        ModelError: see `Checkpoint`; or a directory whose weights are compact, which no sum of elements can merge.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        disk = Checkpoint(self.directory)
        self._where: dict[str, tuple[Path, Entry]] = {
            name: (file, entry) for file, header in disk.headers.items() for name, entry in header.entries.items()
        }
        layout = self.directory / "weights.json"
        try:
            compact = layout.is_file() and json.loads(layout.read_text("utf-8")).get("layers")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{layout}: damaged ({error}); copy or download it again") from None
        if compact:
            raise ModelError(f"{self.directory}: holds compact weights; merge first and fit then, or save it dense")
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._mine = threading.local()

    @property
    def label(self) -> str:
        return str(self.directory)

    def kinds(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (entry.dtype, entry.shape) for name, (_, entry) in self._where.items()}

    def read(self, name: str, start: int, out: Tensor) -> None:
        file, entry = self._where[name]
        at = entry.start + start * entry.dtype.itemsize
        if entry.dtype == torch.float32:
            self._fill(file, at, out)
            return
        raw = self._scratch(len(out) * entry.dtype.itemsize)
        self._fill(file, at, raw)
        out.copy_(raw.view(entry.dtype))

    def raw(self, name: str, start: int, out: Tensor) -> None:
        """Bytes ``start`` on of tensor ``name`` into ``out`` (n,) uint8, as they are stored."""
        file, entry = self._where[name]
        self._fill(file, entry.start + start, out)

    def _scratch(self, size: int) -> Tensor:
        held: Tensor | None = getattr(self._mine, "buffer", None)
        if held is None or len(held) < size:
            held = self._mine.buffer = torch.empty(size, dtype=torch.uint8)
        return held[:size]

    def _fill(self, file: Path, at: int, out: Tensor) -> None:
        view, done = out.view(torch.uint8).numpy().data, 0
        try:
            descriptor = self._descriptor(file)
            while done < len(view) and (count := os.preadv(descriptor, [view[done:]], at + done)):
                done += count
        except OSError as error:
            raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from error
        if done < len(view):
            raise ModelError(f"{file}: truncated while being read, {len(view) - done} bytes are missing")

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self._open[file]

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


class Memory:
    """Tensors that are in memory already, such as a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "the given tensors") -> None:
        self.tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        self.label = label

    def kinds(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self.tensors[name].view(-1)[start : start + len(out)])

    def close(self) -> None:
        """Nothing is open."""


class Adapter:
    """A model and a LoRA adapter of the ``peft`` format on it, its products made row by row as they are read.

    Args:
        base: the model that the adapter was trained on.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ModelError: no such adapter, one that is not plain LoRA on linear maps, or one of another model.
    """

    def __init__(self, base: Source, directory: str | Path) -> None:
        self.base, self.directory = base, Path(directory)
        place = self.directory / "adapter_config.json"
        try:
            config = json.loads(place.read_text("utf-8"))
            self._alpha = float(config["lora_alpha"]) if config.get("peft_type") == "LORA" else 0.0
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{place}: cannot be read ({error}); give the directory that peft saved") from error
        unusual = [key for key in ("use_dora", "fan_in_fan_out", "lora_bias", "alpha_pattern") if config.get(key)]
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unusual:
            found = unusual or [str(config.get("peft_type")), f"bias {config.get('bias')}"]
            raise ModelError(f"{place}: only plain LoRA can be merged, this has {', '.join(found)}; merge it with peft")
        self._rank_power = 0.5 if config.get("use_rslora") else 1.0  # rank-stabilized: alpha / sqrt(R)
        tensors = _all(self.directory / "adapter_model.safetensors")
        kinds = base.kinds()
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, down in tensors.items():
            if not name.endswith(".lora_A.weight"):
                if name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in tensors:
                    continue
                raise ModelError(f"{self.directory}: {name} is no LoRA factor; merge it with peft")
            stem = name.removesuffix(".lora_A.weight")
            up, target = tensors.get(f"{stem}.lora_B.weight"), stem.removeprefix("base_model.model.") + ".weight"
            fits = up is not None and up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0] > 0
            if up is None or not fits or target not in kinds or kinds[target][1] != (up.shape[0], down.shape[1]):
                raise ModelError(f"{self.directory}: {name} fits no map of {base.label}; give the model it was made on")
            self._pairs[target] = (up, down)

    @property
    def label(self) -> str:
        return str(self.directory)

    def kinds(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self.base.kinds()

    def read(self, name: str, start: int, out: Tensor) -> None:
        self.base.read(name, start, out)
        if name in self._pairs:
            up, down = self._pairs[name]  # (M, R), (R, N)
            width, end = down.shape[1], start + len(out)
            first, last = start // width, -(-end // width)
            scale = self._alpha / down.shape[0] ** self._rank_power
            added = (up[first:last] @ down).mul_(scale).view(-1)
            out += added[start - first * width : end - first * width]

    def close(self) -> None:
        self.base.close()


def _all(file: Path) -> dict[str, Tensor]:
    return {name: read_tensor(file, entry).float() for name, entry in read_header(file).entries.items()}
