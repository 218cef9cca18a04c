"""What a claim was run with: a digest of the code it can reach, so that a record says when it is out of date."""

from __future__ import annotations

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path

import pennyweight
from pennyweight.claims.claim import Claim

_HOME = Path(pennyweight.__file__).parent
#: What is read as data or compiled, wherever it lies; rows.json holds words alone.
_TABLES = sorted(
    file for end in ("c", "h", "csv", "json") for file in _HOME.rglob(f"*.{end}") if file.name != "rows.json"
)


def digest(one: Claim) -> str:
    """16 hexadecimal digits of the module of ``one``, the modules it imports, theirs in turn, and every table.

    Docstrings and comments do not count. Imports inside functions and behind ``TYPE_CHECKING`` do: packages that look
    names up on first use state them there. Levers that a claim looked up by their names would be missed; claims import
    them.
    """
    file = sys.modules[one.check.__module__].__file__
    assert file is not None, one.name
    found, waiting = set[Path](), [Path(file)]
    while waiting:
        if (reached := waiting.pop()) not in found:
            found.add(reached)
            waiting += _read(reached)[1]
    digest = hashlib.sha256(_tables())
    for reached in sorted(found):
        digest.update(_read(reached)[0])
    return digest.hexdigest()[:16]


@cache
def _tables() -> bytes:
    return b"".join(hashlib.sha256(file.read_bytes()).digest() for file in _TABLES)


@cache
def _read(file: Path) -> tuple[bytes, frozenset[Path]]:
    """The digest of a file's code, and the files of this package that it imports."""
    tree = ast.parse(file.read_bytes())
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    code = hashlib.sha256(f"{file.name}\n{ast.dump(tree)}".encode()).digest()
    return code, frozenset(found for name in names if (found := _file(name)) is not None)


@cache
def _file(name: str) -> Path | None:
    """The file of a module of this package; None for another name."""
    first, *parts = name.split(".")
    if first != pennyweight.__name__:
        return None
    stem = _HOME.joinpath(*parts)
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)
