"""Writing so that a good file is never lost: write aside, fsync, rename.

A killed process, a full disk or a read-only place leaves what stood there before, whole; the user sees one line.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from pennyweight.errors import OutputError

#: What Pennyweight writes into a directory; overwriting a directory replaces these and keeps every other file.
OUR_FILES = (
    "model*.safetensors",
    "model.gguf",
    "compressed-tensors",
    "openvino",
    "openvino_model.*",
    "model.safetensors.index.json",
    "weights.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    "recipe.yaml",
    "receipt.json",
    "report.html",
)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` while writing ``path`` into an `OutputError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {_remedy(error, path)}") from error


def _remedy(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({_free(path)} free); free some space or choose another place"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot be written ({os.strerror(error.errno)}); choose another place or change its permissions"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a file stands where a directory is needed; choose another place"
    return f"cannot be written ({error.strerror or error}); choose another place"


def _free(path: Path) -> str:
    for place in (path, *path.parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(place).free / 1e6:.1f} MB"
    return "unknown space"


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically: a reader sees the old file or the whole new one.

    Raises:
        OutputError: a read-only or full disk; the old file is untouched.
    """

    def fill(aside: str) -> None:
        with open(aside, "wb") as file:
            file.write(data)

    write_file(path, fill)


def write_file(path: str | Path, fill: Callable[[str], None]) -> None:
    """Have ``fill`` write a file aside, sync it and put it at ``path`` in one step; see `write_bytes`."""
    path = Path(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            fill(aside)
            _fsync(Path(aside))
            os.chmod(aside, 0o666 & ~_umask())
            os.replace(aside, path)
            _fsync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of ``text`` as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def check_free(directory: str | Path, *, overwrite: bool = False) -> None:
    """Check, before hours of work, that results can go to ``directory``: it is writable and holds none yet.

    Raises:
        OutputError: it is a file, read-only, or not empty and ``overwrite`` is not set.
    """
    directory = Path(directory)
    with output_errors(directory):
        if directory.exists():
            if not directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            held = sorted(entry.name for entry in directory.iterdir())
            if held and not overwrite:
                shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
                raise OutputError(
                    f"{directory}: already holds {len(held)} entries ({shown}); give an empty directory, or overwrite"
                )
        place = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=place):
            pass


@contextmanager
def staged(directory: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill; on leaving it becomes ``directory`` in one step, on an error it vanishes.

    Args:
        directory: where the results go; missing, or empty unless ``overwrite``.
        overwrite: replace the results (`OUR_FILES`) a former run left there; other files stay.

    Raises:
        OutputError: see `check_free`; or the disk is full.
    """
    directory = Path(directory).absolute()
    check_free(directory, overwrite=overwrite)
    with output_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        try:
            os.chmod(aside, 0o777 & ~_umask())
            yield aside
            for file in sorted(aside.rglob("*")):
                if file.is_file():
                    _fsync(file)
            _fsync_directory(aside)
            _put_in_place(aside, directory)
            _fsync_directory(directory.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, directory: Path) -> None:
    """Make ``aside`` stand at ``directory``; afterwards ``aside`` holds what is to be thrown away, if anything."""
    if not directory.exists():
        os.rename(aside, directory)
        return
    new = {entry.name for entry in aside.iterdir()}
    _exchange(aside, directory)
    for entry in aside.iterdir():
        if entry.name not in new and not any(fnmatch(entry.name, pattern) for pattern in OUR_FILES):
            os.rename(entry, directory / entry.name)


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories: in one step where the system can, else in three renames."""
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
    if sys.platform == "linux":
        rename: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        names = os.fsencode(first), os.fsencode(second)
        if rename and rename(at_working_directory, names[0], at_working_directory, names[1], exchange) == 0:
            return
    third = Path(tempfile.mkdtemp(dir=second.parent, prefix=f".{second.name}."))
    os.rename(second, third)
    os.rename(first, second)
    os.rename(third, first)


def _fsync(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _fsync_directory(directory: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
