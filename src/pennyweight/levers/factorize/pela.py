"""A low-rank model that is taught before it is fine-tuned: features of the original, weights in a box around it (PELA).

Row 139. Source: Y. Guo et al., "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
arXiv:2310.10700, and its code (guoyang9/PELA): every linear layer becomes two factors with 1/c of its parameters; they
go through an intermediate stage on the original's own data and task, where the outputs of all blocks are drawn to the
original's, and the largest entry of each layer's change is held near a small bound. Fine-tuning comes after it, and
needs neither the original nor this module.
Differs from the source: a block's error counts relative to the size of what the block gives, so that one weight serves
every model; the task is the text's next tokens or left out (with `Intermediate` it is any loss).

Shape letters: M out features, N in features, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.evaluate.forward import first_tensor, run
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, loss_towards, train
from pennyweight.solvers.low_rank import low_rank
from pennyweight.solvers.masks import DTYPES
from pennyweight.train.loop import Loss
from pennyweight.train.samples import Batch
from pennyweight.weights import Dense, LowRank
from pennyweight.work import Work

_NAME = "factorize.pela"


@dataclass(frozen=True)
class Factored:
    """A layer that was factorized.

    Attributes:
        path: of the layer.
        weight: its factors.
        original: (M, N) what they stand for.
    """

    path: str
    weight: LowRank
    original: Tensor


@lever(
    _NAME,
    reach="model",
    row=139,
    paper="PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, arXiv:2310.10700",
)
@dataclass(frozen=True, kw_only=True)
class Pela:
    """Factorize the layers of blocks, then teach the factors, norms and biases what the original's blocks give.

    Exact without training where ``density`` leaves every matrix its rank, up to rounding in ``dtype``. With ``steps =
    0`` it is the plain singular value decomposition.
    """

    density: float = option(0.5, between(0, 1), "parameters of the factors, as a share of the matrix (the paper's 1/c)")
    smallest: int = option(10, at_least(1), "layers with fewer outputs are left as they are")
    features: float = option(0.1, at_least(0), "weight of the blocks' relative squared errors, averaged over blocks")
    box: float = option(1.0, at_least(0), "weight of the regularizer on the largest entry of each layer's change")
    bound: float = option(1e-3, at_least(0), "largest change of an entry that the regularizer aims at")
    task: Literal["text", "none"] = option(
        "text", one_of("text", "none"), "what is learned beside it: next tokens, or nothing (any model)"
    )
    samples: int = option(128, at_least(1), "windows to train on")
    batch: int = option(8, at_least(1), "windows a step")
    steps: int = option(200, at_least(0), "steps of training; 0: none, and no data")
    rate: float = option(1e-3, at_least(0), "learning rate of AdamW")
    dtype: str = option("float16", one_of(*DTYPES), "what the factors are stored in")

    def change(self, model: Model, work: Work) -> None:
        chosen = {one.path for one in work.maps if one.block is not None and one.kind != "embedding"}
        layers = [one for one in model.anatomy.layers() if one.path in chosen and one.shape[0] >= self.smallest]
        if not layers:
            raise OptionError(
                f"{_NAME}: the step selects no linear layer of a block with {self.smallest} outputs; select some, or "
                "lower smallest"
            )
        if self.steps and not (self.features or self.box or self.task != "none"):
            raise OptionError(f"{_NAME}: nothing to learn in {self.steps} steps; give features, box or a task")
        task = loss_towards("text", model, _NAME) if self.steps and self.task == "text" else None
        windows = work.text(self.samples) if self.steps else None
        teacher = copy.deepcopy(model.module).eval().requires_grad_(False) if self.steps else None
        found = factorize(model.module, layers, density=self.density)
        if windows is not None and teacher is not None:
            loss = Intermediate(
                model.module, teacher, [block.path for block in model.anatomy.blocks], found,
                task=task, features=self.features, box=self.box, bound=self.bound,
            )  # fmt: skip
            train(
                model.module, [Group(trainable(model.module, found), self.rate)], windows, loss, steps=self.steps,
                batch=self.batch, warmup=0.1, clip=1.0, seed=work.seed,
                report=lambda done, all_: work.report("pela", done, all_),
            )  # fmt: skip
        dtype = DTYPES[self.dtype]
        for one in found:
            up, down = one.weight.up.detach().to(dtype), one.weight.down.detach().to(dtype)
            anatomy.replace(model.module, one.path, LowRank(up, down))


@torch.no_grad()
def factorize(module: nn.Module, layers: Sequence[Map], *, density: float) -> list[Factored]:
    """Put float32 factors of ``density`` * M * N parameters, rounded down to a whole rank, in place of ``layers``.

    Raises:
        OptionError: a layer that is compact already, or a density that leaves one no rank.
    """
    found = []
    for one in layers:
        held = module.get_submodule(one.path).weight
        if not isinstance(held, (Tensor, Dense)):
            raise OptionError(f"{_NAME}: {one.path} is {getattr(held, 'form', 'compact')} already; put this step first")
        rows, columns = one.shape
        rank = min(rows, columns, int(density * rows * columns / (rows + columns) + 1e-9))
        if not rank:
            raise OptionError(
                f"{_NAME}: density = {density} leaves {one.path} ({rows}x{columns}) no rank; give at least "
                f"{(rows + columns) / (rows * columns):.4f}"
            )
        matrix = anatomy.matrix(module, one).float().clone()
        up, down = low_rank(matrix, rank, None, _NAME)
        weight = LowRank(up.to(matrix), down.to(matrix))
        anatomy.replace(module, one.path, weight)
        found.append(Factored(one.path, weight, matrix))
    return found


def trainable(module: nn.Module, found: Sequence[Factored]) -> list[nn.Parameter]:
    """What the stage trains: the factors, and everything of one dimension (norms, biases)."""
    factors = [parameter for one in found for parameter in one.weight.parameters()]
    return factors + [parameter for parameter in module.parameters() if parameter.ndim <= 1]


def perturbation(found: Sequence[Factored], bound: float) -> Tensor:
    """The mean over layers of ``(largest |entry| of up @ down - original, less bound) ** 2``."""
    with torch.autocast(found[0].original.device.type, enabled=False):  # differences of near equals
        over = [(one.weight.dense() - one.original).abs().max() - bound for one in found]
    return torch.stack(over).square().mean()


class Intermediate:
    """The loss of the intermediate stage, for `pennyweight.train.Trainer`.

        found = factorize(student, layers, density=0.5)
        loss = Intermediate(student, teacher, block_paths, found, task=label_loss)
        Trainer(student, AdamW(trainable(student, found)), samples, batch=64, loss=loss).run(1000)

    Args:
        student: that is trained, holding ``found``.
        teacher: the original, not trained.
        blocks: paths of what has to give the same in both.
        found: the layers that were factorized.
        task: the original's own loss; None for none.
        features: weight of the relative squared error of what blocks give, averaged over blocks.
        box: weight of `perturbation`.
        bound: of `perturbation`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        blocks: Sequence[str],
        found: Sequence[Factored],
        *,
        task: Loss | None = None,
        features: float = 0.1,
        box: float = 1.0,
        bound: float = 1e-3,
    ) -> None:
        self.student, self.teacher, self.blocks, self.found = student, teacher, list(blocks), list(found)
        self.task, self.features, self.box, self.bound = task, features, box, bound

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """The loss of ``module``, which is the student or wraps it, on ``batch``."""
        with _given(self.student, self.blocks) as gives:
            total = self._run(module, batch)
        if self.features:
            with torch.no_grad(), _given(self.teacher, self.blocks) as wanted:
                self._run(self.teacher, batch)
            errors = [
                (mine.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-12)
                for mine, theirs in zip(gives, wanted, strict=True)
            ]
            total = total + self.features * torch.stack(errors).mean()
        if self.box:
            total = total + self.box * perturbation(self.found, self.bound)
        return total

    def _run(self, module: nn.Module, batch: Batch) -> Tensor:
        if self.task is not None:
            return self.task(module, batch)
        inputs = batch[0]
        if inputs.is_floating_point():  # pixels have no mask of tokens that are seen
            module(inputs)
        else:
            run(module, inputs)
        return torch.zeros((), device=inputs.device)


@contextmanager
def _given(module: nn.Module, blocks: Sequence[str]) -> Iterator[list[Tensor]]:
    """What each of ``blocks`` gives while the model runs, in the order in which they run."""
    seen: list[Tensor] = []
    hooks = [
        module.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(first_tensor(output)))
        for path in blocks
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
