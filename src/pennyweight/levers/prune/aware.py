"""Pruning-aware pretraining: a model is trained on while it is made smaller, a few heads, units and channels at a time.

Row 251. Source: X. Xing et al., "EfficientLLM: Scalable Pruning-Aware Pretraining for Architecture-Agnostic Edge
Language Models", arXiv:2502.06663: groups that leave the graph consistent (an attention head, a feed-forward unit, a
channel of the residual stream) are scored by the diagonal of the Hessian while training goes on, the least salient of
all kinds go, and in a second variant what is left of each layer makes good what went, by its inputs. So the shape is
found, not designed. Differs from the source: its code is not public; here a group counts by the parameters that it
frees, scores are running means, the parameters left fall along a line, and what an optimizer remembers is cut with the
weights. The stream's readers are not made good: their norms change what they read.

Shape letters: M out features, N in features, S of them kept, B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import DataError, OptionError
from pennyweight.evaluate.forward import accepts, looking
from pennyweight.lever import ANY, at_least, between, lever, one_of, option
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import loss_towards, only
from pennyweight.surgery import Dimension, Graph, remove, trace
from pennyweight.surgery.axes import Axis
from pennyweight.train import Samples, Trainer
from pennyweight.train.schedules import wsd
from pennyweight.work import Work

KINDS = ("heads", "ffn", "hidden")
SALIENCIES = ("fisher", "taylor")


def compensated(matrix: Tensor, moment: Tensor, kept: Tensor, *, damping: float = 1e-6) -> Tensor:
    """(M, N) ``matrix`` without the inputs that are not ``kept``, the others changed so that outputs stay nearest.

    The least squares of ``|X W^T - X_S V^T|``: what optimal brain surgeons come to when all N - S columns have gone.

    Args:
        matrix: W.
        moment: (N, N), the mean of ``x x^T``.
        kept: (N,) bool.
        damping: share of the mean square of inputs added to each of the kept ones, against inputs that hang together.
    """
    whole = moment.double()
    inner = whole[kept][:, kept]
    inner = inner + damping * whole.diagonal().mean().clamp(min=1e-30) * torch.eye(len(inner), dtype=inner.dtype)
    solved = torch.linalg.solve(inner, whole[kept] @ matrix.double().T).T  # (M, S)
    found = torch.zeros_like(matrix)
    found[:, kept] = solved.to(matrix)
    return found


@dataclass(frozen=True)
class Event:
    """One cut.

    Attributes:
        step: steps done by then.
        params: left after it.
        removed: units by kind.
        difference: of the outputs of the shrunk and the masked model, the largest.
        errors: of the outputs of layers that lost inputs, relative, before and after they were made good.
    """

    step: int
    params: int
    removed: Mapping[str, int]
    difference: float
    errors: tuple[tuple[float, float], ...] = ()


class PruningAware:
    """Shrinks ``module`` while it is trained: a callback of `Trainer`, or of any loop.

    Args:
        module: dense, to be changed in place; parameters stay the objects they are, at smaller shapes.
        optimizer: of its parameters.
        windows: (B, T) token ids, to trace the model and to make good what goes.
        params: to be left at the end; tied ones count once.
        start: step of the first cut; scores are gathered from the first step on.
        end: step of the last cut, at which ``params`` is met.
        every: steps between two cuts.
        kinds: of groups, out of "heads", "ffn" and "hidden" (channels of the residual stream).
        saliency: "fisher" sums ``w^2 g^2 / 2`` over a group, "taylor" is ``|sum of w g|``.
        memory: share of a running mean that a step leaves as it is.
        per_param: whether a group's score is divided by the parameters it frees.
        shape: "found" takes the least salient of all, "uniform" the same share of each dimension.
        update: "obs" makes good what goes, None leaves the rest as it is.

    Attributes:
        events: cuts so far.

    Raises:
        OptionError: a size or steps that cannot be.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        windows: Tensor,
        *,
        params: int,
        start: int,
        end: int,
        every: int,
        kinds: Sequence[str] = KINDS,
        saliency: Literal["fisher", "taylor"] = "fisher",
        memory: float = 0.9,
        per_param: bool = True,
        shape: Literal["found", "uniform"] = "found",
        update: Literal["obs"] | None = None,
    ) -> None:
        self.first = _params(module)
        if not 0 < params < self.first:
            raise OptionError(f"prune.aware: {params} parameters to be left of {self.first}; give fewer than there are")
        if not 1 <= start <= end or every < 1 or (end - start) % every or not 0 <= memory < 1:
            raise OptionError(
                f"prune.aware: cuts from step {start} to {end} every {every}, memory {memory}; give 1 <= start <= end, "
                "a whole number of intervals apart, and 0 <= memory < 1"
            )
        if unknown := [kind for kind in kinds if kind not in KINDS] or ([] if kinds else ["none"]):
            raise OptionError(f"prune.aware: groups of {unknown[0]!r}; give some of {', '.join(KINDS)}")
        self.module, self.optimizer, self.windows, self.params = module, optimizer, windows, params
        self.start, self.end, self.every, self.kinds = start, end, every, tuple(kinds)
        self.saliency, self.memory, self.per_param, self.shape, self.update = saliency, memory, per_param, shape, update
        self.steps = 0
        self.events: list[Event] = []
        self._scores: dict[str, Tensor] = {}
        self._handles = [
            weight.register_post_accumulate_grad_hook(self._gatherer(name))  # type: ignore[no-untyped-call]
            for name, weight in module.named_parameters()
        ]

    def step(self) -> None:
        """Call once after each step of the optimizer, when gradients are gone."""
        self.steps += 1
        if self.start <= self.steps <= self.end and (self.steps - self.start) % self.every == 0:
            self._cut()
        if self.steps == self.end:
            self.finish()

    def finish(self) -> None:
        """Gather no more scores."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _gatherer(self, name: str) -> Any:
        @torch.no_grad()
        def gather(weight: Tensor) -> None:
            assert weight.grad is not None
            product = weight * weight.grad
            new = 0.5 * product.square() if self.saliency == "fisher" else product
            old = self._scores.get(name)
            self._scores[name] = new if old is None else old.lerp_(new, 1 - self.memory)

        return gather

    def _cut(self) -> None:
        done = (self.steps - self.start + self.every) / (self.end - self.start + self.every)
        wanted = round(self.first + (self.params - self.first) * done)
        training, inputs = self.module.training, _inputs(self.module, self.windows[:2])
        self.module.eval()
        graph = trace(self.module, inputs)
        dimensions = [one for one in graph.dimensions if one.kind in self.kinds]
        kept = self._kept(graph, dimensions, wanted)
        masks = {one.axis: mask for one, mask in kept.items()}
        errors = self._make_good(graph, masks) if self.update == "obs" else ()
        tensors = dict(self.module.named_parameters())
        places = {
            name: [graph.kept(name, dim, masks).nonzero().flatten() for dim in range(tensor.ndim)]
            for name, tensor in tensors.items()
        }
        difference = remove(self.module, graph, kept, inputs)
        for name, tensor in tensors.items():
            self._scores[name] = (
                _sliced(self._scores[name], places[name]) if name in self._scores else tensor.new_zeros(tensor.shape)
            )
            held = self.optimizer.state.get(tensor, {})
            for key, value in held.items():
                if isinstance(value, Tensor) and value.ndim == tensor.ndim and value.ndim:
                    held[key] = _sliced(value, places[name])
        self.module.train(training)
        removed = {kind: sum(int((~kept[one]).sum()) for one in dimensions if one.kind == kind) for kind in self.kinds}
        self.events.append(Event(self.steps, _params(self.module), removed, difference, tuple(errors)))

    def _kept(self, graph: Graph, dimensions: Sequence[Dimension], wanted: int) -> dict[Dimension, Tensor]:
        """Which units stay so that ``wanted`` parameters or a few less are left."""
        scored = [self._scored(graph, one) for one in dimensions]
        if self.shape == "uniform":
            orders = [score.argsort(stable=True) for score in scored]
            most = max((one.size for one in dimensions), default=0)

            def masks(count: int) -> dict[Dimension, Tensor]:
                share = count / most
                counts = [min(one.size - 1, round(share * one.size)) for one in dimensions]
                return _without(dimensions, [order[:gone] for order, gone in zip(orders, counts, strict=True)])
        else:
            which = torch.cat([torch.full((one.size,), at) for at, one in enumerate(dimensions)])
            unit = torch.cat([torch.arange(one.size) for one in dimensions])
            # the best unit of each dimension never goes
            last = torch.cat([score == score.max() for score in scored])
            order = torch.cat(scored).masked_fill(last, torch.inf).argsort(stable=True)
            most = int((~last).sum())

            def masks(count: int) -> dict[Dimension, Tensor]:
                gone = order[:count]
                return _without(dimensions, [unit[gone[which[gone] == at]] for at in range(len(dimensions))])

        low, high = 0, most
        if not dimensions or self._left(graph, masks(high)) > wanted:
            raise OptionError(
                f"prune.aware: {wanted} parameters cannot be met by {', '.join(self.kinds)}; leave more, or more kinds"
            )
        while low < high:  # parameters fall with every unit that goes
            middle = (low + high) // 2
            low, high = (low, middle) if self._left(graph, masks(middle)) <= wanted else (middle + 1, high)
        return masks(low)

    def _scored(self, graph: Graph, dimension: Dimension) -> Tensor:
        """(size,) how much each unit matters."""
        parameters = dict(self.module.named_parameters())
        total, count = (
            torch.zeros(dimension.size, dtype=torch.float64),
            torch.zeros(dimension.size, dtype=torch.float64),
        )
        for name, dim in dimension.places:
            if name in parameters:  # of tied tensors the first name
                unit = graph.unit(name, dim, dimension)
                others = [other for other in range(parameters[name].ndim) if other != dim]
                score = self._scores.get(name, torch.zeros_like(parameters[name])).double()
                along = score.sum(others) if others else score
                there = unit >= 0
                total.index_add_(0, unit[there], along[there].cpu())
                size = torch.full((int(there.sum()),), parameters[name].numel() / len(unit), dtype=torch.float64)
                count.index_add_(0, unit[there], size)
        return total.abs() / count.clamp(min=1) if self.per_param else total.abs()

    def _left(self, graph: Graph, kept: Mapping[Dimension, Tensor]) -> int:
        masks = {one.axis: mask for one, mask in kept.items()}
        total = 0
        for name, tensor in self.module.named_parameters():
            size = 1
            for dim in range(tensor.ndim):
                size *= int(graph.kept(name, dim, masks).sum())
            total += size
        return total

    @torch.no_grad()
    def _make_good(self, graph: Graph, masks: Mapping[Axis, Tensor]) -> list[tuple[float, float]]:
        """Change the weights of layers that lose inputs, stream apart; their relative errors before and after."""
        inner = {one.axis: masks[one.axis] for one in graph.dimensions if one.kind != "hidden" and one.axis in masks}
        layers: dict[str, tuple[nn.Module, Tensor]] = {}
        for path, layer in self.module.named_modules():
            if isinstance(layer, (nn.Linear, Conv1D)):
                stay = graph.kept(f"{path}.weight", 0 if isinstance(layer, Conv1D) else 1, inner)
                if not bool(stay.all()):
                    layers[path] = layer, stay
        moments = _moments(self.module, {path: layer for path, (layer, _) in layers.items()}, self.windows)
        errors = []
        for path, (layer, stay) in layers.items():
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            matrix = weight.T if isinstance(layer, Conv1D) else weight
            solved, moment = compensated(matrix, moments[path], stay.to(weight.device)), moments[path]
            plain = (matrix * stay.to(matrix), solved)
            errors.append((_error(plain[0], matrix, moment), _error(plain[1], matrix, moment)))
            matrix.copy_(solved)
        return errors


def _error(found: Tensor, matrix: Tensor, moment: Tensor) -> float:
    """Of the outputs, relative: root of ``tr(D H D^T) / tr(W H W^T)``."""
    difference, whole = (found - matrix).double(), matrix.double()
    squared = (difference @ moment.double() * difference).sum() / (whole @ moment.double() * whole).sum().clamp(
        min=1e-30
    )
    return float(squared.clamp(min=0).sqrt())


def _moments(module: nn.Module, layers: Mapping[str, nn.Module], windows: Tensor) -> dict[str, Tensor]:
    """The mean of ``x x^T`` (N, N) over the rows that each layer reads."""
    found: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach().flatten(0, -2).float()
            found[path] = rows.T @ rows / len(rows)

        return hook

    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        with looking(module):
            inputs = _inputs(module, windows)
            module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _without(dimensions: Sequence[Dimension], gone: Sequence[Tensor]) -> dict[Dimension, Tensor]:
    masks = {}
    for one, units in zip(dimensions, gone, strict=True):
        masks[one] = torch.ones(one.size, dtype=torch.bool)
        masks[one][units] = False
    return masks


def _sliced(tensor: Tensor, places: Sequence[Tensor]) -> Tensor:
    for dim, place in enumerate(places):
        if len(place) < tensor.shape[dim]:
            tensor = tensor.index_select(dim, place.to(tensor.device))
    return tensor


def _inputs(module: nn.Module, windows: Tensor) -> dict[str, Any] | tuple[Tensor]:
    return {"input_ids": windows} if accepts(module, "input_ids") else (windows,)


def _params(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@lever(
    "prune.aware",
    row=251,
    reach="model",
    paper="EfficientLLM: Scalable Pruning-Aware Pretraining for Architecture-Agnostic Edge Language Models, "
    "arXiv:2502.06663",
)
@dataclass(frozen=True, kw_only=True)
class Aware:
    """Train on while heads, feed-forward units and channels of the stream go, the least salient first."""

    kept: float = option(0.5, between(0.01, 0.99), "share of all parameters left at the end")
    steps: int = option(1000, at_least(2), "of training in all")
    start: float = option(0.05, between(0, 1), "share of the steps before the first cut")
    end: float = option(0.6, between(0, 1), "share of the steps at the last cut; training goes on behind it")
    cuts: int = option(20, at_least(1), "in how many pieces")
    groups: str = option("heads,ffn,hidden", ANY, "what may go: heads, ffn, hidden (the residual stream)")
    saliency: str = option("fisher", one_of(*SALIENCIES), "sum of w^2 g^2 / 2 (fisher), or |sum of w g| (taylor)")
    memory: float = option(0.9, between(0, 0.999), "of the running mean of saliency")
    per_param: bool = option(True, ANY, "divide a group's saliency by the parameters it frees")
    update: str = option("none", one_of("none", "obs"), "obs: what is left makes good what went, by its inputs")
    rate: float = option(3e-4, between(0, 1), "of AdamW at its peak")
    batch: int = option(16, at_least(1), "windows a step")
    windows: int = option(4096, at_least(2), "of text that they are drawn from")

    def change(self, model: Model, work: Work) -> None:
        given = work.inputs("prune.aware")
        if not isinstance(given, Tensor) or given.is_floating_point():
            raise DataError("prune.aware: trains on text; give windows of token ids")
        text, loss = work.text(self.windows), loss_towards("text", model, "prune.aware")
        first, last = max(1, round(self.start * self.steps)), round(self.end * self.steps)
        every = max(1, (last - first) // max(1, self.cuts - 1)) if self.cuts > 1 else 1
        last = first + (last - first) // every * every if self.cuts > 1 else first
        if last < first:
            raise OptionError(f"prune.aware: the last cut (end = {self.end}) before the first (start = {self.start})")
        module = model.module
        with only(module, list(module.parameters())):
            adam = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
            pruning = PruningAware(
                module, adam, given, params=round(self.kept * _params(module)), start=first, end=last, every=every,
                kinds=[kind.strip() for kind in self.groups.split(",")], memory=self.memory, per_param=self.per_param,
                saliency="taylor" if self.saliency == "taylor" else "fisher",
                update="obs" if self.update == "obs" else None,
            )  # fmt: skip
            trainer = Trainer(
                module, adam, Samples(text, seed=work.seed), batch=min(self.batch, len(text)), loss=loss, clip=1.0,
                schedule=wsd(self.steps, min(self.steps // 10, 100), 0.3, "linear", peak=self.rate),
                callbacks=[pruning],
            )  # fmt: skip
            trainer.run(self.steps, report=lambda done, _: work.report("pruning-aware training", done, self.steps))
            pruning.finish()
        module.eval()
