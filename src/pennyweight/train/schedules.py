"""Learning rates as pure functions of how far training has come: warm-up, a stable course, a decay.

Rows 52 and 146. Sources: Y. Shen et al., "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate
Scheduler", arXiv:2408.13359 (`power`); S. Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with
Scalable Training Strategies", arXiv:2404.06395 (`wsd`, and the cosines it is compared with). Differs from the
sources: cosines start where warm-up ends, so that the rate has no jump there; MiniCPM's exponential anneal is read as a
half-life counted from the start of the decay.

Any schedule can be decayed from any point of it: a stable run is trained once, and each length that is wanted branches
off one of its checkpoints (`Schedule.decayed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pennyweight.elementwise import elementwise, numbers
from pennyweight.errors import OptionError

Unit = Literal["steps", "tokens"]
Shape = Literal["exp", "linear", "1-sqrt"]
_SHAPES = ("exp", "linear", "1-sqrt")


@dataclass(frozen=True)
class Schedule:
    """A learning rate; call it with the steps (or tokens) done so far, those of the update itself included.

        rate = wsd(total=1000, warmup=50, peak=3e-3)
        torch.optim.lr_scheduler.LambdaLR(optimizer, wsd(1000, 50))  # peak 1: a factor, in anybody's loop

    Attributes:
        name: how it was made, in words.
        unit: what it counts.
        total: where it ends; infinite for one that never does. Later on it stays at its last value.
    """

    name: str
    unit: Unit
    total: float
    _rate: Callable[[float], float] = field(repr=False, compare=False)

    @elementwise
    def __call__(self, done: float) -> float:
        if not done >= 0:
            raise OptionError(f"{self.name}: asked for the rate after {done} {self.unit}; give 0 or more")
        return self._rate(min(done, self.total))

    def decayed(
        self, at: float, over: float, shape: Shape = "exp", *, half_life: float | None = None, floor: float = 0.0
    ) -> Schedule:
        """This schedule up to ``at``; from there its rate falls over ``over`` steps (or tokens).

        Args:
            at: where the decay starts.
            over: its length.
            shape: "linear" and "1-sqrt" (1 minus the root of the share done) end at ``floor``; "exp" halves the rate
                every ``half_life``.
            half_life: None for a fifth of ``over``, which ends at 1/32. Of "exp" alone.
            floor: share of the rate at ``at`` below which it does not fall.

        Raises:
            OptionError: a decay that starts outside this schedule, of no length or of an unknown shape.
        """
        if not isinstance(shape, str) or shape not in _SHAPES:
            raise OptionError(f"decay of {self.name}: shape {shape!r}; give one of {', '.join(_SHAPES)}")
        if not (0 <= at <= self.total and math.isfinite(at) and 0 < over < math.inf):
            raise OptionError(
                f"decay of {self.name}: from {at:g} over {over:g} {self.unit}; give a start within 0 to {self.total:g} "
                "and a positive length"
            )
        if half_life is not None and (shape != "exp" or not half_life > 0):
            raise OptionError(f"decay of {self.name}: half_life {half_life}, shape {shape!r}; give exp a positive one")
        _check_share(floor, "floor", self.name)
        top, factor = self(at), _falling(shape, over, half_life or over / 5)

        def rate(done: float) -> float:
            return self._rate(done) if done <= at else top * max(floor, factor(done - at))

        return Schedule(f"{self.name}, decayed {shape} from {at:g} over {over:g}", self.unit, at + over, rate)


def constant(warmup: float = 0.0, *, peak: float = 1.0, unit: Unit = "steps") -> Schedule:
    """``peak`` for ever, after a linear rise over ``warmup``."""
    return _schedule(f"constant(warmup={warmup:g}, peak={peak:g})", warmup, math.inf, lambda done: peak, unit, peak)


def wsd(
    total: float,
    warmup: float,
    decay_frac: float = 0.1,
    shape: Shape = "exp",
    *,
    peak: float = 1.0,
    half_life: float | None = None,
    floor: float = 0.0,
    unit: Unit = "steps",
) -> Schedule:
    """Warm-up, stable, decay: peak * s/W, then peak, then peak * f over the last ``decay_frac`` of ``total``.

    MiniCPM finds 10 % of decay to be enough and 2.5 % too little. To branch other lengths off one stable run, decay a
    `constant` schedule from its checkpoints.

    Args:
        total: steps (or tokens) in all.
        warmup: W, the first of them.
        decay_frac: share of ``total`` that decays.
        shape: of the decay, see `Schedule.decayed`.
        peak: the stable rate.
        half_life: of the shape "exp"; None for a fifth of the decay.
        floor: share of ``peak`` below which the rate does not fall.
        unit: what ``total`` and ``warmup`` count.

    Raises:
        OptionError: shares outside 0 to 1, or a warm-up that reaches into the decay.
    """
    numbers("wsd", total=total, warmup=warmup, decay_frac=decay_frac)
    _check_total(total, "wsd")
    _check_share(decay_frac, "decay_frac", "wsd")
    over = decay_frac * total
    if not 0 <= warmup <= total - over:
        raise OptionError(
            f"wsd: {warmup:g} of warm-up and {over:g} of decay do not fit into {total:g} {unit}; make one shorter"
        )
    stable = constant(warmup, peak=peak, unit=unit)
    if not over:
        return Schedule(stable.name, unit, total, stable._rate)
    return stable.decayed(total - over, over, shape, half_life=half_life, floor=floor)


def power(
    batch: float,
    a: float = 4.0,
    b: float = -0.51,
    eta_max: float = 0.02,
    warmup_tokens: float = 1e9,
    decay_frac: float = 0.1,
    *,
    total_tokens: float | None = None,
    shape: Shape = "linear",
) -> Schedule:
    """The Power schedule, in tokens n: min(eta_max, batch * a * n^b), risen to linearly and decayed at the end.

    It needs to know neither its end nor another batch's rate: without ``total_tokens`` it goes on for ever, and
    `Schedule.decayed` ends it anywhere. The rate counted in tokens is the whole point: a loop that counts steps has to
    convert them. For a width other than the one tuned, the source scales it with mu-parametrization.

    Args:
        batch: sequences (of 4,096 tokens) in a batch.
        a: the amplitude; 4.6 is the law fitted to the best rates (`laws.lr.power`), 4 the scheduler's default.
        b: the exponent, below 0; the best ones found lie between -0.53 and -0.49.
        eta_max: the rate is never higher.
        warmup_tokens: of the linear rise.
        decay_frac: share of ``total_tokens`` that decays; without them nothing decays.
        total_tokens: where training ends; None for open-ended.
        shape: of the decay, see `Schedule.decayed`.

    Raises:
        OptionError: numbers outside their ranges, or a warm-up that reaches into the decay.
    """
    numbers("power", batch=batch, a=a, b=b, eta_max=eta_max, warmup_tokens=warmup_tokens, decay_frac=decay_frac)
    if not (0 < batch < math.inf and 0 < a < math.inf and -math.inf < b < 0 and eta_max > 0):
        raise OptionError(
            f"power: batch = {batch!r}, a = {a!r}, b = {b!r}, eta_max = {eta_max!r}; give b < 0 and the others > 0"
        )
    _check_share(decay_frac, "decay_frac", "power")

    def course(done: float) -> float:
        return min(eta_max, batch * a * done**b) if done else eta_max

    name = f"power(batch={batch:g}, a={a:g}, b={b:g}, eta_max={eta_max:g}, warmup_tokens={warmup_tokens:g})"
    open_ended = _schedule(name, warmup_tokens, math.inf, course, "tokens", eta_max)
    if total_tokens is None:
        return open_ended
    _check_total(total_tokens, "power")
    over = decay_frac * total_tokens
    if warmup_tokens > total_tokens - over:
        raise OptionError(
            f"power: {warmup_tokens:g} tokens of warm-up and {over:g} of decay do not fit into {total_tokens:g}; "
            "make one shorter"
        )
    if not over:
        return Schedule(name, "tokens", total_tokens, open_ended._rate)
    return open_ended.decayed(total_tokens - over, over, shape)


def cosine(
    total: float, warmup: float = 0.0, *, peak: float = 1.0, floor: float = 0.1, unit: Unit = "steps"
) -> Schedule:
    """Half a cosine from ``peak`` after ``warmup`` down to ``floor * peak`` at ``total``, and no further."""
    return _cosine("cosine", total, warmup, peak, floor, unit, total)


def cosine_loop(
    period: float, warmup: float = 0.0, *, peak: float = 1.0, floor: float = 0.1, unit: Unit = "steps"
) -> Schedule:
    """`cosine` that goes on: it reaches ``floor * peak`` at ``period``, rises again as long, and so forth for ever."""
    return _cosine("cosine_loop", period, warmup, peak, floor, unit, math.inf)


def linear(
    total: float, warmup: float = 0.0, *, peak: float = 1.0, floor: float = 0.0, unit: Unit = "steps"
) -> Schedule:
    """A straight line from ``peak`` after ``warmup`` down to ``floor * peak`` at ``total``."""
    _check_fall(total, warmup, floor, "linear")

    def course(done: float) -> float:
        return peak * (floor + (1 - floor) * (total - done) / (total - warmup))

    name = f"linear(total={total:g}, warmup={warmup:g}, peak={peak:g}, floor={floor:g})"
    return _schedule(name, warmup, total, course, unit, peak)


def _cosine(name: str, period: float, warmup: float, peak: float, floor: float, unit: Unit, total: float) -> Schedule:
    _check_fall(period, warmup, floor, name)

    def course(done: float) -> float:
        return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * (done - warmup) / (period - warmup))) / 2)

    said = f"{name}({period:g}, warmup={warmup:g}, peak={peak:g}, floor={floor:g})"
    return _schedule(said, warmup, total, course, unit, peak)


def _schedule(
    name: str, warmup: float, total: float, course: Callable[[float], float], unit: Unit, peak: float
) -> Schedule:
    """``course`` behind a linear rise over ``warmup`` to where it then begins."""
    if unit not in ("steps", "tokens"):
        raise OptionError(f"{name}: unit {unit!r}; give steps or tokens")
    if not 0 <= warmup < math.inf or not 0 < peak < math.inf:
        raise OptionError(f"{name}: give a warm-up of 0 or more and a positive rate")

    def rate(done: float) -> float:
        return done / warmup * course(warmup) if done < warmup else course(done)

    return Schedule(name, unit, total, rate)


def _falling(shape: Shape, over: float, half_life: float) -> Callable[[float], float]:
    """The factor 1 -> 0 of a decay over ``over``, of what is done of it."""
    if shape == "exp":
        return lambda done: 0.5 ** (done / half_life)
    if shape == "linear":
        return lambda done: 1 - done / over
    return lambda done: 1 - math.sqrt(done / over)


def _check_fall(total: float, warmup: float, floor: float, name: str) -> None:
    _check_total(total, name)
    _check_share(floor, "floor", name)
    if not 0 <= warmup < total:
        raise OptionError(f"{name}: a warm-up of {warmup:g} leaves nothing of {total:g}; make it shorter")


def _check_total(total: float, name: str) -> None:
    if not 0 < total < math.inf:
        raise OptionError(f"{name}: a length of {total}; give a positive, finite one")


def _check_share(value: float, option: str, name: str) -> None:
    if not 0 <= value <= 1:
        raise OptionError(f"{name}: {option} = {value}; give a share within 0 to 1")
