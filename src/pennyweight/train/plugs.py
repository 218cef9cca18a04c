"""Plugs: one student for each run of blocks or part of a block, trained alone, so that any of them can be switched in.

Row 24. Source: "Pluggable Pruning with Contiguous Layer Distillation for Diffusion Transformers" (PPCL),
arXiv:2511.16156, and its released training (a student starts as the middle block of its run, is given what the
*teacher* has before the run, and learns the teacher's stream behind it; token vectors are compared at unit length).
Width goes by plugs as well: a linear layer for a part of a block (`pennyweight.solvers.projections`), taught in the
same passes. Differs from the source: one stream, and an option for the length of token vectors, which unit vectors
cannot teach.

Shape letters: ... any leading dimensions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import OptionError
from pennyweight.model import anatomy
from pennyweight.model.resized import is_counter, note, resized_of
from pennyweight.solvers.probes import Interval
from pennyweight.solvers.projections import Projection
from pennyweight.surgery import remove_blocks
from pennyweight.surgery.settle import changed
from pennyweight.surgery.trace import run

Inputs = Mapping[str, Any] | Sequence[Any]


def unit_error(student: Tensor, teacher: Tensor, *, length: float = 0.0) -> Tensor:
    """Squared distance of token vectors (..., D) at unit length, mean over tokens; ``length`` weighs the plain one."""
    at_unit = (functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)).square().sum(-1).mean()
    return at_unit + length * functional.mse_loss(student, teacher) if length else at_unit


class Plugs:
    """Students for runs of a teacher's blocks and for parts of others; only `keep` changes ``module``.

    Args:
        module: the teacher, in eval mode.
        intervals: runs that share no block.
        projections: of parts that lie in no run, and in none of each other.

    Attributes:
        students: one for each interval, in order, then one for each projection.

    Raises:
        OptionError: runs or parts that overlap, or that the model has not.
    """

    def __init__(
        self, module: nn.Module, intervals: Sequence[Interval], projections: Sequence[Projection] = ()
    ) -> None:
        paths = [block.path for block in anatomy.of(module).blocks]
        taken = [block for one in intervals for block in one.blocks]
        if not (intervals or projections) or (
            taken and (len(set(taken)) < len(taken) or not 0 <= min(taken) <= max(taken) < len(paths))
        ):
            runs = ", ".join(f"{one.first}-{one.last}" for one in intervals) or "none"
            raise OptionError(f"plugs: runs {runs} of {len(paths)} blocks; give some that share none")
        self.module, self.intervals, self.projections = module, tuple(intervals), tuple(projections)
        #: by student, the paths of the modules that it stands for, in the order they run
        self._stands = [[paths[block] for block in one.blocks] for one in intervals]
        self._stands += [[one.path] for one in projections]
        whole = [path for stands in self._stands for path in stands]
        for at, path in enumerate(whole):
            if any(f"{path}.".startswith(f"{other}.") for other in (*whole[:at], *whole[at + 1 :])):
                raise OptionError(f"plugs: {path} goes with another plug already; give parts that share nothing")
        students = [
            _numbered(copy.deepcopy(module.get_submodule(paths[(one.first + one.last) // 2])), module, paths[one.first])
            for one in intervals
        ]
        students += [one.layer(next(module.get_submodule(one.path).parameters())) for one in projections]
        self.students = nn.ModuleList(students)

    def train(
        self,
        batches: Callable[[int], Inputs],
        *,
        steps: int,
        rate: float = 1e-3,
        length: float = 0.1,
        only: Collection[int] | None = None,
    ) -> list[float]:
        """Train the students, each on the teacher's own streams; the summed loss of every step.

        Args:
            batches: gives the inputs of a step.
            steps: of all students at once.
            rate: peak of a cosine.
            length: weight of the error of the vectors as they are, beside that at unit length.
            only: which of them; None for all.
        """
        chosen = range(len(self.students)) if only is None else sorted(only)
        parameters = [weight for index in chosen for weight in self.students[index].parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        losses = []
        for step in range(steps):
            seen = self._watched(batches(step))
            loss = torch.stack([self._loss(index, *seen[index], length) for index in chosen]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        return losses

    def _loss(self, index: int, args: Any, kwargs: Any, wanted: Tensor, length: float) -> Tensor:
        found = self.students[index](*args, **kwargs)
        return unit_error(found[0] if isinstance(found, tuple) else found, wanted, length=length)

    def _watched(self, inputs: Inputs) -> dict[int, tuple[Any, Any, Tensor]]:
        """What the teacher gives each run, and what it has behind it, in one pass."""
        given: dict[int, tuple[Any, Any]] = {}
        behind: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for index, stands in enumerate(self._stands):
                first, last = self.module.get_submodule(stands[0]), self.module.get_submodule(stands[-1])

                def before(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                    given[index] = (args, kwargs)

                def after(_: nn.Module, args: Any, found: Any, index: int = index) -> None:
                    behind[index] = found[0] if isinstance(found, tuple) else found

                stack.callback(first.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(last.register_forward_hook(after).remove)
            with changed(self.module, {"use_cache": False}):  # students would attend to what is kept of the teacher
                run(self.module, inputs)
        return {index: (*given[index], behind[index]) for index in given}

    @contextmanager
    def on(self, which: Collection[int]) -> Iterator[nn.Module]:
        """The model with the students ``which`` in place of their runs, for as long as this lasts."""
        with ExitStack() as stack:
            for index in which:
                for place, path in enumerate(self._stands[index]):
                    layer = self.module.get_submodule(path)
                    stack.callback(setattr, layer, "forward", layer.forward)
                    setattr(layer, "forward", _passed if place else self.students[index].forward)  # noqa: B010  mypy
            yield self.module

    def keep(self, which: Collection[int], inputs: Inputs) -> None:
        """Put the students ``which`` into the module for good, and take the rest of their runs out.

        Args:
            which: places of students.
            inputs: to hold the shrunk model against, by `pennyweight.surgery.remove_blocks`.
        """
        gone: list[int] = []
        linear: dict[str, tuple[int, int]] = {}
        for index in which:
            student, path = self.students[index], self._stands[index][0]
            self.module.set_submodule(path, student)
            if index < len(self.intervals):
                gone += self.intervals[index].blocks[1:]
            else:
                assert isinstance(student, nn.Linear)
                linear[path] = (student.out_features, student.in_features)
        known = resized_of(self.module)
        if linear:
            note(self.module, replace(known, linear={**known.linear, **linear}))
        remove_blocks(self.module, gone, inputs)


def _numbered(student: nn.Module, module: nn.Module, path: str) -> nn.Module:
    """``student`` with the numbers that tell blocks apart (of a cache's layer) as the block at ``path`` has them."""
    blocks, first = list(module.get_submodule(path.rpartition(".")[0]).children()), module.get_submodule(path)
    for inner, part in student.named_modules():
        for key, value in list(vars(part).items()):
            if type(value) is int and is_counter(blocks, inner, key):
                setattr(part, key, getattr(first.get_submodule(inner), key))
    return student


def _passed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Hands its stream on."""
    return x
