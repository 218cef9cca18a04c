"""The memory of this process: what is resident, the highest it was, and giving back what is free.

Where the system lets a process restart its high-water mark (Linux, mostly), peaks of stages can be told apart.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def now() -> int:
    """Bytes resident; on systems that do not say, the highest so far."""
    return _field("VmRSS") if _STATUS.exists() else highest()


def highest() -> int:
    """Bytes resident at most since the start, or since `restart`."""
    return _field("VmHWM") if _STATUS.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def restart() -> None:
    """Let `highest` count from here, where the system allows it; some containers do not."""
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:
            return


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what it freed between tensors that live on."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
