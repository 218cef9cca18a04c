"""A journal of finished work, so that a run killed at any moment goes on where it was and ends the same.

A run does its work in units (a block's statistics, a solved layer, a measurement). Each finished unit is one file,
named by a hash of everything it depends on. It is written aside, synced and renamed: there whole, or not at all. A run
that resumes asks for each unit first:

    journal = Journal.beside(out, resume=resume)
    key = journal.key("solve", layer=name, lever=recipe_hash, statistics=second_moment)
    if journal.done(key):
        unit = journal.load(key)
    else:
        unit = journal.store(key, {"codes": codes}, {"seconds": 1.2})
    ...
    journal.clear()  # at success

`store` hands back what `load` would: a run that goes on from what it stored, and never from what it held in memory,
ends bit-identical to one that was resumed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pennyweight.errors import OutputError
from pennyweight.safe_write import output_errors, write_file

_META = "pennyweight"


@dataclass(frozen=True)
class Unit:
    """A finished unit of work.

    Args:
        tensors: what it made, by name.
        meta: JSON-able facts beside the tensors.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class _OnDisk(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path, self.names = path, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with _readable(self.path), safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """An OutputError in place of what goes wrong while ``path`` is read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise OutputError(
            f"{path}: this unit of the journal cannot be read ({' '.join(str(error).split())}); delete the file "
            "and resume: only its work is done again"
        ) from error


class Journal:
    """The finished units of one run, in a directory of their own.

    Args:
        directory: made when the first unit is stored.
        resume: keep what an earlier run left; otherwise it is thrown away now.
    """

    def __init__(self, directory: str | Path, *, resume: bool = True) -> None:
        self.directory = Path(directory)
        if not resume:
            self.clear()

    @classmethod
    def beside(cls, out: str | Path, *, resume: bool = True) -> Journal:
        """The journal of the run that writes to ``out``: ``.NAME.journal`` beside it, so that ``out`` appears whole."""
        out = Path(out).absolute()
        return cls(out.parent / f".{out.name}.journal", resume=resume)

    @staticmethod
    def key(stage: str, /, **inputs: Any) -> str:
        """The name of a unit: a hash of the stage and of everything the unit depends on.

        Args:
            stage: what kind of work.
            inputs: JSON-able values, paths, and tensors (hashed by dtype, shape and bytes), nested as you like; the
                order of keywords does not matter.
        """
        canonical = json.dumps({"stage": stage, **inputs}, sort_keys=True, default=_hashed, allow_nan=True)
        return f"{stage}-{hashlib.sha256(canonical.encode()).hexdigest()[:32]}"

    def done(self, key: str) -> bool:
        """Whether the unit ``key`` is finished."""
        return self._path(key).is_file()

    def load(self, key: str) -> Unit:
        """The unit ``key``.

        Raises:
            OutputError: it is not there, or the file was damaged after it was written.
        """
        held = self.lazily(key)
        return Unit(dict(held.tensors), held.meta)

    def lazily(self, key: str) -> Unit:
        """The unit ``key``, each of its tensors read when it is asked for, and again when it is asked for again.

        Raises:
            OutputError: as `load`.
        """
        path = self._path(key)
        with _readable(path), safe_open(path, framework="pt") as file:
            return Unit(_OnDisk(path, tuple(file.keys())), json.loads(file.metadata()[_META]))

    def put(self, key: str, tensors: Mapping[str, Tensor] | None = None, meta: Mapping[str, Any] | None = None) -> None:
        """Write the finished unit ``key``; a kill leaves all of it or nothing.

        Raises:
            OutputError: a full or read-only disk.
        """
        held = _apart(tensors or {})
        facts = json.dumps(dict(meta or {}), sort_keys=True)
        write_file(self._path(key), lambda aside: _save(held, aside, facts))

    def store(
        self, key: str, tensors: Mapping[str, Tensor] | None = None, meta: Mapping[str, Any] | None = None
    ) -> Unit:
        """`put`, and hand the unit back as `load` finds it."""
        self.put(key, tensors, meta)
        return self.load(key)

    def keys(self) -> Iterator[str]:
        """Finished units, sorted by name."""
        if self.directory.is_dir():
            yield from sorted(p.stem for p in self.directory.glob("*.safetensors") if not p.name.startswith("."))

    def __len__(self) -> int:
        return sum(1 for _ in self.keys())

    def clear(self) -> None:
        """Throw everything away, what killed runs left half-written too; call it when the results stand."""
        with output_errors(self.directory):
            if self.directory.exists():
                shutil.rmtree(self.directory)

    def _path(self, key: str) -> Path:
        assert not key.startswith("."), key
        assert "/" not in key, key
        return self.directory / f"{key}.safetensors"


def _save(held: dict[str, Tensor], aside: str, facts: str) -> None:
    try:
        save_file(held, aside, metadata={_META: facts})
    except SafetensorError as error:  # it hides the system's error in its text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory: safetensors refuses those, and a view would write its base."""
    held: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        held[name] = plain
    return held


def _hashed(value: Any) -> Any:
    """What stands for ``value`` in a key, where JSON has nothing for it."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return [str(value.dtype), list(value.shape), hashlib.sha256(flat.numpy().data).hexdigest()]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a journal key cannot hold a {type(value).__name__}; give JSON-able values and tensors")
