"""Published tables that claims fit laws to; the README beside this names their sources."""

from __future__ import annotations

import csv
from functools import lru_cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=4)
def columns(name: str) -> dict[str, NDArray[np.float64]]:
    """The columns of a table, as numbers."""
    lines = (files("pennyweight.claims.tables") / f"{name}.csv").read_text("utf-8").splitlines()
    rows = list(csv.reader(lines))
    return {head: np.array([float(row[at]) for row in rows[1:]]) for at, head in enumerate(rows[0])}
