"""Every layer solved at every width, scored, and tried out: what stands between a model and `pennyweight.plan.bits`.

Shape letters: M out features, N in features, F offers of all layers together, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from pennyweight.damage import damage
from pennyweight.errors import ModelError, OptionError
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.plan.allocation import Allocation, Layers
from pennyweight.plan.choose import Offer
from pennyweight.plan.harm import Harm
from pennyweight.plan.sensitivity import curvature, measured_pairs, traces
from pennyweight.statistics import Statistics
from pennyweight.weights import Dense, Weight

#: Sensitivities of a change d: "error" ``|d|^2``; "kfac" the form of `pennyweight.damage`; "hessian" half the mean
#: eigenvalue of the layer's block of the Hessian times ``|d|^2``; "curvature" ``g d + d^T H d / 2`` itself; "measured"
#: the harm it does. With "+pairs" also what two changes do together.
SCORES = (
    "error", "kfac", "hessian", "hessian+pairs", "curvature", "curvature+pairs", "measured", "measured+pairs",
)  # fmt: skip
Score = str


class Widths:
    """Some layers of a model, each with what may stand there, from the mildest to the harshest.

    Args:
        model: dense at these layers; changed only by `standing` (for a while) and `put`.
        maps: layers, as `anatomy.Anatomy.layers` lists them.
        weights: map name -> compact weights; None leaves the layer as it is.

    Raises:
        ModelError: a layer that is compact already.
    """

    def __init__(self, model: Model, maps: Sequence[Map], weights: Mapping[str, Sequence[Weight | None]]) -> None:
        self.model, self.maps, self.weights = model, tuple(maps), weights
        self.held: dict[str, nn.Parameter] = {}
        for one in maps:
            held = getattr(model.module.get_submodule(one.path), one.parameter)
            if not isinstance(held, nn.Parameter):
                raise ModelError(f"{one.name}: is compact already; choose widths before other levers, or leave it out")
            self.held[one.name] = held
        self.original = {name: held.data for name, held in self.held.items()}

    @classmethod
    def solve(
        cls, model: Model, maps: Sequence[Map], levers: Sequence[Any], statistics: Mapping[str, Statistics]
    ) -> Widths:
        """Each layer solved by each of ``levers`` (None: left as it is), from the mildest to the harshest."""
        found: dict[str, list[Weight | None]] = {}
        for one in maps:
            matrix = Dense(anatomy.matrix(model.module, one))
            found[one.name] = [None if by is None else by.solve(matrix, statistics[one.name]) for by in levers]
        return cls(model, maps, found)

    def tensor(self, one: Map, index: int) -> Tensor:
        """What offer ``index`` puts in place of the layer's parameter, in its shape and dtype."""
        weight, held = self.weights[one.name][index], self.original[one.name]
        if weight is None:
            return held
        dense = weight.dense().detach()
        return (dense.T if one.kind == "conv1d-transposed" else dense).to(held.dtype).reshape(held.shape)

    def changes(self) -> dict[str, list[Tensor]]:
        """Map name -> the difference of each offer to the layer as it is."""
        return {
            one.name: [self.tensor(one, n) - self.original[one.name] for n in range(len(self.weights[one.name]))]
            for one in self.maps
        }

    @contextmanager
    def standing(self, pick: Mapping[str, int]) -> Iterator[None]:
        """For a while the layers named in ``pick`` compute with their offers, dense."""
        try:
            for one in self.maps:
                if one.name in pick:
                    self.held[one.name].data = self.tensor(one, pick[one.name])
            yield
        finally:
            for name, held in self.held.items():
                held.data = self.original[name]

    def put(self, pick: Mapping[str, int]) -> None:
        """Replace the layers by their offers for good."""
        for one in self.maps:
            weight = self.weights[one.name][pick[one.name]]
            if weight is not None:
                anatomy.replace(self.model.module, one.path, weight)

    def measure(self, harm: Harm) -> Callable[[Mapping[str, int]], Tensor]:
        """From a pick, the harm of every window: what `pennyweight.plan.bits` bisects on."""

        def measured(pick: Mapping[str, int]) -> Tensor:
            with self.standing(pick):
                return harm.samples()

        return measured

    def alone(self, figure: Callable[[], float]) -> NDArray[np.float64]:
        """(F,) ``figure`` with each offer standing alone: any metric of the model as it then is."""
        found = []
        for one in self.maps:
            for index in range(len(self.weights[one.name])):
                with self.standing({one.name: index}):
                    found.append(float(figure()))
        return np.array(found)

    def layers(self, scores: NDArray[np.float64], pairs: NDArray[np.float64] | None = None) -> Layers:
        """Offers with exact costs ("bytes", "bits", "params", "flops") and their scores (F,); pairs (F, F)."""
        offers: dict[str, list[Offer]] = {}
        at = 0
        for one in self.maps:
            offers[one.name] = []
            for weight in self.weights[one.name]:
                cost = (Dense(anatomy.matrix(self.model.module, one).bfloat16()) if weight is None else weight).cost()
                counted = {"bytes": cost.bytes, "bits": 8 * cost.bytes, "params": cost.params, "flops": cost.flops}
                offers[one.name].append(Offer(_label(weight), counted, float(scores[at])))
                at += 1
        return Layers(offers, pairs=pairs)

    def scores(
        self, score: Score, *, harm: Harm | None = None, statistics: Mapping[str, Statistics] | None = None,
        probes: int = 50, seed: int = 0,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:  # fmt: skip
        """Scores (F,) of every offer, and what pairs of offers add (F, F), None for scores without.

        Args:
            score: one of `SCORES`.
            harm: on the windows to look at; for all but "error" and "kfac".
            statistics: with "second_moment" and "gradient", for "kfac".
            probes: random vectors of "hessian".
            seed: of the probes.
        """
        if score not in SCORES:
            raise OptionError(f"widths: no score is called {score!r}; give one of {', '.join(SCORES)}")
        kind, _, paired = score.partition("+")
        if kind in ("error", "kfac"):
            return np.array(list(self._plain(kind, statistics or {}))), None
        assert harm is not None, f"{score} looks at data"
        if kind == "measured":
            counts = {name: len(weights) for name, weights in self.weights.items()}
            measure = self.measure(harm)
            if paired:
                alone, pairs, _ = measured_pairs(lambda pick: float(measure(pick).double().mean()), counts)
                return alone, pairs
            each = [{name: n} for name, count in counts.items() for n in range(count)]
            return np.array([float(measure(pick).double().mean()) for pick in each]), None
        changes = self.changes()
        with self._trainable():
            losses = [lambda n=n: harm(n).mean() for n in range(len(harm.before))]
            found = curvature(losses, self.held, changes) if paired or kind == "curvature" else None
            spread = traces(losses, self.held, probes=probes, seed=seed) if kind == "hessian" else {}
        if kind == "curvature":
            assert found is not None
            alone = found.alone()
        else:
            squares = [(name, float(d.double().square().sum())) for name, each in changes.items() for d in each]
            alone = np.array([0.5 * spread[name].mean * square for name, square in squares])
        return alone, found.pairs() if paired and found is not None else None

    def _plain(self, kind: str, statistics: Mapping[str, Statistics]) -> Iterator[float]:
        for one in self.maps:
            matrix = anatomy.matrix(self.model.module, one)
            for weight in self.weights[one.name]:
                if weight is None:
                    yield 0.0
                elif kind == "error":
                    yield float((weight.dense().detach() - matrix).double().square().sum())
                else:
                    yield damage(weight.dense() - matrix, statistics[one.name])

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """The layers take gradients and nothing else does; no dropout."""
        module = self.model.module
        before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        training = [part for part in module.modules() if part.training]
        module.eval()
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for held in self.held.values():
            held.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, needed in before:
                parameter.requires_grad_(needed)
            for part in training:
                part.training = True


def _label(weight: Weight | None) -> str:
    if weight is None:
        return "as it is"
    rows, columns = weight.shape
    return f"{8 * weight.cost().bytes / (rows * columns):.2f} bits a weight"


def bits_per_weight(allocation: Allocation, maps: Sequence[Map]) -> float:
    """Mean stored bits a weight, scales and zeros included."""
    return allocation.cost["bits"] / sum(one.shape[0] * one.shape[1] for one in maps)
