"""The safetensors format: a strict reader of single tensors, and a streaming writer.

Source: the format page of the safetensors project: 8 bytes little-endian header length, a JSON header, the bytes of
all tensors without gaps. Reading takes only the bytes asked for and maps nothing; writing holds one tensor at a time.
The official library stands beside it in the tests, both ways.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pennyweight.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: what ``transformers`` wants to read in a header
METADATA = {"format": "pt"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER_BYTES = 100_000_000  # the limit of the official reader


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype, shape, and the bytes it takes (counted from the start of the file)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The checked header of a file, and the SHA-256 of its bytes."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    sha256: str


def read_header(path: Path) -> Header:
    """The header of ``path``, every offset checked against the size of the file.

    Raises:
        ModelError: missing, truncated, damaged, or of an unknown dtype.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
                raise ModelError(f"{path}: truncated or not safetensors ({size} bytes, header of {length})")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        found = json.loads(raw)
        metadata = found.pop("__metadata__", {})
        entries = {name: _entry(name, entry, 8 + length) for name, entry in found.items()}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not a map of strings")
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise ValueError(f"tensor {name!r} begins at {entry.start}, the one before it ends at {end}")
            end = entry.stop
        if end != size:
            raise ValueError(f"the header describes {end} bytes, the file has {size}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: truncated or damaged safetensors ({error}); copy or download it again") from error
    return Header(entries, metadata, hashlib.sha256(raw).hexdigest())


def _entry(name: str, found: Any, begin: int) -> Entry:
    dtype, shape, (start, stop) = DTYPES[found["dtype"]], tuple(found["shape"]), found["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"tensor {name!r} has shape {shape} at {start}:{stop}")
    if stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} in {found['dtype']} does not take {stop - start} bytes")
    return Entry(dtype, shape, begin + start, begin + stop)


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """The tensor that ``entry`` (of `read_header`) describes, in memory of its own.

    Raises:
        ModelError: the file cannot be read, or was cut since its header was.
    """
    raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(entry.start)
            view, done = raw.numpy().data, 0
            while done < len(view) and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    if done != len(raw):
        raise ModelError(f"{path}: truncated while being read, {len(raw) - done} bytes are missing")
    return raw.view(entry.dtype).reshape(entry.shape)


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The length and header of a file that holds ``tensors`` in the order of `file_order`."""
    at, entries = 0, {}
    for name in file_order(tensors):
        dtype, shape = tensors[name]
        end = at + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    found = ({"__metadata__": dict(metadata)} if metadata else {}) | entries
    raw = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors begin aligned
    return struct.pack("<Q", len(raw)) + raw


def file_order(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """Names by falling item size, then by name: every tensor begins at a multiple of its item size."""
    return sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))


def write(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> Header:
    """Write ``tensors`` to ``path``; call it inside `safe_write.staged`, which makes it atomic.

    Raises:
        ModelError: a dtype that the format cannot hold.
        OSError: the disk is full or read-only.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ModelError(f"{name}: dtype {tensor.dtype} cannot be stored in safetensors; convert it")
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with open(path, "wb") as file:
        head = header_bytes(kinds, METADATA if metadata is None else metadata)
        file.write(head)
        _write_all(file, (tensors[name] for name in file_order(kinds)))
    return read_header(path)


def _write_all(file: BinaryIO, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            file.write(flat.view(torch.uint8).numpy().data)
