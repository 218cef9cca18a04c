"""A safetensors checkpoint read tensor by tensor: models larger than memory are walked through it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.errors import ModelError
from pennyweight.model.safetensors_file import Entry, Header, read_header, read_tensor
from pennyweight.weights import check_finite

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint:
    """The tensors of a directory, looked up by name; nothing stays open or mapped between reads.

    Args:
        directory: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Attributes:
        files: the safetensors files, in order.

    Raises:
        ModelError: no safetensors there (pickles are never read), or a damaged, truncated or missing shard.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files = self._find()
        self.headers: dict[Path, Header] = {file: read_header(file) for file in self.files}
        self._where: dict[str, tuple[Path, Entry]] = {}
        for file, header in self.headers.items():
            for name, entry in header.entries.items():
                if name in self._where:
                    raise ModelError(f"{file}: tensor {name!r} is in {self._where[name][0].name} as well")
                self._where[name] = (file, entry)
        if not self._where:
            raise ModelError(f"{self.directory}: its safetensors files hold no tensor")

    def _find(self) -> list[Path]:
        if not self.directory.is_dir():
            raise ModelError(f"{self.directory}: no such directory")
        if (self.directory / INDEX).is_file():
            path = self.directory / INDEX
            try:
                names = json.loads(path.read_text("utf-8"))["weight_map"].values()
                shards = sorted({str(name) for name in names})
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ModelError(f"{path}: damaged index ({error}); copy or download it again") from error
            if not shards or any(Path(name).name != name or "\0" in name for name in shards):
                raise ModelError(f"{path}: names no shards, or files outside {self.directory}")
            return [self.directory / name for name in shards]
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        pickles = sorted(file.name for pattern in _PICKLES for file in self.directory.glob(pattern))
        if pickles:
            raise ModelError(
                f"{self.directory}: holds {pickles[0]}, a pickle, which is never loaded (it can run any code); "
                "convert it to safetensors first"
            )
        raise ModelError(f"{self.directory}: holds no {SINGLE} and no {INDEX}")

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def _entry(self, name: str) -> tuple[Path, Entry]:
        if name not in self._where:
            raise ModelError(f"{self.directory}: holds no tensor {name!r}; it has {len(self._where)} others")
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor ``name``."""
        return self._entry(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor ``name`` as stored."""
        return self._entry(name)[1].dtype

    def read(self, name: str) -> Tensor:
        """Tensor ``name``, in memory of its own.

        Raises:
            ModelError: no such tensor, or the file was cut.
            FormError: NaN or infinite values.
        """
        file, entry = self._entry(name)
        tensor = read_tensor(file, entry)
        if tensor.is_floating_point():
            # 8-bit floats cannot be summed
            check_finite(tensor if tensor.dtype.itemsize > 1 else tensor.float(), f"{file}: {name}")
        return tensor
