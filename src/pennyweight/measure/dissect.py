"""Where the time and the memory of training, fine-tuning and generation go, by module and phase.

Row 230. Source: L. Zhang et al., "Dissecting the Runtime Performance of the Training, Fine-tuning, and Inference of
Large Language Models", arXiv:2311.03687: shares of forward, backward and optimizer, of each kind of module in them, and
of weights, gradients, optimizer and activations in memory, with techniques switched on one at a time. Differs from the
source: one process, so that communication is left out; a module's backward is timed by the nodes of the graph that its
forward recorded, not by a profiler; every moment is charged to exactly one part, so that the parts add up to the whole.

Shape letters: B sequences, T tokens.
"""

from __future__ import annotations

import copy
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from pennyweight.errors import ModelError, OptionError
from pennyweight.measure import decoding
from pennyweight.measure.figures import plain_table
from pennyweight.measure.latency import quiet, settle
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.units import show_bytes, show_seconds
from pennyweight.weights import Dense, LowRank, Sum

if TYPE_CHECKING:
    from rich.table import Table

Loss = Callable[[nn.Module, Tensor], Tensor]
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
TECHNIQUES = ("plain", "recompute", "lora", "accumulate")
_RANK = 8  # of LoRA
_OUTSIDE = "outside modules"


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors, by what they are for.

    Attributes:
        weights: parameters and buffers.
        gradients: of what is trained.
        optimizer: its states.
        activations: held from the forward pass for the backward pass; in generation at most at any moment.
        cache: of keys and values.
        peak: of all of them at the fullest moment, what is only passed on included.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    cache: int
    peak: int


@dataclass(frozen=True)
class Breakdown:
    """One step, or one generation, taken apart.

    Attributes:
        model: its name.
        technique: one of `TECHNIQUES`, or "generation".
        batch, tokens: B and T.
        seconds: by phase and part; medians over repeats.
        plain_seconds: of the whole without anything watching it.
        memory: in bytes.
    """

    model: str
    technique: str
    batch: int
    tokens: int
    seconds: Mapping[tuple[str, str], float]
    plain_seconds: float
    memory: Memory

    @property
    def total_seconds(self) -> float:
        """The sum of all parts."""
        return sum(self.seconds.values())

    @property
    def overhead(self) -> float:
        """What watching added, as a share."""
        return self.total_seconds / self.plain_seconds - 1

    def phase(self, name: str) -> float:
        """Seconds of one phase."""
        return sum(value for (phase, _), value in self.seconds.items() if phase == name)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        parts = [{"phase": phase, "part": part, "seconds": took} for (phase, part), took in self.seconds.items()]
        setting = {"model": self.model, "technique": self.technique, "batch": self.batch, "tokens": self.tokens}
        totals = {"seconds": self.total_seconds, "plain_seconds": self.plain_seconds}
        return setting | totals | {"parts": parts, "memory": vars(self.memory)}

    def table(self) -> Table:
        """A rich table: a row a part, a column a phase, and the memory below."""
        phases = list(dict.fromkeys(phase for phase, _ in self.seconds))
        parts = sorted({part for _, part in self.seconds}, key=lambda part: -self._part(part))
        rows = [
            (part, *(self._show(self.seconds.get((phase, part))) for phase in phases), self._show(self._part(part)),
             f"{100 * self._part(part) / self.total_seconds:.1f} %")
            for part in parts
        ]  # fmt: skip
        whole = tuple(show_seconds(self.phase(phase)) for phase in phases)
        rows.append(("all", *whole, show_seconds(self.total_seconds), f"watching took {100 * self.overhead:.1f} %"))
        blank = ("",) * len(phases)
        for name, count in vars(self.memory).items():
            if count:
                rows.append((f"memory: {name}", *blank, show_bytes(count), ""))
        title = f"{self.model}: {self.technique}, batch {self.batch}, {self.tokens} tokens"
        return plain_table(title, ("", *phases, "all", "share"), rows)

    def _part(self, name: str) -> float:
        return sum(value for (_, part), value in self.seconds.items() if part == name)

    @staticmethod
    def _show(seconds: float | None) -> str:
        return "" if seconds is None else show_seconds(seconds)


def parts_of(module: nn.Module) -> dict[str, str]:
    """The part that each module of ``module`` counts to, by path: roles of maps, and what lies between them.

    A module without a role counts to what it lies in: an activation function to the feed-forward layer ("ffn.gating"),
    rotations and scores to "attention.core", additions to "residual" (a block itself), the rest to "around blocks".
    """
    found = anatomy.of(module)
    roles = {one.path: re.sub(r"\[\d+\]", "", one.role) for one in found.whole}
    blocks = {block.path for block in found.blocks}
    parts: dict[str, str] = {}
    for path, _ in module.named_modules():
        above = path.rpartition(".")[0]
        inside = sorted({role for at, role in roles.items() if at.startswith(f"{path}.")})
        if path in roles:
            parts[path] = roles[path]
        elif above in roles or (above in parts and parts[above] == "norm"):
            parts[path] = parts[above]
        elif path in found.norms:
            parts[path] = "norm"
        elif path in blocks:
            parts[path] = "residual"
        elif inside and all(role.startswith(("attention", "cross_attention")) for role in inside):
            parts[path] = "attention.core"
        elif inside and all(role.startswith("ffn") for role in inside):
            parts[path] = "ffn.gating"
        elif inside and all(role.startswith("moe") for role in inside):
            parts[path] = "moe.routing"
        else:
            parts[path] = parts[above] if path else "around blocks"
    return parts


class _Ledger:
    """Charges every moment to one part of one phase."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}
        self.phase, self.stack = "forward", [_OUTSIDE]
        self.marks: list[tuple[int, str]] = []  # from which number of the graph's nodes on a part records
        self.last = perf_counter()

    def charge(self, phase: str, part: str) -> None:
        now = perf_counter()
        self.seconds[phase, part] = self.seconds.get((phase, part), 0.0) + now - self.last
        self.last = now

    def enter(self, part: str) -> None:
        self.charge(self.phase, self.stack[-1])
        self.stack.append(part)
        self.mark(part)

    def leave(self) -> None:
        self.charge(self.phase, self.stack.pop())
        self.mark(self.stack[-1])

    def mark(self, part: str) -> None:
        if self.phase == "forward":
            self.marks.append((torch.autograd._get_sequence_nr(), part))  # type: ignore[attr-defined]

    def recorded_by(self, number: int) -> str:
        at = bisect_right(self.marks, number, key=lambda mark: mark[0])
        return self.marks[at - 1][1] if at else _OUTSIDE


@contextmanager
def _watching(module: nn.Module, parts: Mapping[str, str], ledger: _Ledger) -> Iterator[None]:
    with ExitStack() as hooks:
        for path, one in module.named_modules():

            def enter(_module: nn.Module, _inputs: Any, part: str = parts[path]) -> None:
                # what runs a second time while gradients are taken was not kept the first time
                ledger.phase = "recompute" if ledger.phase == "backward" else ledger.phase
                ledger.enter(part)

            def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
                ledger.leave()
                if ledger.phase == "recompute" and len(ledger.stack) == 1:
                    ledger.phase = "backward"

            hooks.enter_context(one.register_forward_pre_hook(enter))
            hooks.enter_context(one.register_forward_hook(leave, always_call=True))
        yield


def _watch_graph(loss: Tensor, ledger: _Ledger, owners: Mapping[int, str]) -> None:
    """Charge the backward pass node by node: to the part that recorded it, or that owns the weight."""
    assert loss.grad_fn is not None
    seen, todo = {loss.grad_fn}, [loss.grad_fn]
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is None:
            part = ledger.recorded_by(node._sequence_nr())
        else:
            part = owners.get(id(variable), _OUTSIDE)

        def begin(_gradients: Any, part: str = part) -> None:
            ledger.stack[0] = part

        def end(_inputs: Any, _outputs: Any, part: str = part) -> None:
            ledger.charge("backward", part)

        node.register_prehook(begin)
        node.register_hook(end)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                todo.append(after)


class _Live(TorchDispatchMode):
    """Bytes of storages made inside it that still live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.peak = 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {one.untyped_storage()._cdata for one in _tensors((args, tuple((kwargs or {}).values())))}
        found = func(*args, **(kwargs or {}))
        for one in _tensors(found):
            storage = one.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._add(storage)
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def next_token(module: nn.Module, ids: Tensor) -> Tensor:
    """The loss of a causal language model on token ids (B, T), in nats a token."""
    output = module(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def adamw(weights: list[Tensor]) -> torch.optim.Optimizer:
    """AdamW at a small rate."""
    return torch.optim.AdamW(weights, lr=1e-6)


def predicted_memory(module: nn.Module, *, states: int = 2) -> Memory:
    """What a step of training will hold besides activations, from the structure alone.

    Args:
        module: parameters that take no gradient have no state either.
        states: numbers the optimizer keeps for each trained one: 2 of Adam, 1 of momentum, 0 of plain descent.
    """
    weights = sum(one.nbytes for one in (*module.parameters(), *module.buffers()))
    trained = sum(one.nbytes for one in module.parameters() if one.requires_grad)
    return Memory(weights, trained, states * trained, 0, 0, weights + (1 + states) * trained)


def training(
    model: Model | nn.Module,
    ids: Tensor,
    *,
    technique: str = "plain",
    loss: Loss = next_token,
    optimizer: Optimizer = adamw,
    repeats: int = 3,
) -> Breakdown:
    """One step of training, taken apart; of a copy, the model stays as it is.

    Args:
        model: with weights that train.
        ids: (B, T), or whatever ``loss`` takes.
        technique: "plain"; "recompute" keeps the inputs of blocks alone and runs them twice; "lora" trains low-rank
            updates (rank 8) of all maps in blocks only; "accumulate" takes B sequences one after the other.
        loss: of the model on the ids.
        optimizer: made of what is trained.
        repeats: of the step, watched and unwatched in turns.

    Raises:
        OptionError: no such technique, or one that the model does not know.
        ModelError: a loss that depends on no weight.
    """
    name = model.name if isinstance(model, Model) else type(model).__name__
    if technique not in TECHNIQUES:
        raise OptionError(f"breakdown: technique {technique!r}; give one of {', '.join(TECHNIQUES)}")
    if repeats < 1:
        raise OptionError(f"breakdown: {repeats} repeats; give at least 1")
    module = _prepared(copy.deepcopy(model.module if isinstance(model, Model) else model), technique)
    pieces = [ids[at : at + 1] for at in range(len(ids))] if technique == "accumulate" else [ids]
    trained: list[Tensor] = [weight for weight in module.parameters() if weight.requires_grad]
    if not trained:
        raise ModelError(f"{name} has no weight that takes a gradient; there is nothing to train")
    update = optimizer(trained)
    parts = parts_of(module)
    owners = {id(weight): parts[path.rpartition(".")[0]] for path, weight in module.named_parameters()}

    def step(ledger: _Ledger | None) -> None:
        update.zero_grad(set_to_none=True)
        for piece in pieces:
            found = loss(module, piece) / len(pieces)
            if not found.requires_grad:
                raise ModelError(f"{name}: the loss depends on no weight")
            if ledger is not None:
                ledger.charge("forward", _OUTSIDE)
                _watch_graph(found, ledger, owners)
                ledger.last, ledger.phase = perf_counter(), "backward"  # hooking in is no part of the step
            found.backward()  # type: ignore[no-untyped-call]
            if ledger is not None:
                ledger.charge("backward", _OUTSIDE)
                ledger.phase, ledger.stack = "forward", [_OUTSIDE]
        update.step()
        settle()
        if ledger is not None:
            ledger.charge("optimizer", "optimizer")

    def watched() -> dict[tuple[str, str], float]:
        ledger = _Ledger()
        with _watching(module, parts, ledger):
            ledger.last = perf_counter()
            step(ledger)
        return ledger.seconds

    step(None)  # makes the optimizer's states
    seconds, plain = _in_turns(lambda: step(None), watched, repeats)
    memory = _training_memory(module, pieces[0], loss, update, trained)
    return Breakdown(name, technique, len(ids), ids.shape[-1], seconds, plain, memory)


def _prepared(module: nn.Module, technique: str) -> nn.Module:
    """The module ready to train with ``technique``, dropout off so that steps compare."""
    module.eval()
    if technique == "recompute":
        if not isinstance(module, PreTrainedModel) or not module.supports_gradient_checkpointing:
            raise OptionError(f"breakdown: {type(module).__name__} does not know how to recompute; leave it out")
        enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        module.config.use_cache = False  # what is recomputed cannot be kept as well
        module.train()  # transformers recomputes in training mode only
        for one in module.modules():
            if isinstance(one, nn.Dropout):
                one.p = 0.0
    if technique == "lora":
        module.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for found in anatomy.of(module).layers():
            if found.block is not None and found.kind == "linear":
                held = getattr(module.get_submodule(found.path), found.parameter)
                base = Dense(held) if isinstance(held, Tensor) else held
                (m, n), rank = found.shape, min(_RANK, *found.shape)
                down = torch.randn(rank, n, generator=generator, dtype=held.dtype) / n**0.5
                anatomy.replace(module, found.path, Sum(base, LowRank(torch.zeros(m, rank, dtype=held.dtype), down)))
    return module


def _in_turns(
    plain: Callable[[], None], watched: Callable[[], dict[tuple[str, str], float]], repeats: int
) -> tuple[dict[tuple[str, str], float], float]:
    """Medians of the parts, and of the whole unwatched."""
    ledgers, wholes = [], []
    with quiet():
        for turn in range(repeats):
            for index in (0, 1) if turn % 2 else (1, 0):
                if index:
                    begun = perf_counter()
                    plain()
                    wholes.append(perf_counter() - begun)
                else:
                    ledgers.append(watched())
    keys = list(dict.fromkeys(key for ledger in ledgers for key in ledger))
    return {key: median(ledger.get(key, 0.0) for ledger in ledgers) for key in keys}, median(wholes)


def _training_memory(
    module: nn.Module, piece: Tensor, loss: Loss, update: torch.optim.Optimizer, trained: Sequence[Tensor]
) -> Memory:
    update.zero_grad(set_to_none=True)
    with _Live() as live:
        found = loss(module, piece)
        held = live.bytes
        found.backward()  # type: ignore[no-untyped-call]
        gradients = sum(weight.grad.nbytes for weight in trained if weight.grad is not None)
        update.step()
    states = sum(one.nbytes for state in update.state.values() for one in state.values() if isinstance(one, Tensor))
    weights = sum(one.nbytes for one in (*module.parameters(), *module.buffers()))
    return Memory(weights, gradients, states, held, 0, weights + states + live.peak)


def generation(model: Model | nn.Module, prompt: Tensor, *, tokens: int = 16, repeats: int = 3) -> Breakdown:
    """Reading a prompt and writing after it, greedily, taken apart.

    Args:
        model: a causal language model with a cache.
        prompt: (T,) token ids.
        tokens: to write, at least 2.
        repeats: watched and unwatched in turns.

    Raises:
        ModelError: it keeps no cache.
    """
    module = model.module if isinstance(model, Model) else model
    name = model.name if isinstance(model, Model) else type(model).__name__
    if repeats < 1:
        raise OptionError(f"breakdown: {repeats} repeats; give at least 1")
    parts = parts_of(module)

    def plain() -> None:
        decoding.greedy(module, prompt, tokens=tokens)

    def watched() -> dict[tuple[str, str], float]:
        ledger = _Ledger()
        ledger.phase = "prefill"

        def read(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            ledger.charge(ledger.phase, _OUTSIDE)
            ledger.phase = "decode"

        # the root's own hook comes last, when all of its time is charged
        with _watching(module, parts, ledger), module.register_forward_hook(read), _timed_cache(ledger):
            ledger.last = perf_counter()
            plain()
            ledger.charge(ledger.phase, _OUTSIDE)
        return ledger.seconds

    plain()
    seconds, whole = _in_turns(plain, watched, repeats)
    weights = sum(one.nbytes for one in (*module.parameters(), *module.buffers()))
    caches: list[int] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caches.append(_cache_bytes(output.past_key_values))

    with _Live() as live, module.register_forward_hook(note):
        plain()
    memory = Memory(weights, 0, 0, live.peak - caches[-1], caches[-1], weights + live.peak)
    return Breakdown(name, "generation", 1, len(prompt), seconds, whole, memory)


def _cache_bytes(cache: Any) -> int:
    return sum(
        tensor.nbytes
        for layer in getattr(cache, "layers", ())
        for key in ("keys", "values")
        if isinstance(tensor := getattr(layer, key, None), Tensor)
    )


@contextmanager
def _timed_cache(ledger: _Ledger) -> Iterator[None]:
    """What keys and values take on their way into the cache counts as "cache"."""
    update = Cache.update

    def timed(self: Cache, *args: Any, **options: Any) -> Any:
        ledger.enter("cache")
        try:
            return update(self, *args, **options)
        finally:
            ledger.leave()

    Cache.update = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Cache.update = update  # type: ignore[method-assign]
