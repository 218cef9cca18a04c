"""Everything Pennyweight raises on purpose.

PennyweightError
├── UserError (ValueError)       what a user gave cannot be used; the command line exits with 2
│   ├── ShapeError               shapes that do not fit each other
│   ├── FormError                a weight or structure that no form can hold (unknown form, NaN, wrong dtype)
│   ├── OptionError              an option outside its range, unknown, or without effect
│   ├── UnitError                a quantity that cannot be read ("25 %%")
│   ├── RecipeError              a recipe that is malformed or does not fit the model
│   ├── BudgetError              a budget or floor that cannot be met
│   ├── ModelError               a model that cannot be read, or is not what it should be
│   ├── DataError                data missing, empty or too short
│   └── OutputError              a place that cannot be written, or already holds results
└── MissingExtraError (ImportError)   an optional dependency is not installed

A message says where, what was asked, what is there, and what to do, in one line. Our own bugs are ``assert``s.
"""


class PennyweightError(Exception):
    """Root of every error Pennyweight raises on purpose."""


class UserError(PennyweightError, ValueError):
    """Something a user gave cannot be used."""


class ShapeError(UserError):
    """Shapes that do not fit each other."""


class FormError(UserError):
    """A weight or a structure that no form can hold."""


class OptionError(UserError):
    """An option outside its range, unknown, or without effect here."""


class UnitError(UserError):
    """A quantity that cannot be read."""


class RecipeError(UserError):
    """A recipe that is malformed or does not fit the model."""


class BudgetError(UserError):
    """A budget or a floor that cannot be met."""


class ModelError(UserError):
    """A model that cannot be read, or is not what it should be."""


class DataError(UserError):
    """Data that is missing, empty or too short."""


class OutputError(UserError):
    """A place that cannot be written, or that already holds results."""


class MissingExtraError(PennyweightError, ImportError):
    """An optional dependency is not installed."""
