"""Compressed tables of embeddings, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pennyweight.errors import OptionError


def embeddings(
    data: Annotated[
        str, typer.Argument(metavar="[DATA]", help="tweets, polarity, or a CSV file with columns text and label.")
    ] = "tweets",
    methods: Annotated[str | None, typer.Option(help="Of tables: robe,int,...; all fourteen when left out.")] = None,
    budgets: Annotated[str, typer.Option(help="Shares of the table in 32 bits.")] = "0.5,0.1,0.02",
    width: Annotated[int, typer.Option(min=1, help="Of a row.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Of training, for each.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there, too.")] = None,
) -> None:
    """Train ways to make an embedding table small under one budget: quality, bytes, look-ups, memory of training."""
    import dataclasses

    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import emit, show
    from pennyweight.embeddings import METHODS, bench, report, word_bags
    from pennyweight.embeddings.bench import FOURTEEN

    names = list(FOURTEEN) if methods is None else methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise OptionError(f"embeddings: no method is called {unknown[0]!r}; there are {', '.join(METHODS)}")
    try:
        shares = [float(word) for word in budgets.split(",")]
    except ValueError as error:
        raise OptionError(f"embeddings: --budgets: {error}; give numbers with commas between") from None
    if not all(0 < share <= 1 for share in shares):
        raise OptionError(f"embeddings: --budgets {budgets!r}; give shares above 0, at most 1")
    done = 0
    with progress() as told:

        def count(_: object) -> None:
            nonlocal done
            done += 1
            told("training tables", done, len(shares) * len(names))

        found = bench(
            word_bags(data), budgets=shares, methods=names, width=width, steps=steps, seed=seed, report=count
        )  # fmt: skip
    show(report(found))
    if json:
        emit([dataclasses.asdict(one) for one in found], json)
