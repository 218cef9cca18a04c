"""What `pennyweight laws` shows: the forms as cards, one form in full, and a prediction with its receipt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pennyweight.errors import UnitError
from pennyweight.laws.forms import Form, all_forms, find
from pennyweight.laws.law import DECLARED_FACTOR, Law, Prediction


@dataclass(frozen=True)
class Card:
    """What the registry knows of a form."""

    name: str
    row: int | None
    paper: str
    summary: str
    formula: str
    variables: Mapping[str, str]
    parameters: Mapping[str, str]
    target: str


def _card(form: Form) -> Card:
    return Card(
        name=form.name,
        row=form.row,
        paper=form.paper,
        summary=form.summary,
        formula=form.formula,
        variables={v.name: v.unit for v in form.variables},
        parameters={p.name: p.unit for p in form.parameters},
        target=form.target,
    )


def registry() -> tuple[Card, ...]:
    """Every form, by name."""
    return tuple(_card(form) for form in all_forms())


def show(name: str) -> Card:
    """One form.

    Raises:
        OptionError: no such form; the nearest names are offered.
    """
    return _card(find(name))


def predict_receipt(
    form: str | Law,
    constants: Mapping[str, float] | None = None,
    at: Mapping[str, float] | None = None,
    *,
    level: float = 0.95,
    max_factor: float = DECLARED_FACTOR,
    beyond: str = "warn",
) -> Prediction:
    """A prediction with its interval and receipt.

    Args:
        form: a fitted law, or the name of a form.
        constants: of the form, when it is given by name.
        at: the variables.
        level: of the interval.
        max_factor: extrapolation beyond which the receipt warns, or the prediction is refused.
        beyond: "warn" or "refuse".

    Raises:
        OptionError: an unknown form, or constants or variables missing.
        UnitError: a value that is no plain number.
        DataError: refused.
    """
    for name, value in {**(constants or {}), **(at or {})}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnitError(f"predict: {name} = {value!r} is no plain number; write 1.4e12, not '1.4T'")
    law = form if isinstance(form, Law) else Law(find(form), dict(constants or {}))
    return law.predict(level=level, max_factor=max_factor, beyond=beyond, **dict(at or {}))
