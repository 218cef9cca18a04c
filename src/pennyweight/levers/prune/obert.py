"""The Optimal BERT Surgeon: weights pruned over a whole model by second-order saliency, the others moved to make good.

Row 54. Source: E. Kurtic et al., "The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large
Language Models", arXiv:2203.07259; see `pennyweight.solvers.fisher` for the mathematics.

Method: from gradients of the loss, the inverse of the empirical Fisher matrix in blocks of neighbors; every weight (or
run of 4) has the loss that taking it out would cost, the least costly of all layers go, and the others of their blocks
take on what was lost. In several steps the gradients are taken anew for each.

Differs from the source: the damping is a share of the mean squared gradient, so that it need not be tuned to the
scale of a loss; by default the weights that a block loses are made good for jointly (``joint: false`` adds up single
ones, as the source does); N:M patterns as well, by single saliencies. Encoders and classifiers need no labels: they are
drawn from the model's own outputs, which gives the Fisher matrix itself and not the empirical one; an encoder's
output is its embedding of length one, with normal noise. Nothing is trained in between: what is kept is a trainable
sparse weight, and the lever may be applied to it again at a higher share of zeros.

Memory: block * 4 bytes for each weight of the layers selected, beside 16 gradients.

Shape letters: D weights of a layer, R gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import DataError, OptionError
from pennyweight.lever import ANY, Check, at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.plan.harm import SCORED, outputs
from pennyweight.solvers.fisher import BlockFisher
from pennyweight.solvers.inputs import prunable
from pennyweight.solvers.masks import DTYPES, Selection, check_width, parse_pattern, sparse, sparsity_of
from pennyweight.weights import BlockSparse, Dense, Weight
from pennyweight.work import Work

_NAME = "prune.obert"
_RUNS = "block4"
_AT_ONCE = 16  # gradients held
_POSITIVE = Check("above 0", lambda value: value > 0)


@lever(
    _NAME,
    reach="model",
    row=54,
    paper="The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language Models, "
    "arXiv:2203.07259",
)
@dataclass(frozen=True, kw_only=True)
class OBERT:
    """Prune by the loss that each weight costs to second order, over all layers at once; move the others to make good.

    The identity at sparsity 0, up to what ``dtype`` rounds.
    """

    sparsity: float | None = option(None, between(0, 1), "share of zeros over all layers; none: what the pattern says")
    pattern: str | None = option(
        None, ANY, "kept:of, such as 2:4; block4: runs of 4 inputs go together; none: anywhere"
    )
    scope: str = option("global", one_of("global", "layer"), "where the share is met: over all layers, or in each")
    gradients: int = option(256, at_least(1), "gradients that the Fisher matrix is made of, at each step")
    batch: int = option(1, at_least(1), "windows a gradient")
    block: int = option(50, at_least(1), "neighbors whose Fisher matrix is kept; rounded up to whole runs of a pattern")
    damping: float = option(0.01, _POSITIVE, "added to the diagonal, as a share of the mean squared gradient")
    steps: int = option(1, at_least(1), "steps to the share of zeros, each with gradients of its own")
    joint: bool = option(True, one_of(True, False), "make good for what a block loses together, not one by one")
    dtype: str = option("float16", one_of(*DTYPES), "what the kept values are stored in")

    def __post_init__(self) -> None:
        self._share()
        if self.steps > 1 and self._patterned:
            raise OptionError(f"{_NAME}: steps = {self.steps} of a pattern, which is there or not; give steps = 1")
        if self.scope == "layer" and self._patterned:
            raise OptionError(f"{_NAME}: scope has no effect with pattern {self.pattern}; leave one of the two out")

    @property
    def _patterned(self) -> bool:
        return self.pattern not in (None, _RUNS)

    @property
    def _run(self) -> int:
        return 4 if self.pattern == _RUNS else 1

    def _share(self) -> float:
        return sparsity_of(self.sparsity, self.pattern if self._patterned else None, _NAME)

    def change(self, model: Model, work: Work) -> None:
        """Put sparse weights in the place of all selected maps but embeddings and heads.

        Raises:
            OptionError: no such map, or a pattern that does not divide its inputs.
            FormError: a map that is compact already, other than sparse.
            DataError: no calibration data, or fewer windows than a gradient takes.
        """
        chosen = {one.path for one in work.maps if one.kind != "embedding" and one.role != "head"}
        layers = [one for one in model.anatomy.layers() if one.path in chosen]
        if not layers:
            raise OptionError(f"{_NAME}: the step selects no linear map but embeddings and heads; select some")
        for one in layers:
            self._check_width(one)
        held = [_dense(model, one) for one in layers]
        inputs, labels = self._data(model, work)
        for step in range(1, self.steps + 1):
            fishers = self._fishers(model, held, inputs, labels, work, step)
            pruned = self._pruned(held, fishers, self._share() * step / self.steps)
            for weight, fisher, out in zip(held, fishers, pruned, strict=True):
                found = fisher.without(weight.matrix.detach().flatten(), out, joint=self.joint, run=self._run)
                with torch.no_grad():
                    weight.matrix.copy_(found.view(weight.shape))
        for one, weight, out in zip(layers, held, pruned, strict=True):
            anatomy.replace(model.module, one.path, self._form(weight.matrix.detach(), out.view(weight.shape)))

    def _check_width(self, one: Map) -> None:
        try:
            if self._patterned:
                check_width(one.shape[1], str(self.pattern), _NAME)
            elif one.shape[1] % self._run:
                raise OptionError(f"{_NAME}: {_RUNS} does not divide the {one.shape[1]} inputs; leave it out")
        except OptionError as error:
            raise OptionError(f"{error} ({one.path})") from None

    def _data(self, model: Model, work: Work) -> tuple[Any, torch.Generator | None]:
        """Inputs, and what draws labels; None where the text has the labels."""
        given = work.inputs(_NAME)
        if isinstance(given, Tensor) and not given.is_floating_point():
            given = work.text(self.gradients * self.batch)
        inputs = inputs_of(model, given)
        count = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0])
        if count < self.batch:
            raise DataError(f"{_NAME}: {count} windows of data, {self.batch} a gradient; give more, or a smaller batch")
        return inputs, None if model.kind == "causal-lm" else torch.Generator().manual_seed(work.seed)

    def _fishers(
        self, model: Model, held: Sequence[Dense], inputs: Any, labels: torch.Generator | None, work: Work, step: int
    ) -> list[BlockFisher]:
        """The inverse Fisher matrix of each layer, of the model as it is now."""
        count = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]) // self.batch
        # true labels give nothing new the second time
        samples = self.gradients if labels is not None else min(self.gradients, count)
        fishers: list[BlockFisher] = []
        training = model.module.training
        model.module.eval()
        for start in range(0, samples, _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, samples))
            found = [torch.empty(len(numbers), weight.matrix.numel()) for weight in held]
            for row, number in enumerate(numbers):
                first = number % count * self.batch
                slopes = _gradient(model, held, inputs, slice(first, first + self.batch), labels)
                for into, weight, slope in zip(found, held, slopes, strict=True):
                    # what is pruned already stays, and moves nothing
                    into[row] = (slope * (weight.matrix.detach() != 0)).flatten()
            if not fishers:
                mean = sum(float(each.double().square().sum()) for each in found) / sum(e.numel() for e in found)
                if not mean > 0:
                    raise DataError(f"{_NAME}: all gradients on the calibration data are zero; give other data")
                block = -(-self.block // self._unit) * self._unit
                fishers = [
                    BlockFisher(each.shape[1], block=block, samples=samples, damping=self.damping * mean)
                    for each in found
                ]
            for fisher, each in zip(fishers, found, strict=True):
                fisher.add(each)
            work.report("gradients", (step - 1) * samples + numbers[-1] + 1, self.steps * samples)
        model.module.train(training)
        return fishers

    @property
    def _unit(self) -> int:
        """Neighbors that a block must hold whole."""
        return parse_pattern(str(self.pattern), _NAME)[1] if self._patterned else self._run

    def _pruned(self, held: Sequence[Dense], fishers: Sequence[BlockFisher], sparsity: float) -> list[Tensor]:
        """(D,) bool of each layer: what is zero from now on."""
        scores = []
        for weight, fisher in zip(held, fishers, strict=True):
            flat = weight.matrix.detach().flatten()
            gone = (flat.view(-1, self._run) == 0).all(1)
            scores.append(fisher.saliency(flat, self._run).masked_fill(gone, -torch.inf))
        by_rows = [s.view(len(w.matrix), -1) for s, w in zip(scores, held, strict=True)]
        if self._patterned:
            chosen = Selection(pattern=self.pattern)
        else:
            chosen = Selection(sparsity=sparsity, scope="matrix" if self.scope == "layer" else "global")
        return [~kept.flatten().repeat_interleave(self._run) for kept in chosen.kept(by_rows)]

    def _form(self, matrix: Tensor, pruned: Tensor) -> Weight:
        if self.pattern == _RUNS:
            kept = ~pruned.view(len(matrix), -1, 4)[..., 0]
            return BlockSparse.keep(matrix.to(DTYPES[self.dtype]), kept, block=(1, 4))
        return sparse(matrix, pruned, self.pattern, self.dtype)


def _dense(model: Model, one: Map) -> Dense:
    """The matrix of ``one``, in place in float32, whose gradient can be taken."""
    weight = model.module.get_submodule(one.path).weight
    if isinstance(weight, Weight):
        matrix = prunable(weight, f"{_NAME}: {one.path}")
    else:
        matrix = anatomy.matrix(model.module, one).float()
    held = Dense(matrix.clone())
    anatomy.replace(model.module, one.path, held)
    return held


@torch.enable_grad()
def _gradient(
    model: Model, held: Sequence[Dense], inputs: Any, part: slice, labels: torch.Generator | None
) -> tuple[Tensor, ...]:
    """The gradient of the mean loss of some windows by each matrix; zeros where it does not depend on one."""
    out = outputs(model, inputs, part)
    if labels is None:
        loss = out.mean()
    elif model.kind in SCORED:
        scores = out.flatten(0, -2)
        drawn = torch.multinomial(scores.detach().float().softmax(-1).cpu(), 1, generator=labels)[:, 0]
        loss = functional.cross_entropy(scores.float(), drawn.to(scores.device))
    else:  # a label drawn around the output with deviation 1: the gradient of its squared distance halved
        noise = torch.randn(out.shape, generator=labels).to(out)
        loss = (out * noise).sum() / len(out)
    return torch.autograd.grad(loss, [weight.matrix for weight in held], materialize_grads=True)
