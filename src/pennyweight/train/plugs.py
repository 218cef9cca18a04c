"""Plugs: one student block for each run of blocks, trained alone, so that any of them can be switched in.

Row 24. Source: "Pluggable Pruning with Contiguous Layer Distillation for Diffusion Transformers" (PPCL),
arXiv:2511.16156, and its released training (a student starts as the middle block of its run, is given what the
*teacher* has before the run, and learns the teacher's stream behind it; token vectors are compared at unit length).
Differs from the source: one stream, an option for the length of token vectors, which unit vectors cannot teach, and no
second stage that prunes the text stream's width.

Shape letters: ... any leading dimensions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import OptionError
from pennyweight.model import anatomy
from pennyweight.solvers.probes import Interval
from pennyweight.surgery import remove_blocks
from pennyweight.surgery.trace import run

Inputs = Mapping[str, Any] | Sequence[Any]


def unit_error(student: Tensor, teacher: Tensor, *, length: float = 0.0) -> Tensor:
    """Squared distance of token vectors (..., D) at unit length, mean over tokens; ``length`` weighs the plain one."""
    at_unit = (functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)).square().sum(-1).mean()
    return at_unit + length * functional.mse_loss(student, teacher) if length else at_unit


class Plugs:
    """Student blocks for runs of a teacher's blocks; ``module`` itself is not changed by anything but `keep`.

    Args:
        module: the teacher, in eval mode.
        intervals: runs that share no block.

    Attributes:
        students: one for each interval, in order.

    Raises:
        OptionError: runs that overlap, or that the model has not.
    """

    def __init__(self, module: nn.Module, intervals: Sequence[Interval]) -> None:
        paths = [block.path for block in anatomy.of(module).blocks]
        taken = [block for one in intervals for block in one.blocks]
        if not intervals or len(set(taken)) < len(taken) or not 0 <= min(taken) <= max(taken) < len(paths):
            runs = ", ".join(f"{one.first}-{one.last}" for one in intervals) or "none"
            raise OptionError(f"plugs: runs {runs} of {len(paths)} blocks; give some that share none")
        self.module, self.intervals, self._paths = module, tuple(intervals), paths
        self.students = nn.ModuleList(
            copy.deepcopy(module.get_submodule(paths[(one.first + one.last) // 2])) for one in intervals
        )

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
            for index, one in enumerate(self.intervals):
                first, last = (self.module.get_submodule(self._paths[at]) for at in (one.first, one.last))

                def before(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                    given[index] = (args, kwargs)

                def after(_: nn.Module, args: Any, found: Any, index: int = index) -> None:
                    behind[index] = found[0] if isinstance(found, tuple) else found

                stack.callback(first.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(last.register_forward_hook(after).remove)
            run(self.module, inputs)
        return {index: (*given[index], behind[index]) for index in given}

    @contextmanager
    def on(self, which: Collection[int]) -> Iterator[nn.Module]:
        """The model with the students ``which`` in place of their runs, for as long as this lasts."""
        with ExitStack() as stack:
            for index in which:
                one, student = self.intervals[index], self.students[index]
                for block in one.blocks:
                    layer = self.module.get_submodule(self._paths[block])
                    stack.callback(setattr, layer, "forward", layer.forward)
                    setattr(layer, "forward", student.forward if block == one.first else _passed(layer.forward))  # noqa: B010
            yield self.module

    def keep(self, which: Collection[int], inputs: Inputs) -> None:
        """Put the students ``which`` into the module for good, and take the rest of their runs out.

        Args:
            which: places of intervals.
            inputs: to hold the shrunk model against, by `pennyweight.surgery.remove_blocks`.
        """
        gone = []
        for index in which:
            one = self.intervals[index]
            self.module.set_submodule(self._paths[one.first], self.students[index])
            gone += one.blocks[1:]
        remove_blocks(self.module, gone, inputs)


def _passed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that hands its stream on."""
    del forward

    def passed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    return passed
