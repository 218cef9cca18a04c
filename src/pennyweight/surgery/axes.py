"""Dimensions of tensors as unknowns: what must shrink together is found by making them equal.

A dimension is an `Axis`. Where a program cuts one into factors (``view``), joins pieces (``cat``) or adds two tensors,
the axes are bound to products, to concatenations, or to each other. When it has run, what is left unbound is what can
be shrunk: heads, hidden units, channels of a residual stream, each with every place that it appears in.

Source: first-order unification (J. A. Robinson, "A Machine-Oriented Logic Based on the Resolution Principle", J. ACM
12, 1965), over sizes. The use for pruning follows the idea of G. Fang et al., "DepGraph: Towards Any Structural
Pruning", arXiv:2301.12900. Differs from it: no table of layer types; dependencies come from the operations that ran,
and dimensions that are cut and joined keep their structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

#: What the trace says of an axis: it runs over heads (``parallel``), lies inside them (``inner``), or is averaged over.
Mark = Literal["parallel", "inner", "averaged"]


class Axis:
    """A dimension of ``size`` indices: unbound (a leaf), or equal to another one, a product, or a concatenation.

    Attributes:
        locked: why nothing may be removed from a leaf; empty where something may.
        marks: what the trace saw being done with a leaf.
    """

    __slots__ = ("kind", "locked", "marks", "parts", "size")

    def __init__(self, size: int, locked: str = "") -> None:
        self.size, self.locked = size, locked
        self.kind: Literal["leaf", "same", "product", "concat"] = "leaf"
        self.parts: list[Axis] = []
        self.marks: set[Mark] = set()

    def bind(self, kind: Literal["same", "product", "concat"], parts: Sequence[Axis]) -> None:
        """Say what this leaf is; whatever was known of it holds for its parts."""
        assert self.kind == "leaf", self.kind
        self.kind, self.parts = kind, list(parts)
        for part in self.parts:
            mark(part, *self.marks)
            if self.locked:
                lock(part, self.locked)


def find(axis: Axis) -> Axis:
    """The axis that ``axis`` was made equal to in the end."""
    while axis.kind == "same":
        axis = axis.parts[0]
    return axis


def leaves(axis: Axis) -> Iterator[Axis]:
    """The leaves of an axis, in order; one that appears twice comes twice."""
    axis = find(axis)
    if axis.kind == "leaf":
        yield axis
    else:
        for part in axis.parts:
            yield from leaves(part)


def parts(axis: Axis) -> Iterator[Axis]:
    """``axis`` itself, and every axis that it is made of."""
    axis = find(axis)
    yield axis
    for part in axis.parts:
        yield from parts(part)


def lock(axis: Axis, why: str) -> None:
    """Forbid to remove anything from ``axis``."""
    for leaf in leaves(axis):
        leaf.locked = leaf.locked or why


def mark(axis: Axis, *marks: Mark) -> None:
    """Note on every leaf what is done with it."""
    for leaf in leaves(axis):
        leaf.marks.update(marks)


def product(axes: Sequence[Axis]) -> Axis:
    """The axis over all combinations, the last factor fastest."""
    factors = [factor for axis in map(find, axes) for factor in (axis.parts if axis.kind == "product" else [axis])]
    return _joined("product", [factor for factor in map(find, factors) if factor.size != 1], prod)


def concat(axes: Sequence[Axis]) -> Axis:
    """The axis that runs over the pieces one after the other."""
    pieces = [piece for axis in map(find, axes) for piece in (axis.parts if axis.kind == "concat" else [axis])]
    return _joined("concat", [piece for piece in map(find, pieces) if piece.size], sum)


def _joined(kind: Literal["product", "concat"], parts: list[Axis], size: object) -> Axis:
    if len(parts) == 1:
        return parts[0]
    sizes = [part.size for part in parts]
    made = Axis(prod(sizes) if kind == "product" else sum(sizes))
    if parts:
        made.bind(kind, parts)
    return made


def unify(a: Axis, b: Axis, why: str = "") -> None:
    """Make two axes one: index i of the one is index i of the other."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        _give_up(a, b, why=why or f"sizes {a.size} and {b.size} meet")
    elif a.kind == "leaf":
        a.bind("same", [b])
    elif b.kind == "leaf":
        b.bind("same", [a])
    elif a.kind != b.kind:
        _give_up(a, b, why="pieces meet factors")
    else:
        _aligned(a, b)


def _aligned(a: Axis, b: Axis) -> None:
    """Unify two products, or two concatenations, over their common refinement."""
    ours, theirs = list(a.parts), list(b.parts)
    while ours and theirs:
        one, other = find(ours[0]), find(theirs[0])
        if one.size == other.size:
            unify(one, other)
            ours, theirs = ours[1:], theirs[1:]
            continue
        large, small = (ours, theirs) if one.size > other.size else (theirs, ours)
        step = find(small[0]).size
        parts = _cut(find(large[0]), step, a.kind)
        if parts is None:
            return _give_up(a, b, why="factors do not fit each other")
        large[:1] = parts
    return None


def _cut(axis: Axis, first: int, kind: str) -> list[Axis] | None:
    """``axis`` in two, the first of size ``first``; None where it cannot be."""
    if kind == "product":
        return split_product(axis, [first, axis.size // first]) if axis.size % first == 0 else None
    return split_concat(axis, [first, axis.size - first])


def _give_up(*axes: Axis, why: str) -> None:
    for axis in axes:
        lock(axis, why)


def _locked(axis: Axis, sizes: Sequence[int], why: str) -> list[Axis]:
    lock(axis, why)
    return [Axis(size, why) for size in sizes]


def split_product(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """``axis`` as factors of ``sizes``; where its structure does not allow it, new axes, and everything is locked."""
    axis = find(axis)
    assert prod(sizes) == axis.size, (axis.size, sizes)
    if len(sizes) == 1:
        return [axis]
    if axis.kind == "leaf":
        found = [Axis(size) for size in sizes]
        axis.bind("product", [factor for factor in found if factor.size != 1])
        return found
    if axis.kind == "concat":
        return _locked(axis, sizes, "pieces that were joined are cut into factors")
    factors, split = list(axis.parts), []
    for size in sizes:
        taken: list[Axis] = []
        left = size
        while left > 1:
            factor = find(factors.pop(0))
            if left % factor.size == 0:
                taken.append(factor)
                left //= factor.size
            elif factor.size % left == 0:
                head, rest = split_product(factor, [left, factor.size // left])
                taken.append(head)
                factors.insert(0, rest)
                left = 1
            else:
                return _locked(axis, sizes, "factors do not fit a view")
        split.append(product(taken) if taken else Axis(1))
    return split


def split_concat(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """``axis`` as pieces of ``sizes``, one after the other; locked where its structure does not allow it."""
    axis = find(axis)
    assert sum(sizes) == axis.size, (axis.size, sizes)
    if axis.size in sizes:
        return [axis if size else Axis(0) for size in sizes]
    if axis.kind == "leaf":
        made = [Axis(size) for size in sizes]
        axis.bind("concat", [piece for piece in made if piece.size])
        return made
    if axis.kind == "product":
        first, *rest = axis.parts
        inner = prod(find(part).size for part in rest)
        if any(size % inner for size in sizes):
            return _locked(axis, sizes, "a slice goes through the middle of a factor")
        return [product([piece, *rest]) for piece in split_concat(first, [size // inner for size in sizes])]
    pieces, found = list(axis.parts), []
    for size in sizes:
        taken, left = [], size
        while left:
            piece = find(pieces.pop(0))
            if piece.size > left:
                piece, after = split_concat(piece, [left, piece.size - left])
                pieces.insert(0, after)
            taken.append(piece)
            left -= piece.size
        found.append(concat(taken) if taken else Axis(0))
    return found


def mask_of(axis: Axis, kept: Mapping[Axis, Tensor]) -> Tensor:
    """Which indices of ``axis`` stay, (size,) bool, given which of each leaf do; other leaves stay whole."""
    axis = find(axis)
    if axis.kind == "leaf":
        return kept.get(axis, torch.ones(axis.size, dtype=torch.bool))
    masks = [mask_of(part, kept) for part in axis.parts]
    if axis.kind == "concat":
        return torch.cat(masks)
    found = masks[0]
    for factor in masks[1:]:
        found = (found[:, None] & factor).flatten()
    return found


def unit_of(axis: Axis, leaf: Axis) -> Tensor:
    """For each index of ``axis`` which index of ``leaf`` it belongs to, (size,); -1 where it belongs to none."""
    axis = find(axis)
    if axis is leaf:
        return torch.arange(axis.size)
    if axis.kind == "leaf":
        return torch.full((axis.size,), -1)
    parts = [unit_of(part, leaf) for part in axis.parts]
    if axis.kind == "concat":
        return torch.cat(parts)
    found = parts[0]
    for factor in parts[1:]:
        found = torch.maximum(found[:, None], factor).flatten()  # at most one factor holds the leaf
    return found
