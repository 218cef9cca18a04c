"""Tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pennyweight.safe_write import write_text


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: aligned and cut to the terminal there, tab-separated and whole elsewhere."""
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [list(header), *cells]:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(header):
        shown.add_column(name, overflow="ellipsis", no_wrap=index == 0)
    for row in cells:
        shown.add_row(*map(Text, row))  # Text: brackets in names are not markup
    Console().print(shown)


def show(found: Any) -> None:
    """Print a table that is text or rich's own, whole where stdout is no terminal."""
    if isinstance(found, str):
        print(found)
        return
    from rich.console import Console

    (Console() if sys.stdout.isatty() else Console(width=200)).print(found)


def told(found: Any, to: Path | None = None) -> None:
    """Print the table of ``found``, and write its figures as JSON where asked for.

    Raises:
        OutputError: a place that cannot be written.
    """
    show(found.table())
    if to is not None:
        emit(found.to_json(), to)


def emit(found: Any, to: Path | None = None) -> None:
    """Write ``found``, JSON text or what becomes it, to the file ``to``, or print it.

    Raises:
        OutputError: a place that cannot be written.
    """
    text = found if isinstance(found, str) else json.dumps(found, indent=2, ensure_ascii=False, default=str)
    if to is None:
        print(text)
    else:
        write_text(to, text + "\n")
