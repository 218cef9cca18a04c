"""What levers share that train a whole model through masks: dense students in place, and the N:M weights they become.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.plan.slots import slots_of
from pennyweight.solvers.inputs import prunable
from pennyweight.solvers.masks import Selection, check_width, sparse
from pennyweight.statistics import Statistics
from pennyweight.train.masked import Masks
from pennyweight.weights import Dense, Sum, Weight
from pennyweight.work import Work


def students(model: Model, maps: Sequence[Map], pattern: str, where: str) -> dict[str, Dense]:
    """Put a float32 copy in the place of each of ``maps``; them by path.

    Raises:
        OptionError: a model that predicts no next tokens, or a width that ``pattern`` does not divide.
        FormError: a map that is compact in a way that pruning would throw away.
    """
    if model.kind != "causal-lm":
        raise OptionError(
            f"{where}: trains causal language models end to end, and {model.name} is of kind {model.kind}"
        )
    for found in maps:
        check_width(found.shape[1], pattern, f"{where}: {found.path}")
    made = {}
    for found in maps:
        held = getattr(model.module.get_submodule(found.path), found.parameter)
        whole = anatomy.matrix(model.module, found)
        matrix = prunable(held, f"{where}: {found.path}") if isinstance(held, Weight) else whole.float()
        made[found.path] = Dense(matrix.clone().contiguous())
    for path, student in made.items():
        anatomy.replace(model.module, path, student)
    return made


def beside(module: nn.Module, trained: Collection[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The floating-point parameters of ``module`` other than ``trained``: matrices, and vectors such as gains."""
    taken = {id(parameter) for parameter in trained}
    rest = [one for one in module.parameters() if id(one) not in taken and one.is_floating_point()]
    return [one for one in rest if one.ndim > 1], [one for one in rest if one.ndim <= 1]


def packed(
    module: nn.Module,
    matrices: Mapping[str, Tensor],
    kept: Sequence[Tensor],
    pattern: str,
    dtype: str,
    added: Mapping[str, Weight] | None = None,
) -> None:
    """Put what is ``kept`` of ``matrices`` (by path) into ``module``, as the pattern stores it, with what is added."""
    for (path, matrix), mask in zip(matrices.items(), kept, strict=True):
        weight: Weight = sparse(matrix, ~mask, pattern, dtype)
        if added is not None:
            weight = Sum(weight, added[path])
        anatomy.replace(module, path, weight)


class Adaptive:
    """Masks that are chosen anew every so many steps, by magnitude or, with input norms, by Wanda's score (row 48).

    A callback of `pennyweight.train.Trainer`.

    Args:
        masks: of the layers.
        pattern: such as "2:4".
        every: steps between two choices; 0 for masks that stay as they are chosen at the start.
        norms: (N,) of each layer, the norms of its inputs; None for magnitudes alone.

    Attributes:
        flips: share of the entries that changed sides at each choice but the first.
    """

    def __init__(self, masks: Masks, pattern: str, *, every: int, norms: Sequence[Tensor] | None = None) -> None:
        self.masks, self.every, self.norms = masks, every, norms
        self.selection = Selection(pattern=pattern)
        self.flips: list[float] = []
        self.steps = 0
        self._choose()

    def step(self) -> None:
        """Call once after each step of the optimizer."""
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self.flips.append(self._choose())

    def _choose(self) -> float:
        scores = [matrix.abs() for matrix in self.masks.matrices()]
        if self.norms is not None:
            scores = [one * norm for one, norm in zip(scores, self.norms, strict=True)]
        return self.masks.choose(self.selection.kept(scores)) / sum(one.numel() for one in scores)


def seen(model: Model, work: Work) -> Mapping[str, Statistics]:
    """Second moments of the inputs of the maps of ``work``, by name; of a table, what prices it for plans.

    Call it before any map is replaced.
    """
    if all(found.kind != "embedding" for found in work.maps):
        return work.statistics({"second_moment"})
    known = work.statistics({"second_moment", "gradient"})
    return {slot.name: slot.statistics for slot in slots_of(model.anatomy, known)}


def input_norms(known: Mapping[str, Statistics], maps: Sequence[Map], where: str) -> list[Tensor]:
    """(N,) of each map: the root of the mean square of each input."""
    return [torch.diagonal(known[found.name].need("second_moment", where)).sqrt() for found in maps]
