"""Adaptive sparse training (AST): a model is retrained at N:M while its masks go on moving, ever less.

Row 48. Source: W. Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
arXiv:2407.20584. Method: compute with the kept weights, give all of them the gradient (straight through), choose the
masks anew every few steps, and draw pruned weights towards zero ever harder, behind the momentum, so that masks settle
(`pennyweight.train.masked.MaskedAdamW`); learn from the dense model as well as from the text; and stand in for what is
pruned with a few dense parameters (SLoRB): the pruned weights of every ``group`` neighbors in a row by one number.
Differs from the source: the decay reaches pruned weights alone, where the published optimizer negates an integer mask
bit by bit; the projection of SLoRB stays a sum over each group, which takes no bytes.

Shape letters: M out features, N in features, k inputs of a group.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pennyweight.errors import OptionError
from pennyweight.evaluate.forward import first_tensor, run
from pennyweight.lever import ANY, at_least, between, lever, one_of, option
from pennyweight.levers.prune.sparsegpt import SparseGPT
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, train
from pennyweight.solvers.masks import DTYPES, parse_pattern
from pennyweight.solvers.sparse_training import Adaptive, beside, input_norms, packed, seen, students
from pennyweight.train.loop import Loss
from pennyweight.train.masked import MaskedAdamW, Masks, Rule
from pennyweight.weights import Kronecker, Sum, Weight
from pennyweight.work import Work

_NAME = "prune.ast"
_ROWS = 32  # of logits at once


@lever(
    _NAME,
    reach="model",
    row=48,
    paper="Pruning Large Language Models with Semi-Structural Adaptive Sparse Training, arXiv:2407.20584",
)
@dataclass(frozen=True, kw_only=True)
class AST:
    """Retrain a model at N:M with masks that go on moving, towards its dense self.

    With no steps the masks of magnitude (or of Wanda), and with ``group`` what stands in for the pruned.
    """

    pattern: str = option("2:4", ANY, "kept:of, in every run of inputs")
    steps: int = option(300, at_least(0), "steps of the optimizer; 0 prunes once")
    batch: int = option(8, at_least(1), "windows a step")
    windows: int = option(256, at_least(1), "calibration windows to train on")
    rate: float = option(2e-4, at_least(0), "learning rate at its peak")
    warmup: float = option(0.05, between(0, 1), "share of the steps in which the rate rises")
    weight_decay: float = option(0.1, at_least(0), "of all matrices")
    prior: str = option("none", one_of("none", "sparsegpt"), "lever whose weights it starts from; none: the model's")
    score: str = option("magnitude", one_of("magnitude", "wanda"), "what masks are chosen by")
    every: int = option(10, at_least(0), "steps between two choices of the masks; 0: they stay")
    decay: float = option(1e-4, at_least(0), "of pruned weights, in units of the gradient, once it has risen")
    anneal: float = option(0.25, between(0, 1), "share of the steps in which that decay rises from 0")
    decay_in: str = option(
        "moment", one_of("moment", "gradient"), "where it is added: behind the momentum, or to the gradient (SR-STE)"
    )
    distill: float = option(2 / 3, between(0, 1), "weight of the divergence from the dense model; the rest is the text")
    temperature: float = option(2.0, between(0.1, 100), "of both models in that divergence")
    group: int | None = option(
        None, at_least(1), "inputs whose pruned weights share one dense parameter a row (SLoRB), 16 say; none: without"
    )
    start: str = option("mean", one_of("mean", "sum"), "of that parameter: of the pruned weights, zeros for the kept")
    others: bool = option(True, ANY, "train all other parameters, too")
    dtype: str = option("float16", one_of(*DTYPES), "what the kept values are stored in")

    def __post_init__(self) -> None:
        parse_pattern(self.pattern, _NAME)
        if self.group is None and self.start != "mean":
            raise OptionError(f"{_NAME}: start = {self.start} has no effect without group; give group, say 16")
        if self.decay_in == "gradient" and self.anneal != 0.25:
            raise OptionError(f"{_NAME}: anneal has no effect with decay_in = gradient; leave one of the two out")

    def change(self, model: Model, work: Work) -> None:
        """Put N:M weights in the place of all selected maps, and train them.

        Raises:
            OptionError: the model predicts no next tokens, or a width does not fit the pattern or the group.
            DataError: no calibration data, and steps to train or Wanda's score.
            ModelError: a loss that is not finite.
        """
        module = model.module
        self._check_groups(work)
        windows = work.text(self.windows) if self.steps else None
        loss = self._loss(module) if self.steps else None
        known = seen(model, work) if self.prior == "sparsegpt" or self.score == "wanda" else {}
        norms = input_norms(known, work.maps, _NAME) if self.score == "wanda" else None
        denses = students(model, work.maps, self.pattern, _NAME)
        if self.prior == "sparsegpt":
            for found in work.maps:
                dense = denses[found.path]
                pruned = SparseGPT(pattern=self.pattern, dtype="float32").solve(dense, known[found.name])
                dense.matrix.data.copy_(pruned.dense())
        rule: Rule = "through" if self.decay_in == "moment" else "sr-ste"
        masks = Masks(denses.values(), rule, decay=self.decay, names=list(denses), where=_NAME)
        moving = Adaptive(masks, self.pattern, every=self.every, norms=norms)
        sides = dict(zip(denses, self._sides(masks), strict=True)) if self.group is not None else {}
        for path, side in sides.items():
            anatomy.replace(module, path, Sum(denses[path], side))
        if windows is not None and loss is not None:
            self._train(module, loss, masks, moving, list(sides.values()), windows, work)
        stored = DTYPES[self.dtype]
        added: dict[str, Weight] = {
            path: Kronecker(side.outer.detach().to(stored), side.inner.detach().to(stored))
            for path, side in sides.items()
        }
        matrices = dict(zip(denses, masks.matrices(), strict=True))
        packed(module, matrices, masks.kept(), self.pattern, self.dtype, added or None)

    def _check_groups(self, work: Work) -> None:
        for found in work.maps:
            if self.group is not None and found.shape[1] % self.group:
                raise OptionError(
                    f"{_NAME}: {found.path}: groups of {self.group} do not divide the {found.shape[1]} inputs; give "
                    "a divisor"
                )

    @torch.no_grad()
    def _sides(self, masks: Masks) -> list[Kronecker]:
        """What stands in for the pruned weights of each layer, (M, N): S (x) a row of k ones."""
        assert self.group is not None
        found = []
        for matrix, kept in zip(masks.matrices(), masks.kept(), strict=True):
            groups = matrix.masked_fill(kept, 0).view(len(matrix), -1, self.group)  # (M, N / k, k)
            # least squares: the mean counts the kept weights as zeros, for here they are to be left alone
            outer = groups.mean(-1) if self.start == "mean" else groups.sum(-1)
            found.append(Kronecker(outer, torch.ones(1, self.group)))
        return found

    def _train(
        self, module: nn.Module, loss: Loss, masks: Masks, moving: Adaptive, sides: list[Kronecker],
        windows: Tensor, work: Work,
    ) -> None:  # fmt: skip
        own = [*masks.parameters, *(side.outer for side in sides)]
        matrices, vectors = beside(module, [*own, *(side.inner for side in sides)]) if self.others else ([], [])
        groups = [
            Group([*own, *matrices], self.rate, self.weight_decay),
            Group(vectors, self.rate),
        ]

        def optimizer(parameters: ParamsT) -> Optimizer:
            if self.decay_in == "gradient":
                return torch.optim.AdamW(parameters)
            return MaskedAdamW(parameters, masks, mask_decay=self.decay, anneal=round(self.anneal * self.steps))

        train(
            module, groups, windows, loss, steps=self.steps, batch=self.batch, warmup=self.warmup,
            clip=1.0, seed=work.seed, callbacks=[moving], optimizer=optimizer,
            report=lambda done, total: work.report("training", done, total),
        )  # fmt: skip

    def _loss(self, module: nn.Module) -> Loss:
        """Of the text, and of ``module`` as it is now."""
        teacher = copy.deepcopy(module).eval().requires_grad_(False) if self.distill else module

        def loss(student: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            ids = batch[0]
            logits = first_tensor(run(student, ids)).float()
            found = logits.new_zeros(())
            if self.distill < 1:
                text = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                found = found + (1 - self.distill) * text
            if self.distill > 0:
                with torch.no_grad():
                    wanted = first_tensor(run(teacher, ids)).float()
                found = found + self.distill * softened(logits, wanted, self.temperature)
            return found

        return loss


def softened(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean divergence in nats of ``student`` from ``teacher``, both flattened by ``temperature``, times its square.

    Logits (..., V) both; gradients reach the student's.
    """
    rows = (student.flatten(0, -2), teacher.flatten(0, -2))
    found: Tensor = _Softened.apply(*rows, temperature)  # type: ignore[no-untyped-call]  # torch's own
    return found


class _Softened(torch.autograd.Function):
    """Some rows at a time: what a vocabulary takes stays in the cache, and nothing but one gradient is kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        rows, slope, total = len(student), torch.empty_like(student), student.new_zeros(())
        for start in range(0, rows, _ROWS):
            part = slice(start, start + _ROWS)
            found, wanted = ((one[part] / temperature).log_softmax(-1) for one in (student, teacher))
            shares = wanted.exp()
            total += (shares * wanted.sub_(found)).sum()
            torch.sub(found.exp_(), shares, out=slope[part])
        ctx.save_for_backward(slope)
        ctx.factor = temperature / rows
        return total * (temperature**2 / rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * (ctx.factor * grad), None, None
