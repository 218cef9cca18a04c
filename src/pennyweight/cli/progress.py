"""Progress of a long run: bars on a terminal, plain lines elsewhere. Both on stderr: stdout is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pennyweight.units import show_seconds

#: (stage, done, total); a total of 0 says that nobody knows.
Report = Callable[[str, int, int], None]
#: Seconds between two lines of one stage where there is no terminal.
_EVERY = 10.0


@contextmanager
def progress(*, terminal: bool | None = None) -> Iterator[Report]:
    """What a verb calls with (stage, done, total).

    Args:
        terminal: whether stderr is one; None looks.
    """
    if not (sys.stderr.isatty() if terminal is None else terminal):
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield report


class Lines:
    """A line when a stage begins, every ten seconds, and when it ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun: dict[str, float] = {}
        self.said: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self.clock()
        first = stage not in self.begun
        begun = self.begun.setdefault(stage, now)
        last = bool(total) and done >= total
        if not (first or last or now - self.said[stage] >= _EVERY):
            return
        self.said[stage] = now
        elapsed = now - begun
        left = f", about {show_seconds(elapsed / done * (total - done))} left" if 0 < done < total and elapsed else ""
        count = f" {done}/{total}" if total else ""
        print(f"{stage}{count}, {show_seconds(elapsed)}{left}", file=sys.stderr, flush=True)
