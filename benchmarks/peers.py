"""Peers for the benchmarks, each installed into a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

#: What pip is given for each, and what its build needs in the environment.
PEERS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "chinchilla": (("chinchilla==0.2.0",), {}),
    "llama": (("llama-cpp-python==0.3.36",), {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF"}),
    "mergekit": (("mergekit",), {}),
    "torchao": (("torchao==0.18.0",), {}),
}
#: Those that need torch and transformers see this environment's, which are large.
_BESIDE = {"mergekit", "torchao"}


def interpreter(peer: str, home: Path) -> str:
    """The interpreter of the environment of ``peer`` below ``home``, made and filled if it is not there.

    Raises:
        subprocess.CalledProcessError: pip failed; the half-made environment says so by a missing mark.
    """
    folder, (packages, needs) = home / peer, PEERS[peer]
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        if peer in _BESIDE:
            (site,) = folder.glob("lib/python*/site-packages")
            (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *packages], check=True, env={**os.environ, **needs}
        )  # fmt: skip
        (folder / "ready").touch()
    return str(python)
