"""How far a model can be pruned for nothing: its quality over one-shot sparsity, and the knee of that curve.

Row 15. Source: A. Jaiswal, S. Liu, T. Chen and Z. Wang, "The Emergence of Essential Sparsity in Large Pre-trained
Models: The Weights that Matter", arXiv:2306.03805: the smallest weights of the linear layers in all blocks together are
zeroed once, at rising shares or as N of every M, with no training, or after training the rest with the mask fixed;
random masks stand beside. Differs from the source: the knee has a rule and an interval (`pennyweight.measure.knee`),
quality is that of the model's own task on held-out text, and a floor picks the largest sparsity shown to hold it.

Biases, norms, embeddings and heads are not pruned, and do not count.

Shape letters: M out features (of "N:M" neighbors), N in features (or kept of them), W windows, S sparsities.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.data import Part, windows
from pennyweight.errors import ModelError, OptionError
from pennyweight.job import Progress, Settings, quiet
from pennyweight.measure.knee import Knee, knee
from pennyweight.model import anatomy, load
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.safe_write import write_text
from pennyweight.solvers.end_to_end import Group, Target, loss_towards, train
from pennyweight.solvers.masks import Selection
from pennyweight.solvers.spread import SCOPES, spread
from pennyweight.task import Task, task_of
from pennyweight.train.masked import Masks
from pennyweight.units import Floor

CRITERIA = ("magnitude", "random")
SPARSITIES = tuple(tenth / 10 for tenth in range(10))
#: A matrix with a larger share of zeros is as good as gone.
EMPTIED = 0.99


@dataclass(frozen=True)
class Point:
    """One sparsity of a curve.

    Attributes:
        sparsity: share of zeros in the pruned matrices together.
        effect: as people read it (perplexity over that of the dense model, mean cosine).
        low: lower end of its 95 % interval.
        high: upper end.
        holds: whether the floor is shown to hold; None without a floor.
        emptied: maps with more than 99 % zeros; ranking all layers at once may take one away whole.
    """

    sparsity: float
    effect: float
    low: float
    high: float
    holds: bool | None
    emptied: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """One way to choose what is zeroed.

    Attributes:
        model: its name, or that of a checkpoint.
        criterion: "magnitude" or "random".
        pattern: "unstructured", or "N:8" for 8, 7, 6, ... kept of every 8.
        scope: how zeros are spread over matrices, see `pennyweight.solvers.spread`; "" for patterns.
        points: in order of sparsity.
        knee: of the curve.
        free: the largest sparsity up to which every point holds the floor; None without a floor.
    """

    model: str
    criterion: str
    pattern: str
    scope: str
    points: tuple[Point, ...]
    knee: Knee
    free: float | None

    @property
    def name(self) -> str:
        """``magnitude, global``."""
        return ", ".join(part for part in (self.criterion, self.scope or self.pattern) if part)


@dataclass(frozen=True)
class Essential:
    """The curves of a model and of its checkpoints.

    Attributes:
        metric: what ``effect`` is about.
        windows: held-out windows judged on.
        steps: of training after pruning, masks fixed.
        curves: in the order asked for.
        threshold: magnitude below which a weight counts as gone already.
        small: share of such weights by model, checkpoints first.
    """

    metric: str
    windows: int
    steps: int
    curves: tuple[Curve, ...]
    threshold: float
    small: dict[str, float]

    @property
    def jump(self) -> tuple[str, str, float]:
        """The two neighbors of `small` between which most weights became small, and by what share."""
        pairs = [(one, two, self.small[two] - self.small[one]) for one, two in pairwise(self.small)]
        if not pairs:
            raise OptionError("essential: one model alone has no jump; give checkpoints")
        return max(pairs, key=lambda pair: pair[2])

    def table(self) -> str:
        """The curves as text."""
        trained = f", {self.steps} steps of training after pruning" if self.steps else ""
        lines = [f"{self.windows} held-out windows{trained}"]
        for curve in self.curves:
            free = "" if curve.free is None else f"; holds the floor up to {curve.free:.1%}"
            lines += ["", f"{curve.model}, {curve.name}: knee at {curve.knee.words}{free}"]
            lines.append(f"  {'zeros':>6}  {self.metric} (95 %)")
            for point in curve.points:
                held = {None: "", True: "  holds", False: "  fails"}[point.holds]
                gone = f"  {len(point.emptied)} maps emptied" if point.emptied else ""
                effect = f"{point.effect:.4f} [{point.low:.4f}, {point.high:.4f}]"
                lines.append(f"  {point.sparsity:>6.1%}  {effect}{held}{gone}")
        if len(self.small) > 1:
            lines += ["", f"weights below {self.threshold:.3g}:"]
            lines += [f"  {name}  {part:.1%}" for name, part in self.small.items()]
            one, two, grown = self.jump
            lines.append(f"  most between {one} and {two}: {grown:+.1%}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True)
class Tune:
    """Training after pruning, the masks fixed; the dense model that curves start from is trained as long.

    Attributes:
        steps: of AdamW; 0 judges what was pruned as it is.
        rate: of them, at its peak.
        batch: windows a step.
        target: "text" learns the next tokens of the calibration text, "original" the dense model's distributions.
        windows: of calibration text that they are drawn from.
    """

    steps: int = 0
    rate: float = 1e-4
    batch: int = 8
    target: Target = "text"
    windows: int = 512


def essential(
    model: str | Path | nn.Module | Model,
    *,
    checkpoints: Sequence[str | Path | Model] = (),
    criteria: Sequence[str] = CRITERIA,
    scopes: Sequence[str] = ("global",),
    groups: Sequence[int] = (),
    sparsities: Sequence[float] = SPARSITIES,
    floor: str | Floor | None = None,
    tune: Tune = Tune(),
    threshold: float | None = None,
    task: Task | None = None,
    data: Any = "wiki",
    out: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress = quiet,
) -> Essential:
    """Prune ``model`` once at every sparsity, in every way asked for, and find where it begins to cost.

    Args:
        model: as for `pennyweight.fit.fit`; not changed.
        checkpoints: earlier states of it, oldest first; each gets its own curves.
        criteria: out of `CRITERIA`.
        scopes: out of `pennyweight.solvers.spread.SCOPES`; none leaves unstructured pruning out.
        groups: M of the patterns N:M to run, such as 4 and 8.
        sparsities: of unstructured pruning, rising from 0; at least four.
        floor: the least quality, such as "perplexity<=1.05x".
        tune: training after pruning.
        threshold: magnitude below which a weight counts as gone; None for the one that a tenth of the first
            checkpoint's weights lie under.
        task: how quality is judged; None as the model's kind has it.
        data: text to train on and, its held-out part, to judge by.
        out: a directory for ``essential.json``.
        settings: how much text is read, and the seed.
        progress: called with (stage, done, total).

    Raises:
        OptionError: a grid that is empty, or a setting that does not exist.
        ModelError: no matrix in a block, or one that is compact already.
    """
    runs = _runs(criteria, scopes, groups, sparsities)
    read, bound = settings or Settings(), Floor.parse(floor) if isinstance(floor, str) else floor
    whole = [one if isinstance(one, Model) else load(one) for one in (*checkpoints, model)]
    names = [one.name for one in whole]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise OptionError(f"essential: two models are called {twice}; give each checkpoint a name of its own")
    judge = task or task_of(whole[-1])
    if bound is not None:
        judge.check(bound)
    small: dict[str, float] = {}
    curves = []
    for one in whole:
        layers, held = layers_of(one.module, one.name), _windows(one, data, "heldout", read.heldout, read)
        sizes = torch.cat([matrix.abs().flatten() for matrix in _matrices(one.module, layers)])
        if threshold is None:
            threshold = float(sizes.kthvalue(max(1, sizes.numel() // 10)).values)
        small[one.name] = float((sizes < threshold).double().mean())
        text = _windows(one, data, "calibration", tune.windows, read) if tune.steps else None
        bench = _Bench(one, layers, judge, held, text, tune, bound, read.seed)
        for at, run in enumerate(runs):
            curves.append(bench.curve(*run))
            progress(f"curves of {one.name}", at + 1, len(runs))
    assert threshold is not None
    found = Essential(judge.metric, read.heldout, tune.steps, tuple(curves), threshold, small)
    if out is not None:
        write_text(Path(out) / "essential.json", found.to_json())
    return found


def knee_of(model: Model, layers: Sequence[Map], held: Tensor, *, scope: str = "global", seed: int = 0) -> Knee:
    """The knee of magnitude pruning of ``layers`` alone, judged on windows ``held`` (W, T)."""
    bench = _Bench(model, tuple(layers), task_of(model), held, None, Tune(), None, seed)
    return bench.curve("magnitude", scope, 0, SPARSITIES).knee


Run = tuple[str, str, int, tuple[float, ...]]


def _runs(
    criteria: Sequence[str], scopes: Sequence[str], groups: Sequence[int], sparsities: Sequence[float]
) -> list[Run]:
    """(criterion, scope or "", M or 0, sparsities) of each curve."""
    for name, given, known in (("criteria", criteria, CRITERIA), ("scopes", scopes, SCOPES)):
        if unknown := [one for one in given if one not in known]:
            raise OptionError(f"essential: {name} {unknown[0]!r}; give {', '.join(known)}")
    if not criteria or not (scopes or groups):
        raise OptionError("essential: nothing to run; give a criterion, and a scope or a group")
    shares = tuple(sparsities)
    if len(shares) < 4 or shares[0] != 0 or shares[-1] > 1 or any(b <= a for a, b in pairwise(shares)):
        raise OptionError(f"essential: sparsities {list(shares)}; give at least four that rise from 0, 1 at most")
    if wrong := [of for of in groups if not 4 <= of <= 256]:
        raise OptionError(f"essential: groups of {wrong[0]}; give 4 to 256 neighbors, such as 4 or 8")
    patterns = [("", of, tuple(pruned / of for pruned in range(of))) for of in groups]
    whole = [(scope, 0, shares) for scope in scopes]
    return [(criterion, *rest) for criterion, rest in product(criteria, whole + patterns)]


def layers_of(module: nn.Module, name: str) -> tuple[Map, ...]:
    """The linear layers and convolutions in blocks that can be pruned in ``module``, called ``name``.

    Raises:
        ModelError: none, or one that is compact already.
    """
    found = tuple(one for one in anatomy.of(module).layers() if one.block is not None and one.kind != "embedding")
    if not found:
        raise ModelError(f"{name}: no linear layer lies in a block; give a model that has blocks")
    for one in found:
        if not isinstance(module.get_submodule(one.path).weight, nn.Parameter):
            raise ModelError(f"{name}: {one.path} is compact already; give the dense model")
    return found


def _matrices(module: nn.Module, layers: Sequence[Map]) -> list[Tensor]:
    return [anatomy.matrix(module, one).float() for one in layers]


def _windows(model: Model, data: Any, part: Part, count: int, read: Settings) -> Tensor:
    return windows(data, model.need_tokenizer(), part=part, length=read.length, count=count, seed=read.seed)


def masks_for(
    matrices: Sequence[Tensor], sparsity: float, *, criterion: str, scope: str, of: int = 0, seed: int = 0
) -> list[Tensor]:
    """The masks, True where kept, of one point of a curve.

    Args:
        matrices: (M, N) each.
        sparsity: share of zeros; of patterns a multiple of 1/M.
        criterion: out of `CRITERIA`.
        scope: how zeros are spread over matrices; not read with ``of``.
        of: M of a pattern N:M along the inputs; 0 for none.
        seed: of random masks.

    Raises:
        OptionError: a pattern that does not divide the inputs.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = [torch.rand(matrix.shape, generator=generator) for matrix in matrices]
    else:
        scores = [matrix.abs() for matrix in matrices]
    if not of:
        return spread(scores, sparsity, scope)
    kept = of - round(sparsity * of)
    if kept == of:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    return Selection(pattern=f"{kept}:{of}").kept(scores)


@dataclass(frozen=True)
class _Bench:
    """One model, ready to be pruned over and over."""

    model: Model
    layers: tuple[Map, ...]
    task: Task
    held: Tensor
    text: Tensor | None
    tune: Tune
    floor: Floor | None
    seed: int

    def curve(self, criterion: str, scope: str, of: int, shares: tuple[float, ...]) -> Curve:
        """The curve over ``shares``."""
        dense = _matrices(self.model.module, self.layers)
        before = self._dense
        harms, points, free = [], [], None
        for wanted in shares:
            kept = masks_for(dense, wanted, criterion=criterion, scope=scope, of=of, seed=self.seed)
            after = before if all(bool(mask.all()) for mask in kept) else self._scores(kept)
            harms.append(self.task.harm(before, after).double())
            effect = self.task.effect(before, after)
            emptied = [one.name for one, mask in zip(self.layers, kept, strict=True) if _zeros([mask]) > EMPTIED]
            holds = None if self.floor is None else self.task.judge(self.floor, before, after).holds
            points.append(Point(_zeros(kept), effect.value, effect.low, effect.high, holds, tuple(emptied)))
        if self.floor is not None:
            first = next((at for at, point in enumerate(points) if not point.holds), len(points))
            free = points[first - 1].sparsity if first else 0.0
        turn = knee([point.sparsity for point in points], torch.stack(harms, 1), seed=self.seed)
        pattern = f"N:{of}" if of else "unstructured"
        return Curve(self.model.name, criterion, pattern, scope, tuple(points), turn, free)

    @cached_property
    def _dense(self) -> Tensor:
        return self._scores([torch.ones(one.shape, dtype=torch.bool) for one in self.layers])

    def _scores(self, kept: Sequence[Tensor]) -> Tensor:
        module = copy.deepcopy(self.model.module)
        masks = Masks([module.get_submodule(one.path) for one in self.layers], where="essential")
        masks.choose(kept)
        if self.text is not None:
            loss = loss_towards(self.tune.target, self.model, "essential")
            group = Group(list(module.parameters()), self.tune.rate)
            train(
                module, [group], self.text, loss, steps=self.tune.steps, batch=self.tune.batch, warmup=0.1, clip=1.0,
                seed=self.seed,
            )  # fmt: skip
        masks.finish()
        return self.task.scores(module, self.held, exact=True)


def _zeros(kept: Sequence[Tensor]) -> float:
    return 1 - sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)
