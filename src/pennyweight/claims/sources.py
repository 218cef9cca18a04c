"""What a claim was run with: a digest of the code it can reach, so that a record says when it is out of date."""

from __future__ import annotations

import ast
import hashlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pennyweight
from pennyweight.claims.claim import Claim

_HOME = Path(pennyweight.__file__).parent
#: What lists rows and claims, and does nothing in one; with rows.json.
_LISTS = (_HOME / "rows.py", _HOME / "claims/__init__.py")
#: What is read as data or compiled, wherever it lies.
_TABLES = sorted(
    file for end in ("c", "h", "csv", "json") for file in _HOME.rglob(f"*.{end}") if file.name != "rows.json"
)


def digest(one: Claim) -> str:
    """16 hexadecimal digits of the module of ``one``, the modules that it and they import names from, and every table.

    Docstrings and comments do not count. Imports inside functions do, and those behind ``TYPE_CHECKING``. A name taken
    from a package counts as the module that defines it; what else the package hands on does not. Levers that a claim
    looked up by their names would be missed; claims import them.
    """
    file = sys.modules[one.check.__module__].__file__
    assert file is not None, one.name
    digest = hashlib.sha256(_tables())
    for reached in _reached(Path(file)):
        digest.update(_read(reached).digest)
    return digest.hexdigest()[:16]


def _reached(file: Path) -> list[Path]:
    found, waiting = set[Path](), [file]
    while waiting:
        if (reached := waiting.pop()) not in found:
            found.add(reached)
            homes = (_home(module, name) for module, name in _read(reached).needs)
            waiting += [home for home in homes if home is not None and home not in _LISTS]
    return sorted(found)


@cache
def _tables() -> bytes:
    return b"".join(hashlib.sha256(file.read_bytes()).digest() for file in _TABLES)


@dataclass(frozen=True)
class _Module:
    digest: bytes
    #: What it imports, (module, name), by what it is called there; no name where that is a module.
    imports: dict[str, tuple[str, str]]
    #: (module, name) of what its own code takes from elsewhere.
    needs: frozenset[tuple[str, str]]


@cache
def _read(file: Path) -> _Module:
    tree = ast.parse(file.read_bytes())
    imports: dict[str, tuple[str, str]] = {}
    used, attributes = set[str](), set[tuple[str, str]]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.add((node.value.id, node.attr))
        elif isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    needs = {where for name, where in imports.items() if name in used}
    needs |= {(".".join(filter(None, imports[name])), part) for name, part in attributes if name in imports}
    return _Module(hashlib.sha256(f"{file.name}\n{ast.dump(tree)}".encode()).digest(), imports, frozenset(needs))


@cache
def _home(module: str, name: str) -> Path | None:
    """The file of this package in which ``name`` of ``module`` is defined; None for another package's."""
    file = _file(f"{module}.{name}") or _file(module)
    if file is not None and file.name == "__init__.py" and (where := _read(file).imports.get(name)) is not None:
        return _home(*where)
    return file


@cache
def _file(name: str) -> Path | None:
    """The file of a module of this package; None for another name."""
    first, *parts = name.split(".")
    if first != pennyweight.__name__:
        return None
    stem = _HOME.joinpath(*parts)
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)
