"""Functions of numbers that take arrays as well."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def elementwise(function: Function) -> Function:
    """Lets a function of numbers take arrays, lists and tensors, broadcast against each other.

    Numbers go through unchanged. Of arrays the answer is an array of their shape; a scalar of NumPy or torch counts as
    a number, in float64. Texts and None are passed on.
    """

    @functools.wraps(function)
    def mapped(*args: Any, **options: Any) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **options}
        arrays = {
            at: np.asarray(value, dtype=float)
            for at, value in given.items()
            if isinstance(value, (list, tuple)) or hasattr(value, "__array__")
        }
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
