"""How long things take: medians, A and B in turns, and the ratio with its interval.

Timings drift (heat, other work, a neighbor's cache), so two things are compared round by round, each first in every
other round, and the ratio of medians gets its interval from whole rounds. Medians, because a stall only ever lengthens.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from pennyweight.errors import OptionError
from pennyweight.measure.stats import Array, Interval, bootstrap

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one thing.

    Attributes:
        seconds: the median, with its interval.
        runs: every timing, in order.
        threads: that torch computed with.
    """

    seconds: Interval
    runs: tuple[float, ...]
    threads: int

    @property
    def milliseconds(self) -> float:
        """The median in ms."""
        return 1e3 * self.seconds.value

    def rate(self, count: float) -> Interval:
        """``count`` things a run, as things a second."""
        return rate(self.seconds, count)


@dataclass(frozen=True)
class Comparison:
    """Two things timed in turns.

    Attributes:
        first: the timing of a.
        second: the timing of b.
        ratio: of the medians, second / first: below 1 where b is faster.
    """

    first: Timing
    second: Timing
    ratio: Interval


def time(fn: Callable[[], Any], *, repeats: int = 10, warmup: int = 2, clock: Clock = perf_counter) -> Timing:
    """Time ``fn()``.

    Args:
        fn: what to time; queued work on an accelerator is waited for.
        repeats: timed runs, at least 2.
        warmup: runs before them that are not timed.
        clock: in seconds.
    """
    return timing([seconds for (seconds,) in in_turns([fn], repeats=repeats, warmup=warmup, clock=clock)])


def compare(
    a: Callable[[], Any], b: Callable[[], Any], *, repeats: int = 10, warmup: int = 2, clock: Clock = perf_counter
) -> Comparison:
    """Time ``a()`` and ``b()`` in turns; arguments as in `time`."""
    return comparison(np.array(list(in_turns([a, b], repeats=repeats, warmup=warmup, clock=clock))))


def comparison(seconds: Array) -> Comparison:
    """What rounds (R, 2) of timings of a and b say."""
    ratio = bootstrap(seconds, lambda rounds: np.median(rounds[..., 1], -1) / np.median(rounds[..., 0], -1))
    return Comparison(timing(seconds[:, 0]), timing(seconds[:, 1]), ratio)


def timing(seconds: Any) -> Timing:
    """What repeated timings (R,) of one thing say."""
    runs = tuple(map(float, seconds))
    return Timing(bootstrap(runs, lambda drawn: np.median(drawn, -1)), runs, torch.get_num_threads())


def rate(seconds: Interval, count: float) -> Interval:
    """``count`` things in ``seconds``, as things a second; the ends of the interval change places."""
    return Interval(
        count / seconds.value,
        count / seconds.high,
        count / seconds.low,
        seconds.level,
        count / seconds.value**2 * seconds.standard_error,
        seconds.n,
        seconds.method,
    )


def in_turns(
    fns: list[Callable[[], Any]], *, repeats: int, warmup: int, clock: Clock = perf_counter
) -> Iterator[list[float]]:
    """Seconds of each of ``fns`` in every round; the order turns from round to round."""
    check_rounds(repeats, warmup)
    for _ in range(warmup):
        for fn in fns:
            fn()
    with quiet():
        for turn in range(repeats):
            seconds = [0.0] * len(fns)
            for index in order(len(fns), turn):
                settle()
                start = clock()
                fns[index]()
                settle()
                seconds[index] = clock() - start
            yield seconds


def order(count: int, turn: int) -> list[int]:
    """Who runs when in round ``turn``: the other way round every other time."""
    return list(range(count))[:: -1 if turn % 2 else 1]


def check_rounds(repeats: int, warmup: int) -> None:
    """Raise an OptionError unless there are rounds enough to judge by."""
    if repeats < 2 or warmup < 0:
        raise OptionError(
            f"latency: {repeats} repeats after {warmup} to warm up; give at least 2 repeats, 0 to warm up"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside."""
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def settle() -> None:
    """Wait for work queued on an accelerator."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
