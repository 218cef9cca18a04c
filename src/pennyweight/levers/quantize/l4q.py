"""L4Q: an adapter merged before rounding, trained through it with the steps; what is left is a plain quantized layer.

Source: H. Jeon, Y. Kim and J. Kim, "L4Q: Parameter Efficient Quantization-Aware Training on Large Language Models via
LoRA-wise LSQ", arXiv:2402.04902: ``W + factor * B A`` is rounded with a learned step and offset for each group; one
gradient of the weight's shape is formed in a layer's backward, gives those of steps, offsets, A and B, and is dropped,
so that training takes about the memory of LoRA. Starts with steps that clamp neither tail, and offset 0.

Differs from the source: steps and offsets have a learning rate of their own, relative to the mean step of a matrix, and
no weight decay; they are trained as float16 stores them; offsets can be left out, which saves their bytes; the loss may
be the divergence from the original.

Shape letters: M out features, N in features, K rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, loss_towards, train
from pennyweight.solvers.trained import Merged
from pennyweight.work import Work

_NAME = "quantize.l4q"


@lever(
    _NAME,
    reach="model",
    row=162,
    paper="L4Q: Parameter Efficient Quantization-Aware Training on Large Language Models via LoRA-wise LSQ, "
    "arXiv:2402.04902",
)
@dataclass(frozen=True, kw_only=True)
class L4Q:
    """Train an adapter and the steps through the rounding of their sum; no adapter is left.

    Quantizes the linear layers of blocks among those that the step selects. With ``rank = 0`` steps alone are learned
    (LSQ); with ``steps = 0`` it rounds to the nearest value of symmetric grids that clamp nothing.
    """

    bits: int = option(4, between(2, 8), "bits of a code")
    group_size: int | None = option(128, at_least(1), "input features that share a step; none: the whole row")
    rank: int = option(4, at_least(0), "rank of the adapter that is merged; 0: none")
    alpha: float = option(8.0, at_least(0), "alpha / rank multiplies the adapter")
    offsets: bool = option(True, one_of(True, False), "learn an offset for each group, stored where one is not 0")
    samples: int = option(128, at_least(1), "windows to train on")
    batch: int = option(4, at_least(1), "windows a step")
    steps: int = option(200, at_least(0), "steps of training")
    rate: float = option(2e-3, at_least(0), "learning rate of the adapter")
    step_rate: float = option(5e-3, at_least(0), "learning rate of steps and offsets, as a share of the mean step")
    warmup: float = option(0.1, between(0, 1), "share of the steps in which rates rise")
    decay: float = option(0.01, at_least(0), "weight decay of the adapter")
    target: Literal["text", "original"] = option(
        "text", one_of("text", "original"), "what is learned: next tokens, or the original's distribution"
    )

    def change(self, model: Model, work: Work) -> None:
        maps = [found for found in work.maps if found.block is not None and found.kind != "embedding"]
        if not maps:
            raise OptionError(f"{_NAME}: the step selects no linear layer of a block; select some")
        loss = loss_towards(self.target, model, _NAME)
        windows = work.text(self.samples)
        g = torch.Generator().manual_seed(work.seed)
        layers = {}
        for found in maps:
            layers[found.path] = self.layer(anatomy.matrix(model.module, found).float(), g)
        for path, layer in layers.items():
            anatomy.replace(model.module, path, layer)
        groups = [group for layer in layers.values() for group in self._groups(layer)]
        train(
            model.module, groups, windows, loss, steps=self.steps, batch=self.batch, warmup=self.warmup, clip=1.0,
            seed=work.seed, report=lambda done, all_: work.report("l4q", done, all_),
        )  # fmt: skip
        for path, layer in layers.items():
            anatomy.replace(model.module, path, layer.frozen())

    def layer(self, matrix: torch.Tensor, generator: torch.Generator) -> Merged:
        """What stands for ``matrix`` (M, N) while it is trained: an adapter that adds nothing yet.

        Raises:
            OptionError: a rank that the matrix does not have.
        """
        rows, columns = matrix.shape
        if self.rank > min(rows, columns):
            raise OptionError(
                f"{_NAME}: rank = {self.rank} for a {rows}x{columns} matrix; give at most {min(rows, columns)}"
            )
        bound = 1 / math.sqrt(columns)  # Kaiming-uniform, as LoRA starts its lower factor
        down = (2 * torch.rand(self.rank, columns, generator=generator) - 1) * bound
        return Merged(
            matrix, bits=self.bits, group_size=self.group_size, up=torch.zeros(rows, self.rank), down=down,
            factor=self.alpha / max(1, self.rank), offsets=self.offsets,
        )  # fmt: skip

    def _groups(self, layer: Merged) -> list[Group]:
        learned = [layer.step] if layer.offset is None else [layer.step, layer.offset]
        adapter = [layer.up, layer.down] if self.rank else []
        return [
            Group(learned, self.step_rate * float(layer.step.detach().mean())),
            Group(adapter, self.rate, self.decay),
        ]
