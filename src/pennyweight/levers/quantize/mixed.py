"""Mixed precision: every layer at the width that its sensitivity asks for.

Row 5. Source: C. J. S. Schaefer et al., "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision
Post-Training Quantization", arXiv:2306.04879: scores from the Hessian, with what layers do to each other, and a
bisection that meets a stated degradation. Scores and searchers are shared with rows 56, 124 and 172:
`pennyweight.plan.widths`, `pennyweight.plan.sensitivity`, `pennyweight.plan.bits`. Differs from the source: see there;
only weights get their widths here, and the floor is a test on half of the calibration windows, the other half of which
the scores have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pennyweight.calibrate.walk import Windows
from pennyweight.errors import BudgetError, DataError, OptionError
from pennyweight.lever import Check, at_least, between, lever, one_of, option
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model.model import Model
from pennyweight.plan.allocation import SEARCHES, Allocation, bits
from pennyweight.plan.harm import Harm
from pennyweight.plan.slots import slots_of
from pennyweight.plan.widths import SCORES, Widths
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.work import Work

_WIDTHS = Check(
    "at least two of 1 to 8 and 16, falling",
    lambda given: (
        len(given) > 1
        and all(isinstance(b, int) and (1 <= b <= 8 or b == 16) for b in given)
        and list(given) == sorted(set(given), reverse=True)
    ),
)


@lever(
    "quantize.mixed",
    reach="model",
    row=5,
    paper="Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization, "
    "arXiv:2306.04879",
)
@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Choose a width for every layer by its sensitivity, under a mean of bits or a ceiling on measured harm."""

    widths: tuple[int, ...] = option((8, 4), _WIDTHS, "bits to choose from, mild to harsh; 16: the layer as it is")
    score: str = option("hessian+pairs", one_of(*SCORES), "what is called sensitive; see pennyweight.plan.widths")
    search: str = option("greedy", one_of(*SEARCHES), "how widths are found; bisect measures, the others add scores up")
    average_bits: float | None = option(
        None, between(1, 16), "most mean stored bits a weight, scales and zeros included; for all but bisect"
    )
    most_harm: float | None = option(
        None, at_least(0), "for bisect: harm allowed on calibration text, such as nats a token (pennyweight.plan.harm)"
    )
    method: str = option("rtn", one_of("rtn", "gptq"), "how a layer is rounded at a width")
    group_size: int | None = option(128, at_least(1), "input features that share a scale; none: the whole row")
    protect: float = option(0.0, between(0, 0.99), "share of the layers, the most sensitive, that keep their mildest")
    probes: int = option(50, at_least(2), "random vectors of the Hessian's trace")
    windows: int = option(8, at_least(1), "calibration windows that scores look at")
    length: int | None = option(64, at_least(2), "tokens of those windows that scores look at; none: all")
    order: str = option("greedy", one_of("static", "greedy"), "for bisect: how interactions enter the order of layers")
    per_byte: bool = option(False, one_of(True, False), "for bisect: divide scores by the bytes saved")

    def __post_init__(self) -> None:
        if self.search == "bisect" and (self.most_harm is None or self.average_bits is not None):
            raise OptionError("quantize.mixed: bisect goes as far as most_harm allows; give it, and no average_bits")
        if self.search != "bisect" and (self.average_bits is None or self.most_harm is not None):
            raise OptionError(
                f"quantize.mixed: {self.search} spends average_bits; give it, and no most_harm (search: bisect)"
            )
        if self.search == "milp" and self.score.endswith("+pairs"):
            raise OptionError(
                f"quantize.mixed: milp cannot see the pairs of {self.score}; search by exact, greedy or bisect, or "
                f"score by {self.score.removesuffix('+pairs')}"
            )

    def change(self, model: Model, work: Work) -> None:
        """Replace the layers by what `choose` finds."""
        widths, found = self.choose(model, work)
        widths.put(found.pick)

    def choose(self, model: Model, work: Work) -> tuple[Widths, Allocation]:
        """Every layer at every width, and the width of each.

        Raises:
            BudgetError: a mean of bits, or a harm, that cannot be met.
            DataError: too few windows.
        """
        statistics = self._statistics(work)
        options: dict[str, Any] = {"group_size": self.group_size}
        cls = GPTQ if self.method == "gptq" else RTN
        levers = [None if width == 16 else cls(bits=width, **options) for width in self.widths]
        known: Mapping[str, Statistics] = statistics or {one.name: NO_STATISTICS for one in work.maps}
        widths = Widths.solve(model, work.maps, levers, known)
        work.report("widths", 1, 3)
        seen, unseen = self._windows(work)
        scores, pairs = widths.scores(
            self.score, harm=None if seen is None else Harm(model, seen, batch=4), statistics=statistics,
            probes=self.probes, seed=work.seed,
        )  # fmt: skip
        work.report("widths", 2, 3)
        layers = widths.layers(scores, pairs)
        if self.search == "bisect":
            assert unseen is not None
            assert self.most_harm is not None
            found = bits(
                layers, search="bisect", measure=widths.measure(Harm(model, unseen)), most_harm=self.most_harm,
                order=self.order, per="bytes" if self.per_byte else None, protect=self.protect,  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            assert self.average_bits is not None
            count = sum(one.shape[0] * one.shape[1] for one in work.maps)
            room = {"bits": math.floor(self.average_bits * count)}
            least = layers.problem.least("bits")
            if least > room["bits"]:
                raise BudgetError(
                    f"quantize.mixed: average_bits = {self.average_bits:g} cannot be met: {self.widths[-1]} bits with "
                    f"their scales are {least / count:.3g} bits a weight; raise it, or give a wider group_size"
                )
            found = bits(layers, room, search=self.search, protect=self.protect)  # type: ignore[arg-type]
        work.report("widths", 3, 3)
        return widths, found

    def _statistics(self, work: Work) -> dict[str, Statistics]:
        needs = {"second_moment"} if self.method == "gptq" or self.score == "kfac" else set()
        if self.score == "kfac":
            needs.add("gradient")
        if not needs:
            return {}
        found = work.statistics(needs)
        if self.score == "kfac":  # a tied table is priced as both of the things it does
            return {slot.name: slot.statistics for slot in slots_of(work.model.anatomy, found)}
        return found

    def _windows(self, work: Work) -> tuple[Windows | None, Windows | None]:
        """What scores look at, and what the floor is measured on: no window is both."""
        looks = self.score not in ("error", "kfac")
        if not looks and self.search != "bisect":
            return None, None
        given = work.inputs("quantize.mixed")
        tensors = {"": given} if isinstance(given, Tensor) else dict(given)
        count = len(next(iter(tensors.values())))
        wanted = min(self.windows, count // 2) if self.search == "bisect" else min(self.windows, count)
        if wanted < 1 or (self.search == "bisect" and count - wanted < 2):
            raise DataError(
                f"quantize.mixed: {count} calibration windows; bisection takes some for scores and others, at least "
                "two, for the floor: give four or more"
            )
        seen = {name: self._cut(tensor[:wanted]) for name, tensor in tensors.items()}
        unseen = {name: tensor[wanted:] for name, tensor in tensors.items()}
        if isinstance(given, Tensor):
            return seen[""], unseen[""]
        return seen, unseen

    def _cut(self, tensor: Tensor) -> Tensor:
        """Token ids (windows, tokens), shortened; anything else as it is."""
        return tensor[:, : self.length] if tensor.ndim == 2 and not tensor.is_floating_point() else tensor
