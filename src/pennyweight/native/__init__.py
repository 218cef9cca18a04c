"""Small C routines, compiled on first use and cached; every one has a plain twin that runs where no compiler is."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path


def cache_directory() -> Path:
    """Where compiled routines are kept: ``$PENNYWEIGHT_CACHE`` or ``~/.cache/pennyweight``, below ``native``."""
    root = os.environ.get("PENNYWEIGHT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "pennyweight") / "native"


#: What a routine is compiled with beyond the usual. Sums may be taken in any order; NaN and infinity stay themselves.
_PRODUCTS = (
    "-fopenmp", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
    "-ffp-contract=fast", "-Wno-unused-function",
)  # fmt: skip
_FLAGS = {"matvec": _PRODUCTS, "decode": _PRODUCTS, "attend": _PRODUCTS}


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled ``name``.c of this folder, or None where there is no C compiler or it cannot build it.

    ``PENNYWEIGHT_NATIVE=0`` switches all of them off.
    """
    if os.environ.get("PENNYWEIGHT_NATIVE") == "0":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    source = Path(__file__).with_name(f"{name}.c")
    flags = ["-O3", "-march=native", "-shared", "-fPIC", *_FLAGS.get(name, ())]
    headers = b"".join(header.read_bytes() for header in sorted(source.parent.glob("*.h")))
    known = source.read_bytes() + headers + f"{platform.machine()} {platform.node()} {flags}".encode()
    key = hashlib.sha256(known).hexdigest()[:16]
    target = cache_directory() / f"{name}-{key}.so"
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                subprocess.run(
                    [*compiler.split(), *flags, str(source), "-o", str(made)], check=True, capture_output=True
                )
                os.replace(made, target)  # another process may have been faster: the same bytes either way
        except (OSError, subprocess.CalledProcessError):
            return None
    try:
        return ctypes.CDLL(str(target))
    except OSError:
        return None
