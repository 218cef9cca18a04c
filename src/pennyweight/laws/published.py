"""The published laws of size and tokens, side by side: what each says a training budget is best spent on.

None is averaged with another. They were fitted on other text, with other tokenizers and other counts of N, so that
their losses do not compare; how far their splits lie apart is the honest width of what is known.

Sources: T. Besiroglu et al., arXiv:2404.10102 (the digitized points of Hoffmann et al., fitted again here, with 200
bootstrap samples of the constants); J. Hoffmann et al., arXiv:2203.15556 (unrounded constants, from the replication's
notebook); N. Muennighoff et al., arXiv:2305.16264 (C4); T. Henighan et al., arXiv:2010.14701 (N of compute, language);
S. Hu et al., arXiv:2404.06395 (average of six corpora, N and D in 1e9, loss a byte).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files

import numpy as np

from pennyweight.laws import henighan, optimal
from pennyweight.laws.forms import find
from pennyweight.laws.law import Law, Range, law


@lru_cache(maxsize=1)
def refit() -> Law:
    """Chinchilla's digitized points, fitted by the robust fitter, with bootstrap samples: the law with intervals."""
    kept = json.loads((files("pennyweight.laws") / "chinchilla_refit.json").read_text("utf-8"))
    form = find("chinchilla")
    spans = {name: (float(low), float(high)) for name, (low, high) in kept["fit_range"].items()}
    return Law(
        form,
        kept["constants"],
        fit_range=spans,
        source="240 digitized points of Hoffmann et al., fitted here as Besiroglu et al. (arXiv:2404.10102) do",
        samples=form.internal(np.array(kept["samples"], dtype=float)),
    )


@lru_cache(maxsize=1)
def split_laws() -> dict[str, Law]:
    """Laws of N and D in single units and nats a token, by name."""
    return {
        "chinchilla (refit)": refit(),
        "chinchilla (Hoffmann et al.)": law(
            "chinchilla", source="J. Hoffmann et al., arXiv:2203.15556, unrounded", E=math.exp(0.5267228),
            A=math.exp(6.0073404), alpha=0.33917084, B=math.exp(6.0179186), beta=0.2849083,
        ),
        "C4 (Muennighoff et al.)": law(
            "chinchilla", source="N. Muennighoff et al., arXiv:2305.16264, appendix A", E=math.exp(0.6254804),
            A=math.exp(6.255414), alpha=0.3526596, B=math.exp(7.3049974), beta=0.3526596,
        ),
    }  # fmt: skip


#: Repetitions after which a repeated token is worth 1 - 1/e of a new one: N. Muennighoff et al., appendix A.
REPEATS = 15.387756


def effective_tokens(tokens: float, unique: float) -> float:
    """What ``tokens`` over ``unique`` ones are worth in new ones: U + U R* (1 - exp(-(D/U - 1)/R*))."""
    if tokens <= unique:
        return tokens
    return unique * (1 + REPEATS * (1 - math.exp(-(tokens / unique - 1) / REPEATS)))


@dataclass(frozen=True)
class Answer:
    """One law's split of a budget.

    Attributes:
        law: its name.
        N: parameters, as that law counts them.
        D: tokens.
        loss: in the law's own unit, which others do not share; None for a law of N alone.
        unit: of the loss.
        intervals: 95 % bootstrap intervals, where the law carries samples.
        source: where the constants come from.
        warning: how far beyond the fitted range this is, or None.
    """

    law: str
    N: float
    D: float
    loss: float | None
    unit: str
    intervals: dict[str, Range] = field(default_factory=dict)
    source: str = ""
    warning: str | None = None

    @property
    def ratio(self) -> float:
        """Tokens a parameter."""
        return self.D / self.N


def answers(train_flops: float) -> list[Answer]:
    """Every law's compute-optimal split of ``train_flops``, unconstrained."""
    found = []
    for name, one in split_laws().items():
        best = optimal.allocate(one, train_flops)
        warning = best.receipt.warning if best.receipt else None
        found.append(Answer(name, best.N, best.D, best.loss, "nats a token", best.intervals, one.source, warning))
    size = henighan.nopt("language", train_flops / 8.64e19)
    tokens = train_flops / (6 * size)
    found.append(Answer("language (Henighan et al.)", size, tokens, None, "", {}, "arXiv:2010.14701, table 1"))
    # the printed averages: alpha 0.29, beta 0.23, K^2 0.01, eta -0.10, with N, D in 1e9 and so compute in 1e18
    ratio = 0.01 * (train_flops / 1e18 / 6) ** -0.10
    size = math.sqrt(ratio * train_flops / 6)
    source = "arXiv:2404.06395, average constants"
    found.append(Answer("MiniCPM (average)", size, size / ratio, None, "", {}, source))
    return found
