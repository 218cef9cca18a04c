"""Where the zeros of a model of several parts belong: what each part stands, and the best split of a total.

Row 173. Source: S. N. Ramesh and Z. Zhao, "Efficient Pruning of Text-to-Image Models: Insights from Pruning Stable
Diffusion", arXiv:2411.15113: text encoder and denoiser are pruned once, without training, each alone and both, at
rising shares; quality over sparsity breaks down past a point of each, and the two are then given shares of their own.
Differs from the source: any model and any names of its parts, the knee has a rule and an interval
(`pennyweight.measure.knee`), and every split of a total on a grid is run, so that the recommendation is the least of a
table and not read off curves.

Linear layers and convolutions are pruned; biases, norms and embeddings are not, and do not count.

Shape letters: M out features, N in features, W samples, S sparsities.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import pairwise, product
from math import isfinite
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pennyweight.calibrate.moments import Moments, rows_in
from pennyweight.data import Part, windows
from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.job import Progress, Settings, quiet
from pennyweight.measure.knee import Knee, knee
from pennyweight.measure.stats import Interval, bootstrap
from pennyweight.model import anatomy, load
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.solvers.masks import Scope, Selection
from pennyweight.solvers.scores import score as score_of
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.task import task_of
from pennyweight.train.masked import Masks

#: Scores that need weights alone, or the second moment of the inputs, too.
SCORES = ("magnitude", "wanda", "sparsegpt", "nowag")
SPARSITIES = tuple(tenth / 10 for tenth in range(10))
TOTALS = (0.3, 0.4, 0.5)
#: The name of the curve on which all components have the same share.
ALL = "all"

Judge = Callable[[nn.Module], Tensor]
Components = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Response:
    """How the model takes the pruning of one component, the others left as they are.

    Attributes:
        component: its name; `ALL` for all of them at the same share.
        weights: how many can be pruned.
        zeros: (S,) weights gone at each point.
        harm: (S,) mean rise of the loss, with its 95 % interval.
        knee: of the harm over the share of zeros in the component.
    """

    component: str
    weights: int
    zeros: tuple[int, ...]
    harm: tuple[Interval, ...]
    knee: Knee

    @property
    def shares(self) -> tuple[float, ...]:
        """(S,) the share of zeros at each point."""
        return tuple(gone / self.weights for gone in self.zeros)


@dataclass(frozen=True)
class Split:
    """One way to spread a total over the components.

    Attributes:
        total: share of zeros asked for, over all components.
        how: "even": the same share in each; "ranked": all weights compared at once; "grid": a point of the grid.
        zeros: weights gone, by component.
        shares: the same over the weights of that component.
        harm: mean rise of the loss, with its 95 % interval.
    """

    total: float
    how: str
    zeros: dict[str, int]
    shares: dict[str, float]
    harm: Interval


@dataclass(frozen=True)
class ComponentStudy:
    """What each component stands, and what every split of every total costs.

    Attributes:
        score: that ranks weights.
        scope: within what they are ranked, see `pennyweight.solvers.masks.Selection`.
        loss: mean loss of the dense model.
        samples: judged on.
        responses: of each component, in order, and of `ALL` where there are several.
        splits: by total, in the order they were run.
    """

    score: str
    scope: str
    loss: float
    samples: int
    responses: tuple[Response, ...]
    splits: tuple[Split, ...]

    def response(self, component: str) -> Response:
        """That of ``component``.

        Raises:
            OptionError: no such component.
        """
        for one in self.responses:
            if one.component == component:
                return one
        known = ", ".join(one.component for one in self.responses)
        raise OptionError(f"component study: no component {component!r}; there are {known}")

    def split(self, total: float, how: str = "best") -> Split:
        """The split of ``total`` recommended, the one of least harm; or the "even" or the "ranked" one.

        It was chosen on the samples that it is judged on: its harm there flatters it a little, so judge it afresh.

        Raises:
            OptionError: a total that was not studied, or no split of that kind.
        """
        found = [one for one in self.splits if one.total == total and how in ("best", one.how)]
        if not found:
            totals = ", ".join(f"{one:g}" for one in dict.fromkeys(split.total for split in self.splits))
            raise OptionError(
                f"component study: no split of {total:g} is {how!r}; totals are {totals or 'none'}, kinds are best, "
                "even, ranked, grid"
            )
        return min(found, key=lambda one: one.harm.value)

    def most(self, limit: float) -> Split | None:
        """The split with most zeros whose harm is shown to stay within ``limit`` (upper end of its interval)."""
        held = [one for one in self.splits if one.harm.high <= limit]
        return max(held, key=lambda one: (sum(one.zeros.values()), -one.harm.value), default=None)

    def table(self) -> str:
        """The study as text."""
        lines = [f"{self.samples} samples, loss {self.loss:.4f}; zeros by {self.score}, ranked within: {self.scope}"]
        for one in self.responses:
            lines += ["", f"{one.component}, {one.weights:,} weights: knee at {one.knee.words}"]
            pairs = zip(one.shares, one.harm, strict=True)
            lines += [
                f"  {share:>6.1%}  {harm.value:+.4f} [{harm.low:+.4f}, {harm.high:+.4f}]" for share, harm in pairs
            ]
        for total in dict.fromkeys(split.total for split in self.splits):
            lines += ["", f"{total:.1%} of all weights:"]
            best = self.split(total)
            for split in (one for one in self.splits if one.total == total):
                shares = ", ".join(f"{name} {share:.1%}" for name, share in split.shares.items())
                harm = f"{split.harm.value:+.4f} [{split.harm.low:+.4f}, {split.harm.high:+.4f}]"
                lines.append(f"  {split.how:<6}  {shares}  {harm}{'  recommended' if split is best else ''}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same as JSON, with the recommended split of each total."""
        best = {f"{one.total:g}": asdict(self.split(one.total)) for one in self.splits}
        return json.dumps({**asdict(self), "recommended": best}, indent=2)


def component_study(
    module: nn.Module,
    judge: Judge,
    components: Components,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    totals: Sequence[float] = TOTALS,
    score: str = "magnitude",
    scope: Scope = "global",
    calibrate: Callable[[nn.Module], object] | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> ComponentStudy:
    """Prune each of ``components`` alone, all at one share, and every split of ``totals``; nothing is trained.

    The splits of a total give all components but the largest a share of ``sparsities`` each, and the largest what is
    left, where that lies within 0 to the last of them; the even split and the ranked one stand beside. With the scope
    "global" all splits of a total have equally many zeros, to the weight; others round in every matrix or row.

    Args:
        module: not changed.
        judge: the loss (W,) of each sample, of a module like it; less is better, the same samples every time.
        components: by name, paths of its modules; ``*`` stands for anything, and what lies below counts.
        sparsities: of the curves and of the grid, rising from 0, below 1; at least four.
        totals: shares of zeros to split, between 0 and the last of ``sparsities``; none for curves alone.
        score: out of `SCORES`.
        scope: weights are ranked within each component ("global"), "matrix" or "row".
        calibrate: runs the module it is given on data, for scores that need inputs.
        seed: of the intervals.
        progress: called with (stage, done, total).

    Raises:
        OptionError: a grid, score or name that does not exist.
        ModelError: a component without a layer, one that shares a layer with another, or a compact layer.
        DataError: a loss that is not finite or not one a sample, or no calibration where it is needed.
    """
    grid, wanted = _grid(sparsities, totals)
    bench = _Bench(module, judge, _layers(module, components), score, scope, calibrate, seed)
    names = list(bench.layers)
    runs = [*names, ALL] if len(names) > 1 else names
    responses = []
    for at, name in enumerate(runs):
        responses.append(bench.response(name, grid))
        progress("components", at + 1, len(runs))
    splits = []
    for at, total in enumerate(wanted):
        splits += bench.splits(total, grid)
        progress("splits", at + 1, len(wanted))
    loss = bench.before
    return ComponentStudy(score, scope, float(loss.mean()), len(loss), tuple(responses), tuple(splits))


def prune_components(
    module: nn.Module,
    components: Components,
    shares: Mapping[str, float],
    *,
    score: str = "magnitude",
    scope: Scope = "global",
    calibrate: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """A copy of ``module`` with a share of zeros in each of ``components``, as `component_study` prunes.

    Components without a share, and all that lies outside, stay as they are bit for bit.

    Raises:
        OptionError: a share of a component that does not exist, or outside 0 to 1.
    """
    layers = _layers(module, components)
    for name, share in shares.items():
        if name not in layers or not 0 <= share <= 1:
            raise OptionError(
                f"components: {name} = {share}; give shares within 0 to 1 of {', '.join(layers)} and no other"
            )
    bench = _Bench(module, None, layers, score, scope, calibrate, 0)
    return bench.pruned({name: round(share * bench.sizes[name]) for name, share in shares.items()})[0]


def study_text_model(
    model: str | Path | Model,
    components: Components,
    *,
    data: Any = "wiki",
    settings: Settings | None = None,
    score: str = "magnitude",
    **options: Any,
) -> ComponentStudy:
    """`component_study` of a text model, judged by its own task on held-out text.

    Args:
        model: as for `pennyweight.load`; not changed.
        components: as there.
        data: text to judge by and, its calibration part, to run for scores that need inputs.
        settings: how much text is read, and the seed.
        score: as there.
        options: the others of `component_study`.

    The loss is the harm of a window as the task has it (nats of a token; 1 - cosine), 0 for the dense model.
    """
    loaded, read = model if isinstance(model, Model) else load(model), settings or Settings()
    task = task_of(loaded)

    def text(part: Part, count: int) -> Tensor:
        return windows(data, loaded.need_tokenizer(), part=part, length=read.length, count=count, seed=read.seed)

    held = text("heldout", read.heldout)
    before = task.scores(loaded.module, held, exact=True)
    seen = None if score == "magnitude" else text("calibration", read.statistics)
    return component_study(
        loaded.module,
        lambda module: task.harm(before, task.scores(module, held, exact=True)),
        components,
        score=score,
        calibrate=None if seen is None else lambda module: task.scores(module, seen, exact=True),
        seed=read.seed,
        **options,
    )


def _grid(sparsities: Sequence[float], totals: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    grid = tuple(sparsities)
    if len(grid) < 4 or grid[0] != 0 or not grid[-1] < 1 or any(b <= a for a, b in pairwise(grid)):
        raise OptionError(f"component study: sparsities {list(grid)}; give at least four that rise from 0, below 1")
    wanted = tuple(dict.fromkeys(totals))
    if wrong := [total for total in wanted if not 0 < total <= grid[-1]]:
        raise OptionError(f"component study: total {wrong[0]:g}; give shares above 0 and up to {grid[-1]:g}")
    return grid, wanted


def _layers(module: nn.Module, components: Components) -> dict[str, tuple[Map, ...]]:
    """The layers of each component."""
    if not components or ALL in components:
        raise OptionError(f"components: {list(components)}; name at least one, and none {ALL!r}")
    whole = [one for one in anatomy.of(module).layers() if one.kind != "embedding" and one.tied_to is None]
    found: dict[str, tuple[Map, ...]] = {}
    owner: dict[str, str] = {}
    for name, patterns in components.items():
        if isinstance(patterns, str):
            raise OptionError(f"components: {name} = {patterns!r}; give a list of paths, such as [{patterns!r}]")
        for pattern in patterns:
            if not any(_below(one, pattern) for one in whole):
                parts = ", ".join(path for path, _ in module.named_children())
                raise ModelError(f"components: no layer of {name} lies in {pattern!r}; the model has {parts}")
        found[name] = tuple(one for one in whole if any(_below(one, pattern) for pattern in patterns))
        if not found[name]:
            raise OptionError(f"components: {name} has no paths; give at least one")
        for one in found[name]:
            if one.path in owner:
                raise ModelError(
                    f"components: {one.path} is of {owner[one.path]} and of {name}; give it to one of them"
                )
            owner[one.path] = name
            if not isinstance(module.get_submodule(one.path).weight, nn.Parameter):
                raise ModelError(f"components: {one.path} is compact already; give the dense model")
    return found


def _below(one: Map, pattern: str) -> bool:
    return fnmatchcase(one.path, pattern) or fnmatchcase(one.path, f"{pattern}.*")


def _statistics(
    module: nn.Module, layers: Sequence[Map], calibrate: Callable[[nn.Module], object]
) -> dict[str, Statistics]:
    """Second moments of the inputs of ``layers`` while ``calibrate`` runs."""
    moments: dict[str, Moments] = {}

    def watch(one: Map) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            for rows in rows_in(one, layer, args[0].detach()):
                moments.setdefault(one.path, Moments(one.shape[1], ("second_moment",), rows.device)).add(rows)

        return hook

    hooks = [module.get_submodule(one.path).register_forward_pre_hook(watch(one)) for one in layers]
    try:
        with torch.no_grad():
            calibrate(module)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [one.path for one in layers if one.path not in moments]:
        raise DataError(f"components: calibrate ran nothing through {missing[0]}; run the whole model in it")
    return {path: one.statistics(path) for path, one in moments.items()}


class _Bench:
    """A model, its scores ranked once, ready to be pruned over and over."""

    def __init__(
        self,
        module: nn.Module,
        judge: Judge | None,
        layers: dict[str, tuple[Map, ...]],
        score: str,
        scope: Scope,
        calibrate: Callable[[nn.Module], object] | None,
        seed: int,
    ) -> None:
        if score not in SCORES or scope not in get_args(Scope):
            raise OptionError(
                f"components: score {score!r}, scope {scope!r}; give {', '.join(SCORES)}, and "
                f"{', '.join(get_args(Scope))}"
            )
        if score != "magnitude" and calibrate is None:
            raise DataError(f"components: {score} needs inputs; give calibrate, which runs the model on some data")
        self.module, self.judge, self.layers, self.scope, self.seed = module, judge, layers, scope, seed
        every = [one for part in layers.values() for one in part]
        known = {} if score == "magnitude" or calibrate is None else _statistics(module, every, calibrate)
        self.scores = {
            name: [
                score_of(score, anatomy.matrix(module, one).detach().float(), known.get(one.path, NO_STATISTICS))
                for one in part
            ]
            for name, part in layers.items()
        }
        self.sizes = {name: sum(one.numel() for one in part) for name, part in self.scores.items()}
        if judge is not None:
            self.before = self._judged(module)

    def pruned(self, zeros: Mapping[str, int]) -> tuple[nn.Module, dict[str, int]]:
        """A copy with so many ``zeros``, and how many there are (see `Selection` on how scopes round)."""
        module, gone = copy.deepcopy(self.module), dict.fromkeys(self.layers, 0)
        for name, count in zeros.items():
            if not count:
                continue
            choice = Selection(sparsity=count / self.sizes[name], scope=self.scope, nearest=True)
            kept = choice.kept(self.scores[name])
            masks = Masks([module.get_submodule(one.path) for one in self.layers[name]], where="components")
            masks.choose(kept)
            masks.finish()
            gone[name] = sum(int((~mask).sum()) for mask in kept)
        return module, gone

    def response(self, name: str, grid: Sequence[float]) -> Response:
        """The curve of one component, or of `ALL`."""
        names = list(self.layers) if name == ALL else [name]
        size = sum(self.sizes[one] for one in names)
        found = [self._harm({one: round(share * self.sizes[one]) for one in names}) for share in grid]
        zeros = tuple(sum(gone.values()) for _, gone in found)
        harms = torch.stack([harm for harm, _ in found], 1)
        turn = knee([gone / size for gone in zeros], harms, seed=self.seed)
        return Response(name, size, zeros, tuple(self._interval(harm) for harm, _ in found), turn)

    def splits(self, total: float, grid: Sequence[float]) -> list[Split]:
        """Every split of ``total``."""
        count = round(total * sum(self.sizes.values()))
        largest = max(self.sizes, key=lambda name: self.sizes[name])
        others = [name for name in self.sizes if name != largest]
        flat = [torch.cat([one.flatten() for one in part])[None] for part in self.scores.values()]
        ranked = Selection(sparsity=total, scope="global", nearest=True).kept([torch.cat(flat, 1)])[0]
        sizes = list(self.sizes.values())
        plans = [
            ("even", [round(total * self.sizes[name]) for name in others]),
            ("ranked", self._without(largest, [int((~part).sum()) for part in torch.split(ranked[0], sizes)])),
            *(
                ("grid", [round(share * self.sizes[name]) for share, name in zip(point, others, strict=True)])
                for point in product(grid, repeat=len(others))
            ),
        ]
        found = []
        for how, given in plans:
            rest = count - sum(given)
            if how == "grid" and not 0 <= rest <= grid[-1] * self.sizes[largest]:
                continue
            asked = {**dict(zip(others, given, strict=True)), largest: rest}
            harm, zeros = self._harm(asked)
            shares = {name: gone / self.sizes[name] for name, gone in zeros.items()}
            found.append(Split(total, how, zeros, shares, self._interval(harm)))
        return found

    def _without(self, largest: str, counts: list[int]) -> list[int]:
        return [count for name, count in zip(self.sizes, counts, strict=True) if name != largest]

    def _harm(self, zeros: Mapping[str, int]) -> tuple[Tensor, dict[str, int]]:
        module, gone = self.pruned(zeros)
        return self._judged(module) - self.before, gone

    def _interval(self, harm: Tensor) -> Interval:
        return bootstrap(harm, seed=self.seed)

    @torch.no_grad()
    def _judged(self, module: nn.Module) -> Tensor:
        assert self.judge is not None
        found = self.judge(module).detach().double().cpu()
        if found.ndim != 1 or len(found) < 2 or not isfinite(float(found.sum())):
            raise DataError(
                f"component study: the judge gave losses of shape {tuple(found.shape)}; give a finite one a sample, "
                "two samples at least"
            )
        return found
