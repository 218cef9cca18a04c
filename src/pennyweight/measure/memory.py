"""Peak memory, measured in a child process of its own.

A process never gets its peak back, so each measurement needs a new one. On Linux the resident high-water mark counts
mapped file pages too. The trap: the peak that ``wait4`` reports for a child starts at that of the process it was forked
from, so a large parent must not fork the command itself; a small launcher does.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from pennyweight import resident
from pennyweight.errors import OptionError, PennyweightError

_LAUNCHER = """
import json, os, sys, time
report, *command = sys.argv[1:]
start = time.perf_counter()
child = os.posix_spawnp(command[0], command, os.environ)
_, status, usage = os.wait4(child, 0)
with open(int(report), "w") as pipe:
    json.dump([usage.ru_maxrss, os.waitstatus_to_exitcode(status), time.perf_counter() - start], pipe)
"""
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Peak:
    """The memory of a child process.

    Attributes:
        bytes: resident at most; for a command never less than the launcher's some 10 MB.
        base_bytes: resident before the function was called, its module imported; None for a command.
        seconds: it ran for.
        result: what the function returned, or what the command wrote to its standard output.
    """

    bytes: int
    base_bytes: int | None
    seconds: float
    result: Any

    @property
    def added_bytes(self) -> int | None:
        """What the function added to what was there."""
        return None if self.base_bytes is None else self.bytes - self.base_bytes


def peak(target: Callable[..., Any] | Sequence[str], *args: Any, **options: Any) -> Peak:
    """Run ``target`` in a new process and see how much memory it takes.

    Args:
        target: a function that can be imported by name, or a command and its arguments.
        args: for the function; they and what it returns travel between the processes.
        options: for the function.

    Raises:
        OptionError: a function that cannot be imported there, or a command that is not found.
        PennyweightError: the child was killed, or the command failed.
        Exception: whatever the function raises.
    """
    if callable(target):
        return _of_function(target, args, options)
    if args or options:
        raise OptionError("memory: a command brings its arguments with it; give one list")
    return _of_command([os.fspath(part) for part in target])


def _of_command(command: list[str]) -> Peak:
    shown = " ".join(command)[:80]
    read, write = os.pipe()
    try:
        found = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(write), *command],
            pass_fds=[write],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    with os.fdopen(read) as pipe:
        report = pipe.read()
    if not report:
        raise OptionError(f"memory: {shown!r} cannot be started ({_last_line(found.stderr)})")
    peak_units, code, seconds = json.loads(report)
    if code != 0:
        raise PennyweightError(f"memory: {shown!r} {_ended(code)}: {_last_line(found.stderr)}")
    return Peak(peak_units * _UNIT, None, seconds, found.stdout)


def _of_function(target: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Peak:
    context = multiprocessing.get_context("spawn")  # a forked child would start with our memory
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(theirs, target, args, options), daemon=True)
    try:
        child.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise OptionError(
            f"memory: {target!r} and its arguments cannot be sent to another process ({error}); give a function of a "
            "module and plain data"
        ) from error
    theirs.close()
    with ours:
        try:
            found = ours.recv()
        except EOFError:
            found = None
    child.join()
    if found is None:
        raise PennyweightError(
            f"memory: the process of {target!r} {_ended(child.exitcode or 0)} before it could answer"
        )
    if isinstance(found, BaseException):
        raise found
    assert isinstance(found, Peak)
    return found


def _in_child(pipe: Connection, target: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    gc.collect()
    resident.restart()
    base = resident.now()
    start = perf_counter()
    try:
        result = target(*args, **options)
        pipe.send(Peak(resident.highest(), base, perf_counter() - start, result))
    except Exception as error:
        try:
            pipe.send(error)
        except (pickle.PicklingError, AttributeError, TypeError):
            pipe.send(PennyweightError(f"memory: {target!r} raised {type(error).__name__}: {error}"))


def _ended(code: int) -> str:
    return f"was killed by signal {-code} (9: out of memory, mostly)" if code < 0 else f"ended with code {code}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
