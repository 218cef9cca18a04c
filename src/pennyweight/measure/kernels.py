"""Up to how many rows the routine for few rows is the faster way here, by kind of code and number format.

The routine (`pennyweight.weights.one_row`) reads codes as they are packed, once for each row; otherwise they become a
matrix first. Which wins depends on the processor. Both ways are timed in turn, on weights streamed from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from statistics import median

import torch

from pennyweight.measure.roofline import best
from pennyweight.weights import Quantized, Weight, one_row
from pennyweight.weights.entropy import EntropyCoded

_SHAPE = (1024, 768)
_COPIES = 24
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_ROUNDS = 3


def _coded(matrix: torch.Tensor) -> Weight:
    codes = (matrix * 8).round().to(torch.int32)
    scales = (torch.full((size,), 128, dtype=torch.uint8) for size in matrix.shape)
    return EntropyCoded.encode(codes, *scales, step=1 / 8)


def _grid(bits: int) -> Callable[[torch.Tensor], Weight]:
    return lambda matrix: Quantized.nearest(matrix, bits=bits, group_size=64)


#: What `one_row.limit` calls the kinds of codes, and how one is made.
KINDS: dict[str, Callable[[torch.Tensor], Weight]] = {"bytes": _coded, **{f"{b} bits": _grid(b) for b in range(1, 9)}}


@torch.no_grad()
def rows(*, report: Callable[[str, int, int], None] | None = None) -> dict[str, int]:
    """By kind and format ("4 bits float32"), the most rows up to which the routine is never the slower way; 0 where it
    already loses at one row.

    Args:
        report: called with what is measured, kinds done, and how many there are.
    """
    found: dict[str, int] = {}
    if one_row.routine() is None:
        return found
    matrix = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    for done, (kind, make) in enumerate(KINDS.items()):
        if report:
            report("measuring products of codes", done, len(KINDS))
        weights = [make(matrix)]
        weights += [deepcopy(weights[0]) for _ in range(_COPIES - 1)]
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{kind} {str(dtype).removeprefix('torch.')}"] = _limit(weights, kind, dtype)
    return found


def _limit(weights: list[Weight], kind: str, dtype: torch.dtype) -> int:
    most = 0
    for count in _ROWS:
        x = torch.ones(count, _SHAPE[1], dtype=dtype)

        def stream(x: torch.Tensor = x) -> None:
            for weight in weights:
                weight(x)

        taken: dict[int, list[float]] = {count: [], 0: []}  # by the limit that is set
        for _ in range(_ROUNDS):
            for limit, seconds in taken.items():
                with one_row.limited(kind, limit):
                    seconds.append(best(stream, repeats=1))
        if median(taken[count]) > median(taken[0]):
            break
        most = count
    return most
