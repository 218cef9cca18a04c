"""Reading GGUF files: metadata and tensors, every count and offset checked against the file.

Source: the GGUF specification of the ggml project (versions 2 and 3, little endian). Values of quantized tensors come
from ``gguf.quants.dequantize``, the format's own reference. This reader exists beside ``gguf.GGUFReader`` because a
damaged file must end in one clear line, never in a huge allocation or an index error, and because it is several times
faster on long token lists.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import ModelError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, its shape (outermost first), and where its bytes lie."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


class _Cursor:
    """Reads forward through the bytes; running off the end is an EOFError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise EOFError(f"{size} bytes wanted at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("<I"), self.scalar("<Q")
            if inner == _STRING:
                if count > (len(self.data) - self.at) // 8:  # each string takes at least its length
                    raise EOFError(f"an array of {count} strings")
                return [self.string() for _ in range(count)]
            if inner not in _SCALARS:
                raise ValueError(f"array of unknown type {inner}")
            return np.frombuffer(self.take(count * struct.calcsize(_SCALARS[inner])), _SCALARS[inner]).tolist()
        if kind not in _SCALARS:
            raise ValueError(f"value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])


class GgufFile:
    """An open GGUF file.

    Args:
        path: the file.

    Attributes:
        metadata: every key with its value.
        entries: every tensor by name.

    Raises:
        ModelError: not a GGUF file, truncated, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"{self.path}: cannot be read as GGUF ({error}); give a .gguf file") from error
        try:
            self.metadata, self.entries = self._parse()
        except (EOFError, ValueError, KeyError, struct.error, OverflowError) as error:
            raise ModelError(f"{self.path}: damaged or truncated GGUF ({error}); download it again") from error

    def _parse(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        cursor = _Cursor(self._data)
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version}; versions 2 and 3, little endian, are read")
        tensors, keys = cursor.scalar("<Q"), cursor.scalar("<Q")
        metadata = {}
        for _ in range(keys):  # ends at the end of the file at the latest: every turn takes bytes
            name = cursor.string()
            metadata[name] = cursor.value(cursor.scalar("<I"))
        found = []
        for _ in range(tensors):
            name, dims = cursor.string(), cursor.scalar("<I")
            if not 1 <= dims <= 4:
                raise ValueError(f"tensor {name!r} has {dims} dimensions")
            shape = tuple(cursor.scalar("<Q") for _ in range(dims))[::-1]  # stored innermost first
            kind = gguf.GGMLQuantizationType(cursor.scalar("<I"))
            found.append((name, shape, kind, cursor.scalar("<Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment = {alignment!r}")
        begin = -(-cursor.at // alignment) * alignment
        entries: dict[str, Entry] = {}
        for name, shape, kind, offset in found:
            block, bytes_per_block = gguf.GGML_QUANT_SIZES[kind]
            if prod(shape) == 0 or shape[-1] % block:
                raise ValueError(f"tensor {name!r} of shape {shape} does not divide into blocks of {block}")
            size = prod(shape) // block * bytes_per_block
            if begin + offset + size > len(self._data):
                raise EOFError(f"tensor {name!r} ends at {begin + offset + size} of {len(self._data)} bytes")
            if name in entries:
                raise ValueError(f"tensor {name!r} is listed twice")
            entries[name] = Entry(kind, shape, begin + offset, size)
        return metadata, entries

    def read(self, name: str) -> Tensor:
        """The values of a tensor as float32, its shape outermost first.

        Raises:
            ModelError: no such tensor, or a type whose values cannot be computed.
        """
        if name not in self.entries:
            raise ModelError(f"{self.path}: holds no tensor {name!r}; it has {len(self.entries)} others")
        entry = self.entries[name]
        raw = np.frombuffer(self._data, np.uint8, entry.size, entry.start).reshape(prod(entry.shape[:-1]), -1)
        try:
            with np.errstate(
                all="ignore"
            ):  # a damaged scale may overflow: the NaN check of the loader names the tensor
                values = gguf.quants.dequantize(raw, entry.kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: tensor {name!r} of type {entry.kind.name} cannot be read; {error}"
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(entry.shape))

    def need(self, key: str, check: Callable[[Any], bool], words: str) -> Any:
        """The metadata ``key``, or a ModelError when it is missing or fails ``check`` (described by ``words``)."""
        value = self.metadata.get(key)
        if value is None or not check(value):
            raise ModelError(f"{self.path}: metadata {key} = {value!r}; {words} is needed")
        return value
