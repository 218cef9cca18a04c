"""A study of merging: what is kept of each expert and what is gained elsewhere, by method and number of experts.

Row 95. Source: P. Yadav et al., "What Matters for Model Merging at Scale?", arXiv:2410.03617: experts of one base,
2, 4, ... of them merged by averaging, task arithmetic, DARE-TIES and TIES, judged on the experts' tasks and on others.
Differs from the source: scores are losses, so that held-in figures are shares of the experts' gain, not ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.merge.dare import Dare
from pennyweight.merge.engine import merge_tensors
from pennyweight.merge.formula import Formula
from pennyweight.merge.linear import Linear, TaskArithmetic
from pennyweight.merge.ties import Ties

Tensors = Mapping[str, Tensor]
#: A formula, or what makes parameters of the experts whose places it is given.
Way = Formula | Callable[[Sequence[int]], Tensors]

#: The four methods of the paper, each with the same grid of scales.
METHODS: dict[str, tuple[Formula, ...]] = {
    "average": (Linear(),),
    "task arithmetic": tuple(TaskArithmetic(scale=scale) for scale in (0.3, 0.6, 1.0)),
    "ties": tuple(Ties(density=0.2, scale=scale) for scale in (0.3, 0.6, 1.0)),
    "dare-ties": tuple(Dare(density=0.2, sign="ties", scale=scale) for scale in (0.3, 0.6, 1.0)),
}


@dataclass(frozen=True)
class Merge:
    """One line of a study.

    Attributes:
        method: its name.
        experts: how many were merged.
        held_in: share of the experts' gains that is kept on their own tasks, mean over tasks and choices of experts.
        held_out: loss on the other tasks, mean.
    """

    method: str
    experts: int
    held_in: float
    held_out: float


@dataclass(frozen=True)
class Study:
    """Every method with every number of experts.

    Attributes:
        merges: in order.
        base: mean loss of the base on the held-out tasks.
        experts: mean loss of the experts on the held-out tasks.
    """

    merges: tuple[Merge, ...]
    base: float
    experts: float

    def of(self, method: str, experts: int) -> Merge:
        """One line."""
        return next(one for one in self.merges if (one.method, one.experts) == (method, experts))

    def table(self) -> str:
        """Tab-separated lines with a head."""
        head = "method\texperts\tgain kept, held in\tloss, held out"
        lines = [f"{m.method}\t{m.experts}\t{m.held_in:.3f}\t{m.held_out:.4f}" for m in self.merges]
        ends = [f"base\t0\t0.000\t{self.base:.4f}", f"single experts\t1\t1.000\t{self.experts:.4f}"]
        return "\n".join([head, *ends, *lines])


def study(
    base: Tensors,
    experts: Sequence[Tensors],
    losses: Callable[[Tensors], Sequence[float]],
    *,
    counts: Sequence[int] = (2, 4),
    methods: Mapping[str, Sequence[Way]] | None = None,
) -> Study:
    """Merge neighbors among the experts, ``counts`` of them at a time, by every method, and judge what comes out.

    Args:
        base: parameters that all experts came from.
        experts: theirs, in the order of their tasks.
        losses: of given parameters on every task: those of the experts first, in order, then the held-out ones.
        counts: numbers of experts.
        methods: settings by name, the best of which on the held-in tasks stands for the method: formulas, or functions
            for what needs more than parameters, such as second moments or the models; None for `METHODS`.

    Raises:
        OptionError: more experts asked for than there are, or no held-out task.
    """
    if any(not 1 <= count <= len(experts) for count in counts):
        raise OptionError(f"study: {list(counts)} of {len(experts)} experts; give numbers up to that")
    before, after = losses(base), [losses(expert) for expert in experts]
    outside = range(len(experts), len(before))
    if not outside:
        raise OptionError("study: no held-out task; let losses give more tasks than there are experts")
    merges = []
    for name, settings in (methods or METHODS).items():
        for count in counts:
            tried = []
            for way in settings:
                kept, gone = [], []
                for first in range(len(experts) if count < len(experts) else 1):
                    chosen = [(first + n) % len(experts) for n in range(count)]
                    if isinstance(way, Formula):
                        merged: Tensors = merge_tensors(way, [experts[n] for n in chosen], base)
                    else:
                        merged = way(chosen)
                    found = losses(merged)
                    kept += [(before[n] - found[n]) / (before[n] - after[n][n]) for n in chosen]
                    gone += [found[n] for n in outside]
                tried.append(Merge(name, count, fmean(kept), fmean(gone)))
            merges.append(max(tried, key=lambda one: one.held_in))
    return Study(
        tuple(merges),
        fmean(before[n] for n in outside),
        fmean(found[n] for found in after for n in outside),
    )
