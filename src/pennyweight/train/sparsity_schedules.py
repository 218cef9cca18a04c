"""How sparse a network is while it trains: ramps of the share of zeros, and frames of ever harder patterns.

Rows 6, 97, 140 and 196. Sources: M. Zhu and S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
model compression", arXiv:1710.01878, equation 1 (the cubic ramp); T. Jin et al., "The Journey Matters: Average
Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws", arXiv:2501.12486 (from a quarter to three
quarters of the run; the average); Y. Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning",
arXiv:2205.11005 (plateaus before and after the ramp); A. R. Bambhaniya et al., "Progressive Gradient Flow for Robust
N:M Sparsity Training in Transformers", arXiv:2402.04744 (frames of patterns). Differs from the sources: nothing.

Step t is the one after t steps are done; weights are zeroed before it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import ClassVar, Protocol

from pennyweight.errors import OptionError


class SparsitySchedule(Protocol):
    """A share of zeros for each step."""

    def sparsity(self, step: int) -> float:
        """Share of zeros while ``step`` is run."""
        ...

    def chooses(self, step: int) -> bool:
        """Whether masks are chosen anew at ``step``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same share of zeros from ``start`` on; masks are chosen at ``start``, and every so many steps if asked.

    Attributes:
        final: share of zeros.
        start: the first step at which weights are masked.
        every: steps between two choices of the masks; None chooses once.

    Raises:
        OptionError: a share outside 0 to 1, or steps that cannot be.
    """

    final: float
    start: int = 0
    every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1 or self.start < 0 or (self.every is not None and self.every < 1):
            raise OptionError(
                f"sparsity {self.final} from step {self.start} every {self.every}; give a share of zeros within 0 to "
                "1, a start of 0 or more, and every of 1 or more"
            )

    def sparsity(self, step: int) -> float:
        """Share of zeros while ``step`` is run."""
        return self.final if step >= self.start else 0.0

    def chooses(self, step: int) -> bool:
        """Whether masks are chosen anew at ``step``."""
        if self.every is None:
            return step == self.start
        return step >= self.start and (step - self.start) % self.every == 0

    def mean(self, total: int) -> float:
        """Share of zeros, averaged over ``total`` steps."""
        return self.final * max(0, total - self.start) / total


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """``s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * d))**power`` for t = t_0, t_0 + d, ..., t_0 + n*d.

    Attributes:
        final: s_f, share of zeros at the end.
        start: t_0, the first step at which weights are masked.
        end: t_0 + n*d, the last one; a whole number of intervals after ``start``.
        every: d, steps between two choices of the masks.
        initial: s_i, share of zeros at ``start``.

    Raises:
        OptionError: shares outside 0 to 1 or falling, or steps that do not divide.
    """

    power: ClassVar[int]
    final: float
    start: int
    end: int
    every: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final <= 1:
            raise OptionError(
                f"gradual pruning from {self.initial} to {self.final}; "
                "give shares of zeros with 0 <= initial <= final <= 1"
            )
        if self.every < 1 or self.start < 0 or self.end <= self.start or (self.end - self.start) % self.every:
            raise OptionError(
                f"gradual pruning from step {self.start} to {self.end} every {self.every}; "
                "give 0 <= start < end, a whole number of intervals apart"
            )

    def sparsity(self, step: int) -> float:
        """Share of zeros while ``step`` is run: 0 before ``start``, constant between two choices and after ``end``."""
        if step < self.start:
            return 0.0
        chosen = min(step, self.end) - (min(step, self.end) - self.start) % self.every
        left = 1 - (chosen - self.start) / (self.end - self.start)
        return self.final + (self.initial - self.final) * left**self.power

    def chooses(self, step: int) -> bool:
        """Whether masks are chosen anew at ``step``."""
        return self.start <= step <= self.end and (step - self.start) % self.every == 0

    def mean(self, total: int) -> float:
        """Share of zeros, averaged over ``total`` steps, of the smooth ramp (``every`` -> 0); see `mean_sparsity`.

        From 0 that is ``final * (power / (power + 1) * (b - a) + 1 - b)`` with a and b the shares of the run at which
        the ramp starts and ends: 0.625 * final for a cubic from a quarter to three quarters.

        Raises:
            OptionError: the ramp ends later.
        """
        if total < self.end:
            raise OptionError(
                f"mean sparsity: a run of {total} steps, and the ramp ends at {self.end}; give more steps"
            )
        on_the_way = (self.initial + self.power * self.final) / (self.power + 1)
        return (on_the_way * (self.end - self.start) + self.final * (total - self.end)) / total


@dataclass(frozen=True, kw_only=True)
class CubicSchedule(Ramp):
    """A `Ramp` that falls off with the cube: fast while there is much to spare, ever slower towards the end."""

    power: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Ramp):
    """A `Ramp` that is a straight line."""

    power: ClassVar[int] = 1


def between_plateaus(
    total: int,
    final: float,
    *,
    before: float = 0.25,
    after: float = 0.25,
    initial: float = 0.0,
    intervals: int = 50,
    ramp: type[Ramp] = CubicSchedule,
) -> Ramp:
    """A ramp over ``total`` steps with a share of them before it and one after it.

    Row 6 has a quarter of each (the defaults), row 140 0.1 before and 0.3 after.

    Args:
        total: steps of the run.
        final: share of zeros at its end.
        before: share of the steps before the ramp, with no zeros.
        after: share of the steps after it, at ``final``.
        initial: share of zeros where the ramp starts.
        intervals: choices of the masks on the way; fewer where there are fewer steps.
        ramp: `CubicSchedule` or `LinearSchedule`.

    Raises:
        OptionError: plateaus that leave no step, or shares outside 0 to 1.
    """
    start, late = round(before * total), round(after * total)
    length = total - start - late
    if before < 0 or after < 0 or length < 1 or intervals < 1:
        raise OptionError(
            f"sparsity schedule: {before:.0%} before and {after:.0%} after leave {length} of {total} steps for "
            f"{intervals} intervals; give shares of 0 or more that leave some"
        )
    every = max(1, length // intervals)
    # whole intervals; what is left over goes to the start
    whole = length - length % every
    return ramp(final=final, initial=initial, start=total - late - whole, end=total - late, every=every)


def mean_sparsity(schedule: SparsitySchedule, total: int) -> float:
    """The share of zeros averaged over the steps 0 to ``total`` - 1, exactly as they are run.

    Raises:
        OptionError: no steps.
    """
    if total < 1:
        raise OptionError(f"mean sparsity: {total} steps; give 1 or more")
    return sum(schedule.sparsity(step) for step in range(total)) / total


def average_params(schedule: SparsitySchedule, params: float, total: int) -> float:
    """Non-zero parameters averaged over the run, of ``params`` prunable ones: what stands for size in row 6's law."""
    return params * (1 - mean_sparsity(schedule, total))


Pattern = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Frames:
    """N:M patterns in turn, each for an equal share of the steps from ``start`` to ``end``; the last one stays.

    Attributes:
        patterns: (kept, of), in order; see `halving` and `geometric`.
        start: the first step of the first one; dense before.
        end: where the last frame ends.

    Raises:
        OptionError: no pattern, one that keeps nothing or all it has, or fewer steps than frames.
    """

    patterns: Sequence[Pattern]
    start: int
    end: int

    def __post_init__(self) -> None:
        if not self.patterns or any(not 0 < kept < of for kept, of in self.patterns):
            raise OptionError(
                f"frames of patterns {list(self.patterns)}; give some, each (kept, of) with 0 < kept < of"
            )
        if self.start < 0 or self.end - self.start < len(self.patterns):
            raise OptionError(
                f"frames from step {self.start} to {self.end}; give 0 <= start and a step for each of "
                f"{len(self.patterns)} patterns"
            )

    def pattern(self, step: int) -> Pattern | None:
        """The pattern of ``step``; None while dense."""
        if step < self.start:
            return None
        count = len(self.patterns)
        return self.patterns[min(count - 1, (step - self.start) * count // (self.end - self.start))]

    def sparsity(self, step: int) -> float:
        """Share of zeros while ``step`` is run."""
        found = self.pattern(step)
        return 0.0 if found is None else 1 - found[0] / found[1]

    def chooses(self, step: int) -> bool:
        """Whether masks are chosen anew at ``step``: at each from ``start`` on."""
        return step >= self.start


def halving(kept: int, of: int) -> list[Pattern]:
    """M-1:M, then M/2:M, M/4:M, ... down to N:M: log2(M / N) + 1 patterns of one width.

    Raises:
        OptionError: M / N is no power of two.
    """
    count = _doublings(kept, of) + 1
    return [(of - 1 if i == 0 else of >> i, of) for i in range(count)]


def geometric(kept: int, of: int, frames: int = 4) -> list[Pattern]:
    """8N:8M, 4N:4M, 2N:2M, N:M: one share of zeros in ever narrower groups.

    Raises:
        OptionError: N:M prunes nothing, or no frames.
    """
    if not 0 < kept < of or frames < 1:
        raise OptionError(f"geometric frames of {kept}:{of} in {frames}; give 0 < kept < of and 1 frame or more")
    return [(kept << i, of << i) for i in reversed(range(frames))]


def _doublings(kept: int, of: int) -> int:
    found = log2(of / kept) if 0 < kept < of else 0.5
    if not found.is_integer():
        raise OptionError(f"halving frames of {kept}:{of}; give a pattern whose {of} is {kept} times a power of two")
    return int(found)
