"""Operators that hardly move what a generator draws go, and the rest is trained on for a while.

Row 20. Source: T. Castells, H.-K. Song, B.-K. Kim and S. Choi, "LD-Pruner: Efficient Pruning of Latent Diffusion Models
using Task-Agnostic Insights", arXiv:2404.11936: each operator alone is removed or made cheaper, the same seeds are
drawn, and what counts is how far the mean and the standard deviation of the latents move; no text, image or metric of a
task is looked at. The least operators go, the weights of the others stay and are trained on. The norm is taken for the
Euclidean one; no code is published. Differs from the source: operators are attentions, feed-forwards, blocks or single
maps of any stack of blocks; a cheaper operator is one of low rank; what goes is bounded by its parameters; latents are
drawn by Euler steps along a velocity unless another sampler is given; the lever trains towards the outputs of the
original (train a generator on its own loss where there is data for it).

Shape letters: B latents, ... the shape of one, M out features, N in features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import DataError, OptionError
from pennyweight.lever import ANY, at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.surgery import remove_blocks
from pennyweight.surgery.depth import passing
from pennyweight.surgery.probe import probe
from pennyweight.surgery.trace import run
from pennyweight.train import Samples, Trainer
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine
from pennyweight.weights import LowRank
from pennyweight.work import Work, silent

Sampler = Callable[[nn.Module], Tensor]
_PARTS = ("attention", "cross_attention", "ffn")


@dataclass(frozen=True)
class Operator:
    """Something that a model does and may do without.

    Attributes:
        name: of the map, or the path of the block and what it is in there.
        maps: its linear maps.
        block: its index where it is a whole block, None else.
    """

    name: str
    maps: tuple[anatomy.Map, ...]
    block: int | None = None

    def parameters(self, kept: float = 0.0) -> int:
        """What goes with it, in numbers of matrices, if ``kept`` of the rank stays."""
        return sum(one.shape[0] * one.shape[1] - _rank(one, kept) * sum(one.shape) for one in self.maps)


def _rank(found: anatomy.Map, kept: float) -> int:
    return max(1, round(kept * min(found.shape))) if kept else 0


def operators(module: nn.Module, kind: str = "part") -> tuple[Operator, ...]:
    """The operators of a model's blocks, in order: "part" (attentions and feed-forwards), "block" or "linear".

    Raises:
        OptionError: another kind, or a model that has none of it.
    """
    if kind not in ("part", "block", "linear"):
        raise OptionError(f"operators: kind = {kind!r}; give part, block or linear")
    found = anatomy.of(module)
    gathered: dict[tuple[int, str], list[anatomy.Map]] = {}
    for one in found.layers():
        if one.block is None:
            continue
        part = one.role.partition(".")[0]
        if kind != "part" or part in _PARTS:
            name = {"part": f"{found.blocks[one.block].path} {part}", "linear": one.name}
            gathered.setdefault((one.block, name.get(kind, found.blocks[one.block].path)), []).append(one)
    if not gathered:
        raise OptionError(f"operators: {type(module).__name__} has no {kind} in any block; try another kind")
    return tuple(
        Operator(name, tuple(maps), block if kind == "block" else None) for (block, name), maps in gathered.items()
    )


def alter(module: nn.Module, operator: Operator, kept: float = 0.0) -> None:
    """Make the maps of ``operator`` give nothing, or give each its nearest low rank; in place.

    Args:
        module: that the operator was found in, or a copy.
        operator: whose maps become low-rank weights; those of rank 0 store nothing but their biases, zeros that are
            not trained.
        kept: share of the rank that stays, at least 1 unless it is 0; with any rank the biases stay.
    """
    for one in operator.maps:
        anatomy.replace(module, one.path, LowRank.nearest(anatomy.matrix(module, one), _rank(one, kept)))
        bias = module.get_submodule(one.path).bias
        if not kept and isinstance(bias, nn.Parameter):
            bias.requires_grad_(False).zero_()


def moved(before: Tensor, after: Tensor) -> float:
    """How far means and standard deviations of latents (B, ...) are from those of others, element by element, summed.

    ``|mean(before) - mean(after)| + |std(before) - std(after)|`` in Euclidean norms, in float64; exactly 0 for equals.

    Raises:
        DataError: latents of different shapes, or fewer than two.
    """
    if before.shape[1:] != after.shape[1:] or min(len(before), len(after)) < 2:
        raise DataError(
            f"latents {tuple(before.shape)} and {tuple(after.shape)}; give at least two each, of equal shapes"
        )
    one, other = before.detach().double(), after.detach().double()
    means, spreads = one.mean(0) - other.mean(0), one.std(0) - other.std(0)
    return float(means.norm() + spreads.norm())


def latent_scores(
    module: nn.Module,
    among: Sequence[Operator],
    sample: Sampler,
    *,
    kept: float = 0.0,
    report: Callable[[str, int, int], None] = silent,
) -> dict[str, float]:
    """How far each operator of ``among`` moves what is drawn when it alone goes, by name; 0 where nothing changes.

    Args:
        module: as it is; copies are altered.
        among: see `operators`.
        sample: draws latents (B, ...) from a model; from the same seeds at every call, or scores are noise.
        kept: share of the rank that stays; 0 removes an operator, and a block then passes on what it is given.
        report: called with (stage, done, total).

    Raises:
        DataError: fewer than two latents, or a sampler that draws others from the same model.
    """
    before, scores = sample(module), {}
    if not torch.equal(before, sample(module)):
        raise DataError("latent_scores: two draws from one model differ; draw from the same seeds at every call")
    for done, one in enumerate(among):
        altered = copy.deepcopy(module)
        if one.block is not None and not kept:
            path = anatomy.of(module).blocks[one.block].path
            altered.get_submodule(path).register_forward_hook(passing(path), with_kwargs=True)
        else:
            alter(altered, one, kept)
        scores[one.name] = moved(before, sample(altered))
        report("scoring operators", done + 1, len(among))
    return scores


def least(
    among: Sequence[Operator], scores: Mapping[str, float], budget: float, *, kept: float = 0.0
) -> list[Operator]:
    """The operators of lowest score, in their order in ``among``, that take no more than ``budget`` parameters along.

    One that would take too many is left, and the next is tried. The order of ``among`` matters for ties alone.
    """
    taken: set[str] = set()
    for one in sorted(among, key=lambda one: scores[one.name]):
        size = one.parameters(kept)
        if 0 < size <= budget:
            taken.add(one.name)
            budget -= size
    return [one for one in among if one.name in taken]


def euler(inputs: Mapping[str, Tensor], *, state: str, time: str, steps: int = 4, seed: int = 0) -> Sampler:
    """A sampler of models that give velocities: from noise at time 1 to latents at time 0, by Euler steps.

    Args:
        inputs: what the model is called with; those other than ``state`` and ``time`` are conditions, kept as they are.
        state: name of the input that is drawn; its values give the shape only.
        time: name of the input that tells the time, (B,).
        steps: of a draw.
        seed: of the noise.

    Raises:
        DataError: no inputs of these names.
    """
    if state not in inputs or time not in inputs:
        raise DataError(
            f"prune.latent: inputs {', '.join(inputs)}; give them by name, with {state!r} (drawn) and {time!r} in them"
        )
    like = inputs[state]
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)

    def sample(module: nn.Module) -> Tensor:
        x = noise
        for step in range(steps):
            times = torch.full_like(inputs[time], 1 - step / steps)
            x = x - run(module, {**inputs, state: x, time: times})[0] / steps
        return x

    return sample


@lever(
    "prune.latent",
    reach="model",
    row=20,
    paper="LD-Pruner: Efficient Pruning of Latent Diffusion Models using Task-Agnostic Insights, arXiv:2404.11936",
)
@dataclass(frozen=True, kw_only=True)
class Latent:
    """Take out operators of a generator whose absence moves the distribution of its latents least, and train on."""

    operators: str = option("part", one_of("part", "block", "linear"), "what goes as one: attentions and feed-forwards")
    share: float = option(0.25, between(0, 1), "of the parameters of all operators that go at most")
    kept: float = option(0.0, between(0, 1), "share of the rank that stays of what goes; 0 removes it")
    samples: int = option(64, at_least(2), "latents drawn for each score")
    draws: int = option(4, at_least(1), "Euler steps of a draw")
    state: str = option("images", ANY, "name of the input that is drawn")
    time: str = option("times", ANY, "name of the input that tells the time, 1 at noise and 0 at latents")
    steps: int = option(200, at_least(0), "of training towards the outputs of the original, on the calibration data")
    rate: float = option(1e-3, at_least(0), "learning rate at its peak")
    batch: int = option(32, at_least(1), "windows a step")

    def change(self, model: Model, work: Work) -> None:
        windows = work.inputs("prune.latent")
        inputs = inputs_of(model, windows) if isinstance(windows, Mapping) else {"one tensor": windows}
        assert isinstance(inputs, Mapping)
        count = len(next(iter(inputs.values())))
        drawn = {name: one[torch.arange(self.samples, device=one.device) % count] for name, one in inputs.items()}
        sample = euler(drawn, state=self.state, time=self.time, steps=self.draws, seed=work.seed)
        among = operators(model.module, self.operators)
        budget = self.share * sum(one.parameters() for one in among)
        scores = latent_scores(model.module, among, sample, kept=self.kept, report=work.report)
        gone = least(among, scores, budget, kept=self.kept)
        if not gone:
            raise OptionError(
                f"prune.latent: share = {self.share}, kept = {self.kept}: no {self.operators} takes between 1 and "
                f"{budget:.0f} parameters along; raise share or lower kept"
            )
        original = copy.deepcopy(model.module)
        if self.operators == "block" and not self.kept:
            remove_blocks(model.module, [one.block for one in gone if one.block is not None], probe(inputs))
        else:
            for one in gone:
                alter(model.module, one, self.kept)
        if self.steps:
            self._recover(model.module, original, inputs, work)

    def _recover(self, module: nn.Module, original: nn.Module, inputs: Mapping[str, Any], work: Work) -> None:
        def loss(student: nn.Module, batch: Batch) -> Tensor:
            given = dict(zip(inputs, batch, strict=True))
            found = student(**given)
            return functional.mse_loss(found if isinstance(found, Tensor) else found[0], run(original, given)[0])

        weights = [one for one in module.parameters() if one.requires_grad and one.numel()]
        Trainer(
            module,
            torch.optim.AdamW(weights, weight_decay=0.0),
            Samples(*inputs.values(), seed=work.seed),
            batch=self.batch,
            loss=loss,
            schedule=cosine(self.steps, self.steps // 20, peak=self.rate, floor=0.0),
            clip=1.0,
        ).run(self.steps, report=lambda done, _: work.report("training on", done, self.steps))
        module.eval()
