"""Quantization-aware training against the original, by TopKLD: a low-bit student of a token generator.

Row 112. Source: X. Ding et al., "Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models",
arXiv:2501.06218. Differs from the source: see `pennyweight.solvers.topkld` for the loss; weights, scales and zeros are
trained through the rounding (`pennyweight.solvers.trained`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.evaluate.forward import first_tensor, run
from pennyweight.lever import at_least, between, lever, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, train
from pennyweight.solvers.topkld import topkld
from pennyweight.solvers.trained import Rounded
from pennyweight.train.loop import Loss
from pennyweight.weights.grid import Grid
from pennyweight.work import Work

_NAME = "quantize.topkld"


@lever(
    _NAME,
    reach="model",
    row=112,
    paper="Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models, arXiv:2501.06218",
)
@dataclass(frozen=True, kw_only=True)
class TopKLD:
    """Train low-bit weights to draw the tokens that the original draws.

    With no steps the same as `quantize.rtn`.
    """

    bits: int = option(3, between(1, 8), "bits of a code")
    group_size: int | None = option(
        64, at_least(1), "input features that share a scale and a zero; none: the whole row"
    )
    k: int = option(
        50, at_least(0), "likeliest tokens of the original whose probabilities are sought; the sampler's top-k"
    )
    steps: int = option(200, at_least(0), "steps of the optimizer; 0 is rounding alone")
    batch: int = option(4, at_least(1), "windows a step")
    windows: int = option(64, at_least(1), "calibration windows to train on")
    rate: float = option(1e-4, at_least(0), "learning rate of the weights, at its peak")
    scale_rate: float = option(1e-5, at_least(0), "learning rate of scales and zeros, at its peak")

    def change(self, model: Model, work: Work) -> None:
        """Put quantized weights in the place of all selected maps.

        Raises:
            OptionError: the model predicts no next tokens, or has fewer tokens than K.
            DataError: no calibration data, and steps to train.
        """
        module = model.module
        if model.kind != "causal-lm":
            raise OptionError(f"{_NAME}: trains on next tokens, and {model.name} is of kind {model.kind}")
        if self.k > (vocabulary := _vocabulary(module)):
            raise OptionError(f"{_NAME}: k = {self.k} of {vocabulary} tokens; give at most {vocabulary}")
        teacher = copy.deepcopy(module).eval().requires_grad_(False)
        windows = work.text(self.windows) if self.steps else None
        students: dict[str, Rounded] = {}
        for found in work.maps:
            matrix = anatomy.matrix(module, found).detach().float()
            grid = Grid.fit(matrix, bits=self.bits, group_size=self.group_size, zero_kind="integer")
            students[found.path] = Rounded(matrix, grid)
            anatomy.replace(module, found.path, students[found.path])
        if windows is not None:
            held = list(students.values())
            groups = [
                Group([one.matrix for one in held], self.rate),
                Group([part for one in held for part in (one.scale, one.zero)], self.scale_rate),
            ]
            train(
                module, groups, windows, self._loss(teacher), steps=self.steps, batch=self.batch, clip=1.0,
                seed=work.seed, report=lambda done, total: work.report("training", done, total),
            )  # fmt: skip
        for path, student in students.items():
            anatomy.replace(module, path, student.frozen())

    def _loss(self, teacher: nn.Module) -> Loss:
        def loss(student: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            with torch.no_grad():
                wanted = first_tensor(run(teacher, batch[0])).float()
            return topkld(first_tensor(run(student, batch[0])).float(), wanted, self.k).mean()

        return loss


def _vocabulary(module: nn.Module) -> int:
    found = anatomy.of(module)
    assert found.head is not None, "a causal language model has a head"
    return found.head.shape[0]
