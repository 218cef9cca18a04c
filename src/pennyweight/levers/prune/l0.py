"""Compresso: gates on heads, hidden units and the residual stream, trained with an adapter down to a target size.

Row 147. Source: S. Guo, J. Xu, L. L. Zhang and M. Yang, "Compresso: Structured Pruning with Collaborative Prompting
Learns Compact Large Language Models", arXiv:2310.05015, and its official implementation: hard-concrete gates
(`pennyweight.train.masked`), an expected size in closed form that two multipliers draw to the target, raised by
gradient ascent, along a target that rises linearly; adapters on queries and values; in the end as many gates are closed
as are expected to be, the rest is folded into the weights, and an adapter is tuned once more. A prompt can tell the
model in training (and then in use) that it is being pruned. Differs from the source: one offset on all gates brings the
final size as near to the target as whole units allow; what is cut leaves by `pennyweight.surgery`; the wording of the
prompt.

The size is that of the parameters in blocks. Gates on the residual stream need norms that take no mean: while they are
trained, the norms see zeros where the stream is gated, and the shrunk model's are rescaled to match (exactly but for
their eps, which counts as the mean square over all places did).

Shape letters: M out features, N in features, U units of a dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.forward import first_tensor, run
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group
from pennyweight.solvers.sparse_tuning import Adapted, Trained, Tuning, check_rank, drawn, linear_maps
from pennyweight.surgery import Dimension, Graph, remove, trace
from pennyweight.surgery.trace import tensors_of
from pennyweight.train.loop import Loss
from pennyweight.train.masked import hard_concrete, open_probability, settled_gates
from pennyweight.train.samples import Batch
from pennyweight.weights import Weight
from pennyweight.work import Work

_NAME = "prune.l0"
#: What log_alpha is held between, and where it starts: nearly surely open.
RANGE = (log(0.01), log(100.0))
KINDS = {"head": "heads", "ffn": "ffn", "hidden": "hidden"}
#: Put before every window in training; put it before what the pruned model is given, too.
PROMPT = (
    "Note to the language model: you are being pruned. Some of your heads and neurons are redundant and will go. "
    "Help to find which, keep the quality of your answers, and recover step by step. Text:\n"
)


class Gate(nn.Module):
    """A gate for each of U units; ``value`` is what is multiplied by now."""

    def __init__(self, dimension: Dimension) -> None:
        super().__init__()
        self.dimension = dimension
        self.log_alpha = nn.Parameter(torch.full((dimension.size,), RANGE[1]))
        self.value = torch.ones(dimension.size)

    def draw(self, generator: torch.Generator) -> None:
        """Random values, which gradients pass."""
        self.value = hard_concrete(self.log_alpha, generator=generator)

    @torch.no_grad()
    def settle(self, offset: float) -> None:
        """The values of use, at least one of them open."""
        value = settled_gates(self.log_alpha + offset)
        if not bool(value.any()):
            value[self.log_alpha.argmax()] = 1.0
        self.value = value


class Gated(Trained):
    """``(W + factor * up @ down) * rows * columns`` with the values of gates.

    Args:
        inner: W and its update.
        rows: a gate and, for every row, its unit (-1 for none); None without.
        columns: the same of columns.
    """

    def __init__(
        self, inner: Adapted, rows: tuple[Gate, Tensor] | None = None, columns: tuple[Gate, Tensor] | None = None
    ) -> None:
        super().__init__(shape=inner.shape)
        self.inner = inner
        self.gates = [rows, columns]  # in a list: they belong to all layers of a dimension

    def dense(self) -> Tensor:
        made = self.inner.dense()
        for side, gate in enumerate(self.gates):
            if gate is not None:
                value, unit = gate[0].value, gate[1]
                each = torch.where(unit >= 0, value[unit.clamp_min(0)], torch.ones(()))
                made = made * (each if side else each[:, None])
        return made


class Size:
    """The expected number of parameters in blocks, in closed form.

    Args:
        graph: of the module.
        names: of the parameters counted.
        gates: on its dimensions.
    """

    def __init__(self, graph: Graph, names: Sequence[str], gates: Sequence[Gate]) -> None:
        self.gates = gates
        self._dims: list[list[tuple[int, list[tuple[Gate, Tensor]]]]] = []
        for name in names:
            dims = []
            for dim, axis in enumerate(graph.axes[name]):
                free, gated = torch.ones(axis.size, dtype=torch.bool), []
                for gate in gates:
                    if (name, dim) in gate.dimension.places:
                        unit = graph.unit(name, dim, gate.dimension)
                        gated.append((gate, torch.bincount(unit[unit >= 0], minlength=gate.dimension.size)))
                        free &= unit < 0
                dims.append((int(free.sum()), gated))
            self._dims.append(dims)

    def of(self, kept: Callable[[Gate], Tensor]) -> Tensor:
        """The size when ``kept`` (U,) says what share of each unit stays."""
        share = {id(gate): kept(gate) for gate in self.gates}
        total = torch.zeros(())
        for dims in self._dims:
            part = torch.ones(())
            for free, gated in dims:
                part = part * (free + sum((share[id(gate)] * count).sum() for gate, count in gated))
            total = total + part
        return total

    def expected(self) -> Tensor:
        """With the odds that gates are open; gradients reach them."""
        return self.of(lambda gate: open_probability(gate.log_alpha))

    def settled(self) -> float:
        """With the values that gates have now."""
        return float(self.of(lambda gate: (gate.value != 0).float()))


class Lagrangian:
    """Two multipliers of how far the size is from the target, raised by gradient ascent after every step.

    Args:
        size: to measure.
        target: share of the size that goes in the end.
        ramp: steps in which the target rises to it.
        rate: of the ascent.
    """

    def __init__(self, size: Size, target: float, ramp: int, rate: float) -> None:
        self.size, self.target, self.ramp, self.steps = size, target, ramp, 0
        self.whole = float(size.of(lambda gate: torch.ones(gate.dimension.size)))
        self.multipliers = nn.Parameter(torch.zeros(2))
        self._ascent = torch.optim.Adam([self.multipliers], lr=rate, maximize=True)

    def away(self) -> Tensor:
        """How much more the expected share that goes is than it is to be now."""
        wanted = self.target * min(1.0, (self.steps + 1) / max(1, self.ramp))
        return 1 - self.size.expected() / self.whole - wanted

    def penalty(self) -> Tensor:
        """What is added to the loss."""
        away = self.away()
        first, second = self.multipliers.tolist()
        found: Tensor = first * away + second * away.square()
        return found

    @torch.no_grad()
    def step(self) -> None:
        """Call after each step of the optimizer."""
        away = self.away()
        self.multipliers.grad = torch.stack([away, away.square()])
        self._ascent.step()
        for gate in self.size.gates:
            gate.log_alpha.clamp_(*RANGE)
        self.steps += 1


@lever(
    _NAME,
    reach="model",
    row=147,
    paper="Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large Language Models, "
    "arXiv:2310.05015",
)
@dataclass(frozen=True, kw_only=True)
class L0(Tuning):
    """Train gates with an adapter until the model has its target size; a smaller plain model is left."""

    sparsity: float = option(0.3, between(0, 0.95), "share of the parameters in blocks that goes")
    head: bool = option(True, one_of(True, False), "gate attention heads")
    ffn: bool = option(True, one_of(True, False), "gate hidden units of feed-forward layers")
    hidden: bool = option(False, one_of(True, False), "gate the residual stream; needs RMS norms")
    rank: int = option(8, at_least(1), "rank of the adapter on queries and values")
    alpha: float = option(8.0, at_least(0), "alpha / rank multiplies the adapter")
    gate_rate: float = option(0.1, at_least(0), "learning rate of the gates and of the multipliers")
    ramp: float = option(0.5, between(0, 1), "share of the steps in which the target rises")
    retune_steps: int = option(100, at_least(0), "steps of tuning an adapter of the smaller model")
    prompt: bool = option(False, one_of(True, False), "put a prompt that says it is being pruned before every window")

    def change(self, model: Model, work: Work) -> None:
        maps, base = linear_maps(work, _NAME), self._loss(model)
        probe = [work.text(2)]
        graph = trace(model.module, probe)
        gates = self._gates(model.module, graph)
        names = [name for name in graph.axes if _in_block(model, name)]
        size = Size(graph, names, gates)
        plain, layers = self._gated(model, graph, maps, gates, work.seed)
        for path, layer in layers.items():
            anatomy.replace(model.module, path, layer)
        pressure = Lagrangian(size, self.sparsity, round(self.ramp * self.steps), self.gate_rate)
        g = torch.Generator().manual_seed(work.seed)

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            for gate in gates:
                gate.draw(g)
            return base(module, batch) + pressure.penalty()

        adapters = [one for layer in layers.values() for one in layer.parameters()]
        holder = nn.ModuleList(gates)
        model.module.add_module("_gates", holder)  # so that the trainer finds them
        groups = [Group(adapters, self.rate), Group([gate.log_alpha for gate in gates], self.gate_rate)]
        try:
            self.tune(model, work, groups, loss, stage="gates", callbacks=[pressure])
        finally:
            delattr(model.module, "_gates")
        self.settle(size, pressure.whole)
        with torch.no_grad():
            _fold(model.module, plain, layers)
        self._cut(model.module, graph, gates, probe)
        if self.retune_steps:
            self.retune(model, work, base)

    def settle(self, size: Size, whole: float) -> float:
        """Close gates for good, by the offset whose size is nearest to the target; the share that goes."""

        def gone(offset: float) -> float:
            for gate in size.gates:
                gate.settle(offset)
            return 1 - size.settled() / whole

        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if gone(middle) < self.sparsity else (middle, high)
        return gone(min((low, high), key=lambda offset: abs(gone(offset) - self.sparsity)))

    def _gates(self, module: nn.Module, graph: Graph) -> list[Gate]:
        kinds = [kind for name, kind in KINDS.items() if getattr(self, name)]
        found = [Gate(one) for one in graph.dimensions if one.kind in kinds]
        missing = [kind for kind in kinds if not graph.of(kind)]  # type: ignore[arg-type]
        if not kinds or missing:
            raise OptionError(
                f"{_NAME}: found no {' or '.join(missing) or 'units'} that could go; choose among head, ffn and hidden"
            )
        if self.hidden:
            for path in anatomy.of(module).norms:
                layer, ones = module.get_submodule(path), torch.ones(1, 1, graph.of("hidden")[0].size)
                if layer.weight.shape != ones.shape[2:]:
                    continue
                with torch.no_grad():
                    if torch.allclose(layer(ones), layer(-ones)):
                        raise ModelError(
                            f"{_NAME}: {path} takes a mean away, which hidden gates do not fit; give hidden = false"
                        )
        return found

    def _gated(
        self, model: Model, graph: Graph, maps: Sequence[Map], gates: Sequence[Gate], seed: int
    ) -> tuple[dict[str, nn.Module], dict[str, Gated]]:
        """The layers that are there, and what stands for them while gates are trained, by path."""
        g = torch.Generator().manual_seed(seed)
        found = {one.path: one for one in maps}
        embedding = model.anatomy.embedding
        if self.hidden and embedding is not None:
            found[embedding.path] = embedding
        layers = {}
        for path, one in found.items():
            if one.rows is not None:
                raise OptionError(f"{_NAME}: {path} holds several maps in one layer; split them first")
            matrix = anatomy.matrix(model.module, one)
            inner = self._adapter(matrix, g) if one.role in ("attention.query", "attention.value") else Adapted(matrix)
            rows, columns = _sides(graph, f"{path}.weight", one, gates)
            layers[path] = Gated(inner, rows, columns)
        return {path: model.module.get_submodule(path) for path in layers}, layers

    def _adapter(self, matrix: Tensor, generator: torch.Generator) -> Adapted:
        rows, columns = matrix.shape
        check_rank(self.rank, (rows, columns), _NAME)
        down = drawn(self.rank, columns, generator, columns**-0.5)
        return Adapted(matrix, up=torch.zeros(rows, self.rank), down=down, factor=self.alpha / self.rank)

    def _cut(self, module: nn.Module, graph: Graph, gates: Sequence[Gate], probe: Sequence[Tensor]) -> None:
        kept = {gate.dimension: gate.value != 0 for gate in gates}
        remove(module, graph, kept, probe)
        scaled = set()
        for dimension, mask in kept.items():
            if dimension.kind != "hidden" or bool(mask.all()):
                continue
            held = tensors_of(module)
            for path in anatomy.of(module).norms:
                weight = held.get(f"{path}.weight")
                if weight is None or (f"{path}.weight", 0) not in dimension.places or id(weight) in scaled:
                    continue
                scaled.add(id(weight))
                with torch.no_grad():  # a mean over what stayed is larger than one over the zeros, too
                    weight.div_(float(mask.float().mean().sqrt()))

    def retune(self, model: Model, work: Work, base: Loss | None = None) -> None:
        """Tune an adapter of queries and values and merge it; nothing is cut."""
        base = self._loss(model) if base is None else base
        g = torch.Generator().manual_seed(work.seed + 1)
        found = [one for one in anatomy.of(model.module).layers() if one.role in ("attention.query", "attention.value")]
        plain = {one.path: model.module.get_submodule(one.path) for one in found}
        layers = {one.path: self._adapter(anatomy.matrix(model.module, one), g) for one in found}
        for path, layer in layers.items():
            anatomy.replace(model.module, path, layer)
        group = Group([one for layer in layers.values() for one in layer.parameters()], self.rate)
        self.tune(model, work, [group], base, stage="adapter", steps=self.retune_steps)
        with torch.no_grad():
            _fold(model.module, plain, layers)

    def _loss(self, model: Model) -> Loss:
        if not self.prompt:
            return self.loss(model, _NAME)
        if self.target != "text":
            raise OptionError(f"{_NAME}: a prompt with target = original; the original knows no prompt: give text")
        self.loss(model, _NAME)  # refuses models that predict no next tokens
        return prompted(torch.tensor(model.need_tokenizer()(PROMPT)["input_ids"]))


def prompted(prefix: Tensor) -> Loss:
    """Mean loss in nats of the tokens of a window (B, T) that comes after ``prefix`` (P,)."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        ids = torch.cat([prefix.to(batch[0]).expand(len(batch[0]), -1), batch[0]], 1)
        logits = first_tensor(run(module, ids[:, :-1]))[:, len(prefix) - 1 :]
        return functional.cross_entropy(logits.flatten(0, 1).float(), batch[0].flatten())

    return loss


def _in_block(model: Model, name: str) -> bool:
    return any(name.startswith(f"{block.path}.") for block in model.anatomy.blocks)


def _sides(
    graph: Graph, name: str, one: Map, gates: Sequence[Gate]
) -> tuple[tuple[Gate, Tensor] | None, tuple[Gate, Tensor] | None]:
    """The gates on rows and columns of a layer: where units are written to the stream, and where the stream is."""
    sides: list[tuple[Gate, Tensor] | None] = [None, None]
    for gate in gates:
        for place, dim in gate.dimension.places:
            if place != name:
                continue
            side = 1 - dim if one.kind == "conv1d-transposed" else dim
            reads = side == 1 and one.role in ("attention.output", "ffn.down") and gate.dimension.kind != "hidden"
            writes = gate.dimension.kind == "hidden" and (
                (side == 0 and one.role in ("attention.output", "ffn.down")) or (side == 1 and one.role == "embedding")
            )
            if reads or writes:
                sides[side] = (gate, graph.unit(name, dim, gate.dimension))
    return sides[0], sides[1]


def _fold(module: nn.Module, plain: dict[str, nn.Module], layers: dict[str, Gated] | dict[str, Adapted]) -> None:
    """Put the plain layers back, with what stood for their weights."""
    for path, layer in plain.items():
        stood: Weight = layers[path]
        held = layer.weight
        assert isinstance(held, Tensor)
        held.copy_(stood.dense().T if isinstance(layer, Conv1D) else stood.dense())
        current = module.get_submodule(path).weight
        for other, part in list(module.named_modules(remove_duplicate=False)):
            if other != path and getattr(part, "weight", None) is current:  # a tied head
                tied = nn.Linear(held.shape[1], held.shape[0], bias=False)
                tied.weight = held
                module.set_submodule(other, tied)
        module.set_submodule(path, layer)
