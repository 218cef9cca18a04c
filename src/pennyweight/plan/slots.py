"""Slots of a model: the matrices the planner may change, each with the statistics that price a change of it.

A tied embedding is one slot that serves twice: as the head, where a row's error meets every hidden state, and as the
look-up, where it meets only its own token. Its damage is ``0.5 sum_i (g_i e_i H e_i^T + f_i e_i B e_i^T)`` with g the
head's output gradients, H the second moment of its inputs, f the share of tokens that are token i and B the second
moment of the looked-up vectors' gradients; the slot prices it by one quadratic form and one weight a row, which is
that sum exactly where H and B are proportional.

Shape letters: V tokens of the vocabulary, N width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pennyweight.model import anatomy
from pennyweight.model.anatomy import Anatomy, Map
from pennyweight.statistics import Statistics

#: How far row weights of a table are drawn to their mean: raw ones overfit the calibration text, in which nine tokens
#: of ten do not occur.
_SHRINK = 0.3


@dataclass(frozen=True)
class Slot:
    """One place the planner fills.

    Attributes:
        map: the map that is replaced (with what is tied to it).
        source: what prices a change of it, or a function that fetches it.
        group: "embedding" or "blocks": damage predictions are rescaled to measurements group by group.
    """

    map: Map
    source: Statistics | Callable[[], Statistics]
    group: str

    @property
    def statistics(self) -> Statistics:
        """What prices a change of it; fetched anew each time where ``source`` is a function."""
        return self.source if isinstance(self.source, Statistics) else self.source()

    @property
    def name(self) -> str:
        """The map's name."""
        return self.map.name


def slots_of(anatomy_: Anatomy, statistics: Mapping[str, Statistics]) -> tuple[Slot, ...]:
    """Every replaceable layer that has statistics, in order of the model.

    Args:
        anatomy_: of the model.
        statistics: by map name, from `pennyweight.calibrate.collect`.
    """
    found = []
    for layer in anatomy_.layers():
        ends = {end.name for end in (anatomy_.embedding, anatomy_.head) if end is not None}
        if anatomy_.tied and layer.name in ends:
            assert anatomy_.embedding is not None
            assert anatomy_.head is not None
            found.append(
                Slot(layer, tied(statistics[anatomy_.embedding.name], statistics[anatomy_.head.name]), "embedding")
            )
        elif layer.name in statistics:
            fetch = partial(statistics.__getitem__, layer.name)
            found.append(Slot(layer, fetch, "embedding" if layer.name in ends else "blocks"))
    return tuple(found)


def tied(lookup: Statistics, head: Statistics) -> Statistics:
    """The statistics that price one table used as embedding and as head.

    Args:
        lookup: of the embedding: ``second_moment`` is B (N, N), the mean of the squared gradients of looked-up vectors,
            ``gradient`` is f (V,), the share of tokens that are token i.
        head: of the head: ``second_moment`` is H (N, N), ``gradient`` is g (V,).
    """
    h, b = head.need("second_moment", "planner"), lookup.need("second_moment", "planner")
    g, f = head.need("gradient", "planner").double(), lookup.need("gradient", "planner").double()
    # a token the calibration text lacks is looked up some day: its share is what the model itself expects of it, and
    # g, the mean of p(1 - p), is just that
    f = 0.5 * f / f.sum().clamp_min(1e-30) + 0.5 * g / g.sum().clamp_min(1e-30)
    form = h.double() * g.mean() + b.double() * f.mean()
    rows = g * h.diagonal().double().sum() + f * b.diagonal().double().sum()
    rows = (1 - _SHRINK) * rows / rows.mean().clamp_min(1e-30) + _SHRINK
    return replace(head, second_moment=form.float(), gradient=rows.float())


def matrix_of(module: torch.nn.Module, slot: Slot) -> Tensor:
    """The slot's matrix (M, N) as it is now."""
    return anatomy.matrix(module, slot.map).detach()
