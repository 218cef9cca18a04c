"""Functions of numbers that take arrays as well."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from pennyweight.errors import OptionError

Function = TypeVar("Function", bound=Callable[..., Any])


def elementwise(function: Function) -> Function:
    """Lets a function of numbers take arrays, lists and tensors, broadcast against each other.

    Numbers go through unchanged. Of arrays the answer is an array of their shape; a scalar of NumPy or torch counts as
    a number, in float64. Texts and None are passed on, except where the function says ``float``: there they are
    refused.
    """
    order = list(inspect.signature(function).parameters.values())
    plain = {parameter.name for parameter in order if parameter.annotation in ("float", float)}

    @functools.wraps(function)
    def mapped(*args: Any, **options: Any) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **options}
        arrays = {}
        for at, value in given.items():
            name = at if isinstance(at, str) else order[at].name if at < len(order) else ""
            if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
                try:
                    arrays[at] = np.asarray(value, dtype=float)
                except (TypeError, ValueError):
                    raise _no_number(function.__name__, name, value) from None
            elif name in plain and not isinstance(value, (int, float)):
                raise _no_number(function.__name__, name, value)
        if not arrays:
            return function(*args, **options)
        shape = np.broadcast_shapes(*(array.shape for array in arrays.values()))
        columns = {at: np.broadcast_to(array, shape).reshape(-1).tolist() for at, array in arrays.items()}
        found = []
        for row in range(int(np.prod(shape))):
            one = given | {at: column[row] for at, column in columns.items()}
            found.append(function(*(one[at] for at in range(len(args))), **{at: one[at] for at in options}))
        return found[0] if shape == () else np.array(found).reshape(shape)

    return cast(Function, mapped)


def numbers(where: str, **given: Any) -> None:
    """Refuses what is not one number each: text, None, arrays, NaN.

    Raises:
        OptionError: naming the first of them.
    """
    for name, value in given.items():
        try:
            found = math.nan if isinstance(value, (str, bytes)) or np.ndim(value) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        if math.isnan(found):
            raise _no_number(where, name, value)


def _no_number(where: str, name: str, value: Any) -> OptionError:
    shown = " ".join(repr(value).split())
    return OptionError(f"{where}: {name} = {shown if len(shown) < 60 else shown[:56] + ' ...'}; give a number")
