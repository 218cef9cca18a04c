"""Products of one row with codes, read straight from the packed form by a C routine.

A token that is decoded multiplies one row with every matrix, and reading the matrix is what takes the time: codes are
half to a quarter of the bytes of bfloat16, or less, where nothing unpacks them first. Where there is no compiler, where
a gradient is wanted, or for more than a few rows, a weight computes as it always does.

Results differ from `Weight.forward`'s by the order of sums in float32. Shape letters: M out features, N in features,
R rows, G groups; ... any leading dimensions.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pennyweight import native
from pennyweight.safe_write import write_text
from pennyweight.weights.weight import Weight

#: Rows up to which the routine is used where `pennyweight.measure.kernels` has not measured it, by what products would
#: be taken in otherwise: beyond, unpacking once and a matrix product win.
ROWS = {torch.float32: 16, torch.float16: 16, torch.bfloat16: 4}
_MOST = 64  # rows that are worth asking about
WHOLE, PACKED, BRAIN, SINGLE = range(4)


class Matrix(ctypes.Structure):
    """``Matrix`` of ``products.h``."""

    _fields_ = (
        ("kind", ctypes.c_int32), ("m", ctypes.c_int32), ("n", ctypes.c_int32), ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32), ("groups", ctypes.c_int32), ("codes", ctypes.c_void_p), ("stride", ctypes.c_int64),
        ("row", ctypes.c_void_p), ("column", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p), ("far", ctypes.c_void_p), ("beyond", ctypes.c_void_p), ("count", ctypes.c_int64),
    )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A matrix as the routine reads it; what it points to is kept alive here.

    Attributes:
        matrix: the C structure.
        held: the tensors it points into.
    """

    matrix: Matrix
    held: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return int(self.matrix.m), int(self.matrix.n)


def limits_place() -> Path:
    """Where the measured numbers of rows are kept: by this machine's name and the number of threads."""
    return native.cache_directory() / f"rows-{platform.node()}-{torch.get_num_threads()}.json"


@cache
def _limits(home: str | None, threads: int) -> dict[str, int]:
    """What was measured; ``home`` and ``threads`` are what `limits_place` hangs on, asked for at every product."""
    try:
        kept = json.loads(limits_place().read_text("utf-8"))
        return {str(name): int(rows) for name, rows in kept["rows"].items()} if kept["of"] == routine() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not measured, or by another version


def routine() -> str | None:
    """The name of the compiled routine, which changes with its source; None without a compiler."""
    library = native.library("matvec")
    return None if library is None else Path(library._name).name


def keep_limits(rows: Mapping[str, int]) -> Path:
    """Keep what was measured, for every process from now on; where."""
    place = limits_place()
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, json.dumps({"of": routine(), "rows": dict(rows)}) + "\n")
    _limits.cache_clear()
    return place


def limit(kind: str, dtype: torch.dtype) -> int:
    """Rows in ``dtype`` up to which the routine is the faster way for codes of ``kind``, here and with these threads.

    Args:
        kind: as `pennyweight.measure.kernels` has them.
        dtype: that products would be taken in otherwise.
    """
    if kind in _FORCED:
        return _FORCED[kind]
    known = _limits(os.environ.get("PENNYWEIGHT_CACHE"), torch.get_num_threads())
    return known.get(f"{kind} {str(dtype).removeprefix('torch.')}", ROWS.get(dtype, 0))


_FORCED: dict[str, int] = {}


@contextmanager
def limited(kind: str, rows: int) -> Iterator[None]:
    """Use the routine for codes of ``kind`` up to ``rows`` rows, whatever was measured."""
    before = dict(_FORCED)
    _FORCED[kind] = rows
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


def usable(x: Tensor, weight: Weight, kind: str) -> bool:
    """Whether the routine may compute ``weight(x)``: a few rows on the CPU, nothing to differentiate or trace."""
    few = 0 < x.numel() <= _MOST * weight.shape[1] and x.numel() <= limit(kind, _otherwise(x)) * weight.shape[1]
    return few and _plain_product(x, weight)


def _otherwise(x: Tensor) -> torch.dtype:
    """What a product of ``x`` is taken in without the routine."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def _plain_product(x: Tensor, weight: Weight) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()  # someone counts or records what is computed
        and not torch.jit._trace.is_tracing()  # type: ignore[no-untyped-call]
        and not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in weight.parameters())))
        and native.library("matvec") is not None
    )


def whole(codes: Tensor, row: Tensor, column: Tensor, far: Tensor, beyond: Tensor) -> Prepared:
    """Of ``W[i, j] = row[i] * column[j] * code[i, j]``.

    Args:
        codes: (M, N) int8.
        row: (M,).
        column: (N,).
        far: (F, 2) int64, where codes are beyond a byte.
        beyond: (F,) int32, by how much.
    """
    held = (codes.contiguous(), row.float().contiguous(), column.float().contiguous(), far.contiguous(), beyond)
    m, n = codes.shape
    matrix = Matrix(
        kind=WHOLE, m=m, n=n, codes=held[0].data_ptr(), stride=n, row=held[1].data_ptr(), column=held[2].data_ptr(),
        far=held[3].data_ptr(), beyond=held[4].data_ptr(), count=len(beyond),
    )  # fmt: skip
    return Prepared(matrix, held)


def packed(codes: Tensor, scale: Tensor, offset: Tensor, *, columns: int, bits: int, group: int) -> Prepared:
    """Of ``W[i, j] = scale[i, g] * code[i, j] + offset[i, g]``.

    Args:
        codes: (M, bytes of a row) uint8, see `pennyweight.weights.packing`.
        scale: (M, G).
        offset: (M, G).
        columns: N.
        bits: of a code.
        group: columns that share a scale.
    """
    held = (codes.contiguous(), scale.float().contiguous(), offset.float().contiguous())
    matrix = Matrix(
        kind=PACKED, m=codes.shape[0], n=columns, bits=bits, group=group, groups=scale.shape[1],
        codes=held[0].data_ptr(), stride=codes.shape[1], scale=held[1].data_ptr(), offset=held[2].data_ptr(),
    )  # fmt: skip
    return Prepared(matrix, held)


def plain(matrix: Tensor) -> Prepared:
    """Of the matrix (M, N) itself: read in bfloat16 where it is that, else in float32."""
    held = matrix.detach().contiguous() if matrix.dtype == torch.bfloat16 else matrix.detach().float().contiguous()
    (m, n), kind = held.shape, BRAIN if held.dtype == torch.bfloat16 else SINGLE
    return Prepared(Matrix(kind=kind, m=m, n=n, codes=held.data_ptr(), stride=n * held.element_size()), (held,))


def mark_of(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """Addresses and versions of tensors: they change when these are moved, trained or overwritten."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


#: Beside the weights, not in them: what points into memory can be neither copied nor pickled.
_PREPARED: WeakKeyDictionary[Weight, tuple[tuple[tuple[int, int], ...], Prepared]] = WeakKeyDictionary()


def multiply(weight: Weight, tensors: tuple[Tensor, ...], prepare: Callable[[], Prepared], x: Tensor) -> Tensor:
    """``x @ W.T``: (..., N) -> (..., M), in the dtype of ``x``.

    Args:
        weight: `usable` with ``x``.
        tensors: those that ``weight`` is made of: when they change, it is prepared anew.
        prepare: makes what the routine reads.
        x: few rows.
    """
    library, matrix = native.library("matvec"), _known(weight, tensors, prepare).matrix
    assert library is not None
    m, n = matrix.m, matrix.n
    rows = x.detach().reshape(-1, n).float().contiguous()
    found = torch.empty(rows.shape[0], m)
    out_of, into, where, threads = rows.data_ptr(), found.data_ptr(), ctypes.byref(matrix), torch.get_num_threads()
    for index in range(rows.shape[0]):
        row, result = ctypes.c_void_p(out_of + 4 * n * index), ctypes.c_void_p(into + 4 * m * index)
        if library.matvec(where, row, result, threads):
            raise MemoryError(f"no memory for one row of {n} numbers")
    return found.view(*x.shape[:-1], m).to(x.dtype)


def expandable(x: Tensor, weight: Weight) -> bool:
    """Whether ``weight(x)`` is a product in bfloat16, for which the routine may make the matrix."""
    return _otherwise(x) == torch.bfloat16 and x.numel() > 0 and _plain_product(x, weight)


def expanded(weight: Weight, tensors: tuple[Tensor, ...], prepare: Callable[[], Prepared], x: Tensor) -> Tensor:
    """``x @ W.T`` in bfloat16: (..., N) -> (..., M), the matrix made at once, in the cache, and given up again.

    Args:
        weight: `expandable` with ``x``.
        tensors: as in `multiply`.
        prepare: as in `multiply`.
        x: any number of rows.
    """
    made = torch.empty(weight.shape, dtype=torch.bfloat16)
    expand([_known(weight, tensors, prepare)], made)
    return torch.nn.functional.linear(x.to(torch.bfloat16), made)


def expand(matrices: Sequence[Prepared], into: Tensor) -> None:
    """Write matrices of codes, one below the other.

    Args:
        matrices: of as many columns each, and of a kind with codes.
        into: (all rows, N) contiguous bfloat16.
    """
    library = native.library("matvec")
    assert library is not None
    assert all(one.matrix.kind in (WHOLE, PACKED) for one in matrices)
    pointers = (ctypes.POINTER(Matrix) * len(matrices))(*(ctypes.pointer(one.matrix) for one in matrices))
    if library.expand(pointers, len(matrices), ctypes.c_void_p(into.data_ptr()), torch.get_num_threads()):
        raise MemoryError(f"no memory for one row of {into.shape[1]} codes")


def _known(weight: Weight, tensors: tuple[Tensor, ...], prepare: Callable[[], Prepared]) -> Prepared:
    mark = mark_of(tensors)
    known = _PREPARED.get(weight)
    if known is None or known[0] != mark:
        known = _PREPARED[weight] = (mark, prepare())
    return known[1]
