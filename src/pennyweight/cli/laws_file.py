"""Laws kept in a file by ``pennyweight laws fit --json``."""

from __future__ import annotations

import json
from pathlib import Path

from pennyweight.errors import DataError, UserError
from pennyweight.laws import Law, forms


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
        axis = next((name for name in spans if name not in [v.name for v in form.variables]), None)
        return Law(form, constants, fit_range=spans, source=str(found["source"]), axis=axis)
    except UserError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a file that `laws fit --json` wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"{path}: not a law ({reason}); give a file that `laws fit --json` wrote") from None
