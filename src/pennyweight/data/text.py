"""Documents: the embedded texts by short name, a file, a folder, or a list; and their split in two.

Every third document is held out, so that calibration and evaluation never share one.
"""

from __future__ import annotations

import bz2
import io
import json
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

from pennyweight.data.wiki_markup import paragraphs
from pennyweight.errors import DataError
from pennyweight.model import assets

_GENSIM = "gensim/test/test_data"
_STDLIB_CHARACTERS = 4_000_000
_PIECE_CHARACTERS = 4_000


@dataclass(frozen=True)
class Split:
    """Documents to calibrate on, and documents to judge by."""

    calibration: list[str]
    heldout: list[str]


def documents(source: str | Path | Sequence[str]) -> list[str]:
    """The documents of ``source``.

    Args:
        source: the short name of a text (`assets.names`), a ``.txt`` file (cut at blank lines into pieces of some 4,000
            characters), a ``.jsonl`` file (the key ``text`` of every line), a folder of ``.txt`` files, or a list.

    Raises:
        DataError: nothing there, or nothing in it.
    """
    if not isinstance(source, (str, Path)):
        found = [text for text in source if text.strip()]
    elif str(source) in assets.names():
        found = list(_embedded(str(source)))
    else:
        found = _from_files(Path(source))
    if not found:
        raise DataError(f"{_shown(source)}: holds no text")
    return found


def split(source: str | Path | Sequence[str]) -> Split:
    """The documents of ``source``, every third one held out; fewer than three are cut into pieces first.

    Raises:
        DataError: too little text for three pieces.
    """
    found = documents(source)
    if len(found) < 3:
        found = [piece for text in found for piece in _pieces(text)]
    if len(found) < 3:
        raise DataError(
            f"{_shown(source)}: {sum(map(len, found))} characters in {len(found)} pieces cannot be split into "
            f"calibration and held-out text; give at least 3 documents, or {3 * _PIECE_CHARACTERS} characters"
        )
    return Split([text for i, text in enumerate(found) if i % 3 != 2], found[2::3])


@lru_cache(maxsize=4)
def _embedded(name: str) -> tuple[str, ...]:
    if name == "wiki":
        return _wiki()
    if name == "news":
        raw = assets.read("news", f"{_GENSIM}/lee_background.cor") + assets.read("news", f"{_GENSIM}/lee.cor")
        return tuple(line for line in raw.decode("latin-1").split("\n") if line.strip())
    if name == "stdlib-code":
        return _stdlib_code()
    if name in ("tweets", "polarity"):
        from pennyweight.data.tables import labelled_text  # a table, read as text only when asked for

        return tuple(labelled_text(name).texts)
    raise DataError(f"{name}: is not text; texts are {', '.join(assets.names('text'))}, tweets, polarity")


def _wiki() -> tuple[str, ...]:
    member = f"{_GENSIM}/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    found = []
    for _, page in ElementTree.iterparse(io.BytesIO(bz2.decompress(assets.read("wiki", member)))):
        space, _, tag = page.tag.rpartition("}")
        if tag != "page":
            continue
        article = page.findtext(f"{space}}}ns") == "0" and page.find(f"{space}}}redirect") is None
        text = "\n".join(paragraphs(page.findtext(f"{space}}}revision/{space}}}text") or "")) if article else ""
        if text:
            found.append(text)
        page.clear()
    return tuple(found)


def _stdlib_code() -> tuple[str, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    size = 0
    for place, folders, files in os.walk(root):
        # tests repeat themselves, the rest is not the library's own source
        folders[:] = sorted(set(folders) - {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"})
        for file in sorted(files):
            if file.endswith(".py") and size < _STDLIB_CHARACTERS:
                text = (Path(place) / file).read_text("utf-8", errors="replace")
                size += len(text)
                found += [text] if text.strip() else []
    return tuple(found)


def _from_files(path: Path) -> list[str]:
    try:
        if path.is_dir():
            return [text for file in sorted(path.glob("*.txt")) if (text := file.read_text("utf-8")).strip()]
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
            return [row["text"] for row in rows if row["text"].strip()]
        if path.is_file():
            return _pieces(path.read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error
    raise DataError(
        f"{path}: no such file, folder or text; give a .txt or .jsonl file, a folder of .txt files, or one of "
        f"{', '.join(assets.names('text'))}"
    )


def _pieces(text: str) -> list[str]:
    """``text`` cut at blank lines (at any line where there are none) into pieces of at least 4,000 characters."""
    separator = "\n\n" if text.count("\n\n") * _PIECE_CHARACTERS > len(text) else "\n"
    pieces, held, size = [], list[str](), 0
    for part in text.split(separator):
        held.append(part)
        size += len(part)
        if size >= _PIECE_CHARACTERS:
            pieces.append(separator.join(held))
            held, size = [], 0
    rest = separator.join(held)
    return pieces + ([rest] if rest.strip() else [])


def _shown(source: str | Path | Sequence[str]) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"a list of {len(source)} documents"
