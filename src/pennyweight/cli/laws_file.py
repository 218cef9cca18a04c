"""Laws kept in a file by ``pennyweight laws fit --json``: the receipt, and the bootstrap's constants for intervals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.errors import DataError, OptionError, UserError
from pennyweight.laws import Law, forms, published


def plain(law: Law) -> dict[str, Any]:
    """The law as JSON has it; the samples as they are fitted, logarithms of what is positive."""
    return {**law.receipt().to_json(), "samples": None if law.samples is None else law.samples.tolist()}


def read(path: Path) -> Law:
    """The law in the file at ``path``.

    Raises:
        DataError: it cannot be read, or is not a law.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        constants = {str(name): float(value) for name, value in found["constants"].items()}
        spans = {str(name): (float(low), float(high)) for name, (low, high) in found["fit_range"].items()}
        form = forms.find(str(found["form"]))
        if unknown := [name for name, value in constants.items() if math.isnan(value)]:
            raise ValueError(f"{', '.join(unknown)} not a number")
        axis = next((name for name in spans if name not in [v.name for v in form.variables]), None)
        samples = None
        if found.get("samples"):
            samples = np.array(found["samples"], dtype=float)
            if samples.ndim != 2 or samples.shape[1] != len(form.parameters):
                raise ValueError(f"samples of shape {samples.shape}")
        return Law(form, constants, fit_range=spans, source=str(found["source"]), axis=axis, samples=samples)
    except UserError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a file that `laws fit --json` wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"{path}: not a law ({reason}); give a file that `laws fit --json` wrote") from None


def chosen(name: str) -> str | Law:
    """What ``plan --law`` says: a built-in law's name as it is, else the law in that file, called by the file's name.

    Raises:
        OptionError: neither a file nor a built-in law.
        DataError: a file that is not a law.
    """
    known = published.split_laws()
    if name in known:
        return name
    path = Path(name)
    if not path.exists():
        raise OptionError(
            f"plan: --law {name}: there is no such file; give one that `laws fit --json` wrote, or a built-in law: "
            f"{', '.join(known)}"
        )
    found = read(path)
    return replace(found, source=f"{path.name} ({found.source})")
