"""Repair: tune what is cheap to store of a fitted language model against the original, for a stated time.

Trained end to end on the KL divergence from the original's next-token distribution are the scales of every group of
matrices on a grid, those of every output and input of entropy-coded matrices, a factor for every output of other
matrices, and the weights of the norms. Codes stay as they are, and scales are stored as they were: those of one byte
are trained through the rounding to that byte, so that they cost nothing and what was judged is what is written.

The number of steps is settled once, from the time of the first ones, and kept in the journal with regular checkpoints,
so that a killed repair goes on and ends the same. A repair that does not help on the check windows is thrown away.

Source: M. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
arXiv:2407.11062 (tuning scales end to end with fixed codes). Differs from the source: norms too, and the original's
distribution in place of the text's next tokens; entropy-coded matrices have no groups, but scales on both sides.

Shape letters: M out features, N in features, G groups of a row; B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.damage import Prediction
from pennyweight.errors import OptionError
from pennyweight.finish import Solved
from pennyweight.job import Job, standing_in
from pennyweight.journal import Journal
from pennyweight.levers.quantize.entropy import Entropy
from pennyweight.plan.slots import Slot
from pennyweight.solvers.trained import Rescaled, rescalable, rescaled
from pennyweight.weights import Diagonal, Product, Weight
from pennyweight.weights.entropy import EntropyCoded, scale_bytes, scale_values
from pennyweight.weights.layers import CompactLinear

_BATCH = 2  # windows a step
_WINDOWS = 1024  # to train on, at most
_PROBE = 3  # steps whose time settles how many there will be; the first is a warm-up
_CHECKPOINT = 25
_RATE = 5e-3  # of the factors, which are near one; norms get half of it, times their mean size
_SHARE = 0.85  # of the time goes into steps; the rest scores what they did


class Tuned(nn.Module):
    """A frozen matrix with trained factors of its outputs, and of its inputs where they have scales.

    Takes (..., N) to (..., M).

    Args:
        weight: that is tuned.
        bias: that is not.
    """

    def __init__(self, weight: Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("matrix", weight.dense().detach().bfloat16())
        self.bias = bias
        self.factors = nn.ParameterDict()
        for side, scale in _scales(weight).items():
            self.register_buffer(f"{side}_scale", scale)
            self.factors[side] = nn.Parameter(torch.ones(scale.numel()))

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.matrix.dtype)
        if "inputs" in self.factors:
            x = x * self._factor("inputs")
        y = functional.linear(x, self.matrix) * self._factor("outputs")
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _factor(self, side: str) -> Tensor:
        """The factor that rounding of its scale leaves; gradients pass as if there were none."""
        factor, scale = self.factors[side], getattr(self, f"{side}_scale")
        kept = scale_values(_rescaled(scale, factor.detach())) / scale_values(scale)
        through: Tensor = factor + (kept - factor).detach()
        return through.to(self.matrix.dtype)


def _scales(weight: Weight) -> dict[str, Tensor]:
    """What is stored of ``weight`` and multiplies its outputs (M,) and inputs (N,); ones where nothing is yet."""
    if not isinstance(weight, EntropyCoded):
        return {"outputs": torch.ones(weight.shape[0])}
    sides = ("inputs", "outputs") if weight.transposed else ("outputs", "inputs")
    return dict(zip(sides, (weight.row_scale.detach(), weight.column_scale.detach()), strict=True))


def _rescaled(scale: Tensor, factor: Tensor) -> Tensor:
    """``scale`` times ``factor`` as it is stored: one byte each, or floating point."""
    made = scale_values(scale) * factor
    return scale_bytes(made) if scale.dtype == torch.uint8 else made.to(scale.dtype)


def repair(job: Job, solved: Solved, seconds: float) -> Solved:
    """``solved`` with its scales and the model's norms tuned for about ``seconds``; itself when that does not help.

    Raises:
        OptionError: a model that is no causal language model.
    """
    if job.model.kind != "causal-lm":
        raise OptionError(f"repair: tunes causal language models, and {job.model.name} is of kind {job.model.kind}")
    slots = [slot for slot in solved.slots if slot.group == "blocks" and slot.name in solved.weights]
    text = job.text(_WINDOWS)
    with job.stage("repair"):
        student, tuned, norms = _student(job, solved, slots)
        factors = {f"{name}|{side}": factor for name, sides in tuned.items() for side, factor in sides.items()}
        run = _Run(job, solved, student, factors, norms, text)
        run.go(seconds)
    weights = dict(solved.weights)
    for slot in slots:
        found = {side: factor.detach() for side, factor in tuned[slot.name].items()}
        weights[slot.name] = with_factors(weights[slot.name], found)
    tensors = {name: value.detach().half().to(value.dtype) for name, value in norms.items()}
    mended = replace(solved, weights=weights, tensors=tensors)
    before = job.scores("baseline", "original", job.model.module, job.check, exact=False)
    with standing_in(job.model.module, mended.slots, mended.weights, mended.tensors):
        after = job.scores("checking the repair", mended.digest, job.model.module, job.check, exact=False)
    harm = float(job.task.harm(before, after).double().mean())
    assert solved.measured is not None
    note = f"repair: {run.steps} steps of {_BATCH * text.shape[1]} tokens, {job.task.metric} on check windows "
    note += f"{job.task.effect_of(solved.measured):.4f} before and {job.task.effect_of(harm):.4f} after"
    if harm >= solved.measured:
        return replace(solved, notes=(*solved.notes, f"{note}: thrown away"))
    return replace(mended, measured=harm, notes=(*solved.notes, note))


def reserved_bytes(slots: Sequence[Slot], offers: Mapping[str, Sequence[Prediction]]) -> int:
    """What factors can add to the files: two bytes an output for a scale of its own (and its entry in the header),
    but nothing where every offer brings scales that are only changed."""
    return sum(
        2 * slot.map.shape[0] + 256
        for slot in slots
        if slot.group == "blocks" and not all(isinstance(offer.lever, Entropy) for offer in offers[slot.name])
    )


def with_factors(weight: Weight, factors: Mapping[str, Tensor]) -> Weight:
    """``weight`` with what it stores of scales multiplied by ``factors``.

    Args:
        weight: whose codes stay.
        factors: "groups" (M, G) of a matrix on a grid, or "outputs" (M,) and, if it is entropy-coded, "inputs" (N,).
            Of other matrices the factors of outputs are stored beside it in 16 bits.
    """
    if "groups" in factors:
        assert rescalable(weight)
        return rescaled(weight, factors["groups"])
    if isinstance(weight, EntropyCoded):
        stored = {name: getattr(weight, name) for name in weight.tensors}
        for side, scale in _scales(weight).items():
            name = "row_scale" if (side == "outputs") != weight.transposed else "column_scale"
            stored[name] = _rescaled(scale, factors[side])
        return EntropyCoded(
            **stored, step=weight.step, lowest=weight.lowest, edges=weight.edges, transposed=weight.transposed,
            codes=weight.codes,
        )  # fmt: skip
    return Product(Diagonal(factors["outputs"].half()), weight)


def _student(
    job: Job, solved: Solved, slots: Sequence[Slot]
) -> tuple[nn.Module, dict[str, dict[str, nn.Parameter]], dict[str, nn.Parameter]]:
    """The model with the solved matrices frozen in bfloat16, their factors, and its norms by parameter name."""
    with standing_in(job.model.module, solved.slots, solved.weights):
        student = copy.deepcopy(job.model.module)
    tuned: dict[str, dict[str, nn.Parameter]] = {}
    stands: nn.Module
    for slot in slots:
        layer = student.get_submodule(slot.map.path)
        bias, weight = getattr(layer, "bias", None), solved.weights[slot.name]
        if rescalable(weight):
            scales = Rescaled(weight)
            stands, tuned[slot.name] = CompactLinear(scales, bias), {"groups": scales.factor}
        else:
            plain = Tuned(weight, bias)
            stands, tuned[slot.name] = plain, dict(plain.factors.items())
        student.set_submodule(slot.map.path, stands)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    wanted = tuple(f"{path}." for path in job.model.anatomy.norms)
    norms = {name: value for name, value in student.named_parameters() if name.startswith(wanted)}
    for value in (*(factor for each in tuned.values() for factor in each.values()), *norms.values()):
        value.requires_grad_(True)
    return student, tuned, norms


class _Run:
    """The loop of a repair, its journal and its optimizer."""

    def __init__(
        self, job: Job, solved: Solved, student: nn.Module, factors: Mapping[str, nn.Parameter],
        norms: Mapping[str, nn.Parameter], text: Tensor,
    ) -> None:  # fmt: skip
        self.job, self.student, self.text = job, student, text
        self.trained = {**factors, **norms}
        self.steps = 0
        self.identity = {**job.identity, "weights": solved.digest}
        groups: list[dict[str, Any]] = [{"params": [*factors.values()], "lr": _RATE}]
        groups += [{"params": [norm], "lr": _RATE / 2 * float(norm.detach().abs().mean())} for norm in norms.values()]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def go(self, seconds: float) -> None:
        """Train for about ``seconds``, going on from the last checkpoint."""
        plan = Journal.key("repair-steps", seconds=seconds, **self.identity)
        if not self.job.journal.done(plan):
            self.job.journal.store(plan, meta={"steps": self._affordable(seconds)})
        total = int(self.job.journal.load(plan).meta["steps"])
        keys = [
            Journal.key("repair", step=step, total=total, **self.identity)
            for step in (*range(_CHECKPOINT, total, _CHECKPOINT), total)
        ]
        ends = [*range(_CHECKPOINT, total, _CHECKPOINT), total]
        for key, end in zip(reversed(keys), reversed(ends), strict=True):
            if self.job.journal.done(key):
                self._load(self.job.journal.load(key).tensors)
                self.steps = end
                break
        batches = self._batches(total)
        for step, ids in enumerate(batches):
            if step < self.steps:
                continue
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / total))
            self._step(ids)
            self.steps = step + 1
            self.job.progress("repair", self.steps, total)
            if self.steps in ends:
                self._load(self.job.journal.store(keys[ends.index(self.steps)], self._state()).tensors)

    def _affordable(self, seconds: float) -> int:
        """Steps that fit, from the time of some that are then undone; unless their number was given."""
        if self.job.settings.repair_steps is not None:
            return self.job.settings.repair_steps
        kept = {name: value.detach().clone() for name, value in self.trained.items()}
        batches, took = self._batches(_PROBE), 0.0
        for ids in batches:
            began = time.perf_counter()
            self._step(ids)
            took = time.perf_counter() - began
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(kept[name])
        self.optimizer.state.clear()
        return max(1, int(_SHARE * seconds / took) - _PROBE)

    def _batches(self, total: int) -> Iterator[Tensor]:
        """The windows of each step, drawn without replacement epoch after epoch."""
        g = torch.Generator().manual_seed(self.job.settings.seed)
        order: list[int] = []
        for _ in range(total):
            if len(order) < _BATCH:
                order += torch.randperm(len(self.text), generator=g).tolist()
            yield self.text[order[:_BATCH]]
            del order[:_BATCH]

    def _step(self, ids: Tensor) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            teacher = self.job.model.module(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            student = self.student(input_ids=ids).logits
        # in pieces: whole float32 copies of (B*T, V) logits are what memory goes on
        loss = torch.zeros(())
        pieces = zip(teacher.flatten(0, 1).split(256), student.flatten(0, 1).split(256), strict=True)
        for p, q in pieces:
            target = p.float().log_softmax(-1)
            loss = loss + functional.kl_div(q.float().log_softmax(-1), target, reduction="sum", log_target=True)
        self.optimizer.zero_grad()
        (loss / ids.numel()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.optimizer.step()

    def _state(self) -> dict[str, Tensor]:
        found = {name: value.detach() for name, value in self.trained.items()}
        for name, value in self.trained.items():
            for key, part in self.optimizer.state[value].items():
                found[f"{name}|adam|{key}"] = torch.as_tensor(part)
        return found

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(tensors[name])
                keys = [key for key in tensors if key.startswith(f"{name}|adam|")]
                self.optimizer.state[value] = {key.rpartition("|")[2]: tensors[key].clone() for key in keys}
