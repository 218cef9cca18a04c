"""Automatic factors for a whole model in one call (Greenformers).

Row 242. Source: S. Cahyawijaya, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via
Low-Rank Approximation", arXiv:2108.10808, and its library: every linear layer becomes two thin ones, every convolution
a thin one and a 1x1 one; a rank below 1 is a share of the rank at which factors are as large as the matrix, and layers
that would not shrink are left. Semi-nonnegative factors: see `pennyweight.solvers.semi_nmf`; factors weighted by the
inputs: `pennyweight.solvers.low_rank`.
Where attention can look at mixtures of keys (`pennyweight.zoo.linformer`), that is one more choice: what the clock says
is fastest at the length asked for, the layer as it is, its maps as factors, or mixtures.
Differs from the source: no constant length from which mixtures are taken; a layer is also left where its factors are
not measured to be faster; factors share the singular values evenly; grouped convolutions are left; a step that would
change nothing is an error.

Shape letters: M out features, N in features, R rank, T tokens, S mixtures.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.measure import latency
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.model.resized import note, resized_of
from pennyweight.solvers.inputs import second_moment_of
from pennyweight.solvers.low_rank import damped, low_rank
from pennyweight.solvers.masks import DTYPES
from pennyweight.solvers.semi_nmf import semi_nmf
from pennyweight.weights import CompactLinear, Dense, LowRank, Weight
from pennyweight.work import Work

_NAME = "factorize.auto"


#: Parameters of what is `Mixable`.
MIXES = ("key_mix", "value_mix")


@runtime_checkable
class Mixable(Protocol):
    """Attention that can look at mixtures of keys, see `pennyweight.zoo.linformer.Attention`."""

    key_mix: nn.Parameter
    value_mix: nn.Parameter

    def mix(self, length: int, keys: int) -> None: ...


@dataclass(frozen=True)
class Choice:
    """What became of a layer.

    Attributes:
        path: of the layer.
        shape: (M, N) of its matrix.
        rank: of the factors.
        time: of the factors as a share of the matrix's time; None where nothing was timed.
        why: it was left as it is; empty for a layer that is factorized.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    time: float | None
    why: str


def break_even(shape: tuple[int, int]) -> float:
    """The rank at which factors hold as many parameters, and take as many multiplications, as the matrix."""
    return shape[0] * shape[1] / (shape[0] + shape[1])


def time_ratio(matrix: Tensor, factors: LowRank, tokens: int, *, repeats: int = 10) -> float:
    """Time of ``factors`` / time of ``matrix`` (M, N) as layers on (T, N) inputs, in turns on this machine; medians."""
    x = torch.randn(tokens, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    dense = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(matrix, requires_grad=False)
    thin = CompactLinear(factors)
    with torch.inference_mode():
        return latency.compare(lambda: dense(x), lambda: thin(x), repeats=repeats).ratio.value


@lever(
    _NAME,
    reach="model",
    row=242,
    needs=("second_moment",),
    paper="Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation, "
    "arXiv:2108.10808",
)
@dataclass(frozen=True, kw_only=True)
class Auto:
    """Factorize every layer that gets smaller and, measured on this machine, faster.

    Exact at no rank below the break-even one, except for matrices of that rank. Embedding and head are left. Where
    sequences are long, attention is what takes the time: with ``keys``, attention that can look at mixtures does so
    where that is measured to be faster; mixtures begin as means of neighbors, and have to be trained.

    No encoder of `transformers` is `Mixable`. Those of BERT's kind read 512 positions, where factors are faster than
    mixtures at any number of these (they cross from 1,154 positions on at width 384, see `routes.crossing`), so that
    the clock would never choose mixtures. Those that read more look at few keys already (Longformer, BigBird), or turn
    keys by their positions (ModernBERT), of which mixtures have none.
    """

    rank: float = option(0.5, at_least(0), "below 1: a share of the rank where factors save nothing; else the rank")
    solver: Literal["svd", "weighted", "snmf", "random"] = option(
        "svd",
        one_of("svd", "weighted", "snmf", "random"),
        "svd; svd weighted by the inputs (needs data); semi-nonnegative; or random factors to train from nothing",
    )
    iterations: int = option(10, at_least(1), "of snmf")
    tokens: int = option(512, at_least(0), "tokens that layers are timed on; 0: time none")
    fastest: float = option(0.95, between(0, 1), "share of the matrix's time that factors may take at most")
    keys: int = option(0, at_least(0), "mixtures of keys that attention may look at instead; 0: factors alone")
    damping: float = option(1e-4, at_least(0), "weighted: added to the diagonal of the moment, as a share of its mean")
    dtype: str = option("float16", one_of(*DTYPES), "what the factors are stored in")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that these settings read."""
        return frozenset({"second_moment"} if self.solver == "weighted" else ())

    def rank_for(self, shape: tuple[int, int]) -> int:
        """The rank for a matrix of ``shape``, at least 1."""
        return max(1, int(self.rank * int(break_even(shape)) if self.rank < 1 else self.rank))

    def choose(self, module: nn.Module, layers: Sequence[Map]) -> list[Choice]:
        """What `change` would do with each of ``layers``, in their order; nothing is changed.

        Layers of one shape are timed once.
        """
        times: dict[tuple[int, int], float] = {}
        return [self._choice(module, one, times) for one in layers]

    def _choice(self, module: nn.Module, one: Map, times: dict[tuple[int, int], float]) -> Choice:
        rank, most = self.rank_for(one.shape), break_even(one.shape)
        if rank >= most:
            return Choice(one.path, one.shape, rank, None, f"rank {rank} saves nothing from {most:.4g} on")
        layer = module.get_submodule(one.path)
        if not isinstance(layer.weight, (Tensor, Dense)):
            return Choice(one.path, one.shape, rank, None, "is compact already")
        if getattr(layer, "groups", 1) > 1:
            return Choice(one.path, one.shape, rank, None, "is a grouped convolution")
        if not self.tokens or one.kind not in ("linear", "conv1d-transposed"):
            return Choice(one.path, one.shape, rank, None, "")
        if one.shape not in times:
            matrix = anatomy.matrix(module, one)
            empty = (matrix.new_zeros(one.shape[0], rank), matrix.new_zeros(rank, one.shape[1]))
            factors = LowRank(*(factor.to(DTYPES[self.dtype]) for factor in empty))
            times[one.shape] = time_ratio(matrix, factors, self.tokens)
        time = times[one.shape]
        slow = "" if time <= self.fastest else f"factors of rank {rank} take {time:.2f} of its time"
        return Choice(one.path, one.shape, rank, time, slow)

    def change(self, model: Model, work: Work) -> None:
        chosen = {one.path for one in work.maps if one.kind != "embedding" and one.role != "head"}
        layers = [one for one in model.anatomy.layers() if one.path in chosen]
        mixed = self._mix(model.module, chosen)
        layers = [one for one in layers if one.path.rpartition(".")[0] not in mixed]
        choices = self.choose(model.module, layers)
        kept = [(one, choice) for one, choice in zip(layers, choices, strict=True) if not choice.why]
        if not kept and not mixed:
            why = f"{choices[0].path} {choices[0].why}" if choices else "the step selects no layer"
            raise OptionError(
                f"{_NAME}: none of {len(choices)} layers pays ({why}); lower rank, raise fastest, or time more tokens"
            )
        moments: Mapping[str, Tensor] = {}
        if self.solver == "weighted":
            found = work.statistics({"second_moment"})
            # parts of a fused layer read the same inputs
            moments = {
                one.path: second_moment_of(found[one.name], one.shape[1], _NAME)
                for one in model.anatomy.maps()
                if one.path in chosen and one.name in found
            }
        g = torch.Generator().manual_seed(work.seed)
        for done, (one, choice) in enumerate(kept):
            factors = self._factors(anatomy.matrix(model.module, one).float(), choice.rank, moments.get(one.path), g)
            anatomy.replace(model.module, one.path, factors)
            work.report("factorize", done + 1, len(kept))

    def _mix(self, module: nn.Module, chosen: Collection[str]) -> list[str]:
        """Let attention look at mixtures where that is faster than anything else; the paths of those layers."""
        if not self.keys:
            return []
        parents = {path.rpartition(".")[0] for path in chosen}
        able: list[tuple[str, Any]] = [
            (path, layer) for path, layer in module.named_modules() if path in parents and isinstance(layer, Mixable)
        ]
        if not able:
            raise OptionError(f"{_NAME}: keys = {self.keys}, and no attention here looks at mixtures; leave keys out")
        if self.tokens <= self.keys:
            raise OptionError(
                f"{_NAME}: {self.keys} mixtures of {self.tokens} tokens; time more tokens, or take fewer mixtures"
            )
        found: dict[tuple[Any, ...], bool] = {}
        mixed = []
        for path, layer in able:
            shapes = tuple(tuple(tensor.shape) for tensor in layer.state_dict().values())
            if shapes not in found:
                found[shapes] = self._mixing_pays(layer)
            if found[shapes]:
                layer.mix(self.tokens, self.keys)
                mixed.append(path)
        if mixed:
            known = resized_of(module)
            names = [f"{path}.{name}" for path in mixed for name in MIXES]
            shapes_now = {name: tuple(module.get_parameter(name).shape) for name in names}
            note(module, dataclasses.replace(known, shapes={**known.shapes, **shapes_now}))
        return mixed

    def _mixing_pays(self, attention: nn.Module) -> bool:
        factors, mixtures = copy.deepcopy(attention), copy.deepcopy(attention)
        mix: Any = mixtures
        mix.mix(self.tokens, self.keys)
        widths = []
        for name, one in list(factors.named_modules()):
            if isinstance(one, nn.Linear):
                rank = self.rank_for((one.out_features, one.in_features))
                empty = (one.weight.new_zeros(one.out_features, rank), one.weight.new_zeros(rank, one.in_features))
                anatomy.replace(factors, name, LowRank(*(factor.to(DTYPES[self.dtype]) for factor in empty)))
                widths.append(one.in_features)
        x = torch.randn(1, self.tokens, widths[0], generator=torch.Generator().manual_seed(0))
        x = x.to(next(attention.parameters()))
        with torch.inference_mode():
            calls: list[Callable[[], Any]] = [partial(one, x) for one in (attention, factors, mixtures)]
            times = torch.tensor(list(latency.in_turns(calls, repeats=5, warmup=1))).median(0).values.tolist()
        return bool(times[2] <= self.fastest * times[0] and times[2] < times[1])

    def _factors(self, matrix: Tensor, rank: int, moment: Tensor | None, generator: torch.Generator) -> Weight:
        if self.solver == "random":
            size = math.sqrt(float(matrix.std()) / math.sqrt(rank))  # so that the product is as large as the matrix
            up, down = (
                (torch.randn(shape, generator=generator) * size).to(matrix)
                for shape in ((matrix.shape[0], rank), (rank, matrix.shape[1]))
            )
        elif self.solver == "snmf":
            up, down = semi_nmf(matrix, rank, iterations=self.iterations)
        else:
            seen = None if moment is None else damped(moment, self.damping)
            up, down = low_rank(matrix, rank, seen, _NAME)
        dtype = DTYPES[self.dtype]
        return LowRank(up.to(dtype), down.to(dtype))
