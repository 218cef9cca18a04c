"""The idealized runtime of a query: two terms fitted to a few runs tell how long any other takes.

Row 202. Source: D. Narayanan et al., "Cheaply Evaluating Inference Efficiency Metrics for Autoregressive Transformer
APIs", arXiv:2305.02440: a query of P prompt tokens that writes O takes ``F(P) + (O - 1) * g`` seconds, F piecewise
linear between the prompts that were run and g the slope over all runs; money and energy are these seconds at a price
and a power, times the devices the model needs. Differs from the source: F goes on with the slope of its last piece
beyond the longest prompt, and nothing is rounded to milliseconds.

Shape letters: P tokens of a prompt, O tokens written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pennyweight.errors import DataError, OptionError
from pennyweight.units import show_seconds

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from pennyweight.model.model import Model


@dataclass(frozen=True)
class Run:
    """One query that was timed: ``prompt`` tokens read, ``output`` written, in ``seconds``."""

    prompt: int
    output: int
    seconds: float


@dataclass(frozen=True)
class Idealized:
    """Fitted runtimes.

    Attributes:
        prompts: P that F is known at, rising.
        first_seconds: F there: until the first token is written.
        token_seconds: g, of each token after it.
        r_squared: of the runs fitted to.
    """

    prompts: tuple[int, ...]
    first_seconds: tuple[float, ...]
    token_seconds: float
    r_squared: float

    def runtime(self, prompt: int, output: int) -> float:
        """Seconds of a query.

        Raises:
            OptionError: no tokens to read, or none to write.
        """
        if prompt < 1 or output < 1:
            raise OptionError(f"idealized runtime: {prompt} tokens to read, {output} to write; give at least 1 of each")
        first = float(np.interp(prompt, self.prompts, self.first_seconds))
        if prompt > self.prompts[-1] and len(self.prompts) > 1:
            rise = self.first_seconds[-1] - self.first_seconds[-2]
            first += (prompt - self.prompts[-1]) * rise / (self.prompts[-1] - self.prompts[-2])
        return first + (output - 1) * self.token_seconds

    def price(self, prompt: int, output: int, *, device_hour: float, devices: int = 1) -> float:
        """What a query costs on ``devices`` devices of ``device_hour`` an hour each, in that unit."""
        return self.runtime(prompt, output) * devices * device_hour / 3600

    def joules(self, prompt: int, output: int, *, watts: float, devices: int = 1) -> float:
        """The energy of a query on ``devices`` devices that draw ``watts`` each."""
        return self.runtime(prompt, output) * devices * watts

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self)}

    def table(self) -> Table:
        """A rich table of F and g."""
        from pennyweight.measure.figures import plain_table

        pairs = zip(self.prompts, self.first_seconds, strict=True)
        rows = [(f"first token after {prompt}", show_seconds(seconds), "") for prompt, seconds in pairs]
        rows.append(("each token after it", show_seconds(self.token_seconds), f"R2 {self.r_squared:.4f}"))
        return plain_table("idealized runtime", ("", "seconds", ""), rows)


def fit(runs: Iterable[Run], *, opaque: bool = False) -> Idealized:
    """Fit F and g.

    Args:
        runs: of one model; of runs of the same query the shortest counts, which takes the noise of a shared service
            off.
        opaque: take F from a regression over the outputs of each prompt, no smaller than that of the shortest prompt,
            where runs that write one token are missing or say little.

    Raises:
        DataError: too few runs, or seconds that are none.
    """
    shortest: dict[tuple[int, int], float] = {}
    for run in runs:
        key = (run.prompt, run.output)
        if min(key) < 1 or not 0 < run.seconds < float("inf"):
            raise DataError(f"idealized runtime: {run} is no run; give tokens of at least 1 and seconds above 0")
        shortest[key] = min(shortest.get(key, float("inf")), run.seconds)
    first = (
        _opaque(shortest) if opaque else {prompt: took for (prompt, output), took in shortest.items() if output == 1}
    )
    missing = sorted({prompt for prompt, _ in shortest} - set(first))
    if missing:
        raise DataError(
            f"idealized runtime: no run of prompt {missing[0]} writes one token; add it, or give opaque=True and two "
            "outputs of each prompt"
        )
    found = np.array([(output, took - first[prompt]) for (prompt, output), took in shortest.items()])
    if len(set(found[:, 0])) < 2:
        raise DataError("idealized runtime: all runs write as many tokens; add some that write more")
    slope = float(np.polyfit(found[:, 0], found[:, 1], 1)[0])
    prompts = sorted(first)
    made = Idealized(tuple(prompts), tuple(first[prompt] for prompt in prompts), slope, 1.0)
    seen = np.array(list(shortest.values()))
    missed = seen - [made.runtime(*key) for key in shortest]
    spread = float(((seen - seen.mean()) ** 2).sum())
    share = 1 - float((missed**2).sum()) / spread if spread else 1.0
    return Idealized(made.prompts, made.first_seconds, slope, share)


def _opaque(shortest: dict[tuple[int, int], float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for prompt in sorted({prompt for prompt, _ in shortest}):
        points = [(output, took) for (at, output), took in shortest.items() if at == prompt]
        if len(points) > 1:
            slope, rest = np.polyfit([output for output, _ in points], [took for _, took in points], 1)
            found[prompt] = max(float(slope + rest), *([next(iter(found.values()))] if found else [0.0]))
    return found


def time_queries(
    model: Model | nn.Module,
    *,
    prompts: Sequence[int] = (16, 64, 256),
    outputs: Sequence[int] = (1, 16),
    repeats: int = 2,
) -> list[Run]:
    """Time queries of every prompt and output on this machine, greedily, batch 1.

    Args:
        model: a causal language model with a cache.
        prompts: P of each.
        outputs: O of each.
        repeats: of each query; all are returned.

    Raises:
        ModelError: it keeps no cache.
        OptionError: sizes below 1.
    """
    import torch

    from pennyweight.measure import decoding
    from pennyweight.model.model import Model

    if min(*prompts, *outputs, repeats, 1) < 1 or not prompts or not outputs:
        raise OptionError(
            f"idealized runtime: prompts {prompts}, outputs {outputs}, {repeats} repeats; at least 1 each"
        )
    module = model.module if isinstance(model, Model) else model
    runs = []
    for _ in range(repeats):
        for prompt in prompts:
            for output in outputs:
                # token 1 again and again: what is read says nothing of how long it takes
                one = decoding.greedy(module, torch.ones(prompt, dtype=torch.long), tokens=max(2, output))
                runs.append(Run(prompt, output, one.prefill + (output - 1) * one.decode))
    return runs
