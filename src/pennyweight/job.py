"""One fit under way: its stages, each of which leaves what it found in the journal.

Everything that takes long is a unit of the journal beside the output directory, so that a run that was killed goes on
where it was and ends bit-identical. Text is used in three disjoint parts: one gives the statistics, one checks the
plan, and the held-out one, which no decision sees, gives the figures of the receipt.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pennyweight import calibrate, resident
from pennyweight.damage import Prediction
from pennyweight.data import windows
from pennyweight.errors import DataError, OptionError
from pennyweight.export.targets import Target
from pennyweight.journal import Journal
from pennyweight.lever import Card, find, options_of
from pennyweight.lever import levers as all_levers
from pennyweight.model import anatomy
from pennyweight.model.kv_cache import kept_setting
from pennyweight.model.model import Model
from pennyweight.model.saving import file_bytes, narrowest
from pennyweight.plan import probes
from pennyweight.plan.offers import predict, settings_for
from pennyweight.plan.rounds import Plan
from pennyweight.plan.slots import Slot, matrix_of
from pennyweight.statistics import Statistics
from pennyweight.task import Task
from pennyweight.units import Budget, Floor, whole
from pennyweight.weights import Cost, Dense, Weight, rebuild, structure

Progress = Callable[[str, int, int], None]

#: Offered unless ``levers`` says otherwise. The first rounds at any rate better than every fixed-width lever, so the
#: others need not be priced; low rank is what lowers parameters and FLOPs.
DEFAULT_LEVERS = ("quantize.entropy",)
STRUCTURAL_LEVERS = ("factorize.svd",)
#: What a price in nats is made of.
PRICED = frozenset({"second_moment", "gradient"})


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Settings:
    """How much text a fit reads, in windows of ``length`` tokens; and its seed.

    Attributes:
        length: tokens a window.
        statistics: windows for second moments; the first ``gradients`` of them for gradients, too.
        gradients: windows run backward.
        check: windows that check plans.
        heldout: windows of held-out documents for the final figures.
        repair_steps: steps of a repair; None takes as many as its time allows, which depends on the machine.
        seed: of every draw.
    """

    length: int = 512
    statistics: int = 32
    gradients: int = 8
    check: int = 12
    heldout: int = 32
    repair_steps: int | None = None
    seed: int = 0


@dataclass
class Step:
    """Time and memory a stage took."""

    name: str
    seconds: float
    peak_rss_bytes: int


@dataclass
class Job:
    """One fit under way: what was asked, and what is known so far.

    ``target`` is the format that alone is planned for and written, too; None where the fit's own form is the end.
    """

    model: Model
    task: Task
    data: Any
    budgets: tuple[Budget, ...]
    floor: Floor | None
    cards: tuple[Card, ...]
    settings: Settings
    journal: Journal
    progress: Progress
    target: Target | None = None
    steps: list[Step] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        resident.give_back()
        resident.restart()
        began = clock.perf_counter()
        self.progress(name, 0, 1)
        yield
        self.progress(name, 1, 1)
        self.steps.append(Step(name, clock.perf_counter() - began, resident.highest()))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every unit of the journal depends on."""
        return {
            "model": self.model.fingerprint,
            "calibration": self.calibration,
            "settings": vars(self.settings),
            "threads": torch.get_num_threads(),
        }

    @cached_property
    def calibration(self) -> Tensor:
        """(statistics + check, length) token ids of calibration documents."""
        s = self.settings
        return windows(
            self.data, self.model.need_tokenizer(), part="calibration", length=s.length,
            count=s.statistics + s.check, seed=s.seed,
        )  # fmt: skip

    def text(self, count: int) -> Tensor:
        """(up to count, length) calibration windows to train on, those that check plans left out.

        Fewer where the text has fewer; at least those that statistics have seen.
        """
        s = self.settings
        taken = {tuple(window.tolist()) for window in self.check}
        while count > s.statistics:
            try:
                found = windows(
                    self.data, self.model.need_tokenizer(), part="calibration", length=s.length,
                    count=count + s.check, seed=s.seed,
                )  # fmt: skip
            except DataError:
                count //= 2
            else:
                return torch.stack([window for window in found if tuple(window.tolist()) not in taken][:count])
        return self.calibration[: s.statistics]

    @cached_property
    def heldout(self) -> Tensor:
        """(heldout, length) token ids of held-out documents."""
        s = self.settings
        return windows(
            self.data, self.model.need_tokenizer(), part="heldout", length=s.length, count=s.heldout, seed=s.seed
        )

    @property
    def check(self) -> Tensor:
        """The calibration windows that statistics have not seen."""
        return self.calibration[self.settings.statistics :]

    # -- stages ------------------------------------------------------------------------------------------------------

    def statistics(self) -> Mapping[str, Statistics]:
        """Statistics of every linear map, each read from the journal when it is asked for: together they are large."""
        s, needs = self.settings, PRICED.union(*(card.needs for card in self.cards))
        key = Journal.key("statistics", needs=sorted(needs), **self.identity)
        with self.stage("statistics"):
            if not self.journal.done(key):
                found = calibrate.collect(
                    self.model, self.calibration[: s.statistics],
                    needs=needs, gradient_tokens=s.gradients * s.length,
                    report=self.progress,
                )  # fmt: skip
                self.journal.put(key, *_flattened(found))
                del found
            unit = self.journal.lazily(key)
            return _Journalled(unit.tensors, unit.meta["maps"])

    def scores(self, what: str, name: str, module: torch.nn.Module, ids: Tensor, *, exact: bool) -> Tensor:
        """Scores of ``module`` on windows ``ids`` (see `pennyweight.task`), a unit of the journal.

        Args:
            what: the stage.
            name: what tells ``module`` from others on the same windows.
            module: run when the journal does not have them.
            ids: (windows, tokens).
            exact: in float32; otherwise with bfloat16 products, for plans.
        """
        cache = kept_setting(module)
        kept = {} if cache is None else {"cache": cache.plain()}
        key = Journal.key("scores", of=name, ids=ids, exact=exact, **kept, **self.identity)
        with self.stage(what):
            if not self.journal.done(key):
                found = self.task.scores(module, ids, exact=exact, report=lambda d, n: self.progress(what, d, n))
                self.journal.store(key, {"scores": found})
            return self.journal.load(key).tensors["scores"]

    def offers(self, slots: Sequence[Slot]) -> dict[str, list[Prediction]]:
        """Predicted cost and damage of every candidate in every slot.

        "As it is" stands where no lever applies, and beside the others where what is budgeted is measured.
        """
        found: dict[str, list[Prediction]] = {}
        resources = {budget.resource for budget in self.budgets}
        with self.stage("predictions"):
            for done, slot in enumerate(slots):
                weight = Dense(matrix_of(self.model.module, slot))
                settings = (
                    settings_for(self.cards, slot.map.shape)
                    if self.target is None
                    else list(self.target.settings(slot.map))
                )
                found[slot.name] = self._predicted(slot, settings, weight)
                if not found[slot.name] or resources & probes.MEASURED:
                    matrix = weight.dense()
                    found[slot.name].append(Prediction(None, Dense(matrix.to(narrowest(matrix))).cost(), 0.0))
                self.progress("predictions", done + 1, len(slots))
        if resources & (probes.MEASURED | {"energy"}):
            found = probes.priced(self.model, slots, found, resources, self._probes(slots, found, resources))
        return found

    def _predicted(self, slot: Slot, settings: Sequence[Any], weight: Dense) -> list[Prediction]:
        """Predictions for ``settings`` in ``slot``, a unit of the journal."""
        asked = [{"lever": lever.lever_name, **options_of(lever)} for lever in settings]
        key = Journal.key("predicted", slot=slot.name, offered=asked, **self.identity)
        if not self.journal.done(key):
            made = predict(settings, weight, slot.statistics, seed=self.settings.seed)
            self.journal.store(key, meta={"found": [[vars(one.cost), one.damage] for one in made]})
        found = self.journal.load(key).meta["found"]
        return [Prediction(lever, Cost(**cost), harm) for lever, (cost, harm) in zip(settings, found, strict=True)]

    def _probes(
        self, slots: Sequence[Slot], offers: Mapping[str, Sequence[Prediction]], resources: Collection[str]
    ) -> dict[Any, probes.Probe]:
        """What candidates take on this machine, each kind tried once and kept in the journal: it decides plans."""
        if not set(resources) & probes.MEASURED:
            return {}
        asked = {probes.key_of(slot, offer.lever): slot for slot in slots for offer in offers[slot.name]}
        found: dict[Any, probes.Probe] = {}
        with self.stage("probing this machine"):
            for done, (key, slot) in enumerate(asked.items()):
                unit = Journal.key("probe", **probes.kind_of(slot, key[-1]), **self.identity)
                if not self.journal.done(unit):
                    made = probes.try_out(self.model, slot, key[-1], self.check)
                    self.journal.store(unit, meta=vars(made))
                found[key] = probes.Probe(**self.journal.load(unit).meta)
                self.progress("probing this machine", done + 1, len(asked))
        return found

    def observed(self, name: str, module: torch.nn.Module) -> dict[str, int]:
        """What the whole model takes of the budgeted resources that no structure tells, in the whole units of plans.

        Args:
            name: what tells ``module`` from others; a unit of the journal.
            module: run when the journal does not have it.
        """
        found: dict[str, int] = {}
        asked = sorted({b.resource for b in self.budgets} & (probes.MEASURED | {"energy"}))
        for each in asked:
            key = Journal.key("observed", of=name, resource=each, **self.identity)
            if not self.journal.done(key):
                with self.stage(f"measuring {each}"):
                    value = probes.observe(replace(self.model, module=module), each, self.check)
                self.journal.store(key, meta={"value": value})
            found[each] = whole(each, self.journal.load(key).meta["value"])
        return found

    def written(self) -> int:
        """Exactly the bytes of the files that a budget in bytes means, of the model as it now is."""
        return file_bytes(self.model) if self.target is None else self.target.bytes(self.model)

    def solve(self, slots: Sequence[Slot], plan: Plan) -> dict[str, Weight]:
        """The compact weight of every slot that ``plan`` changes, each a unit of the journal."""
        solved: dict[str, Weight] = {}
        with self.stage("solving"):
            for done, slot in enumerate(slots):
                lever = plan.picked[slot.name].lever
                if lever is None:
                    continue
                key = Journal.key("solve", slot=slot.name, lever=lever.lever_name, **options_of(lever), **self.identity)
                if not self.journal.done(key):
                    made = lever.solve(Dense(matrix_of(self.model.module, slot)), slot.statistics)
                    self.journal.store(key, made.state_dict(), {"structure": structure(made)})
                unit = self.journal.load(key)
                solved[slot.name] = rebuild(unit.meta["structure"], unit.tensors, slot.name)
                self.progress("solving", done + 1, len(slots))
        return solved


@contextmanager
def standing_in(
    module: torch.nn.Module,
    slots: Sequence[Slot],
    solved: Mapping[str, Weight],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[None]:
    """For a while the model computes with the solved matrices, dense, and with ``tensors`` in place of its own.

    Args:
        module: the original.
        slots: where.
        solved: what, by slot name.
        tensors: other parameters, by name.
        dtype: of the matrices of the blocks, for scores whose products run in it anyway; None for the module's own.
    """
    kept: list[tuple[torch.nn.Parameter, Tensor]] = []
    try:
        for name, tensor in (tensors or {}).items():
            parameter = module.get_parameter(name)
            kept.append((parameter, parameter.data))
            parameter.data = tensor.to(parameter.dtype)
        for slot in slots:
            if slot.name in solved:
                layer = module.get_submodule(slot.map.path)
                held = getattr(layer, slot.map.parameter)
                dense = solved[slot.name].dense().detach()
                kept.append((held, held.data))
                turned = dense.T if slot.map.kind == "conv1d-transposed" else dense
                inner = slot.map.block is not None and slot.map.kind == "linear"
                held.data = turned.to((dtype if inner else None) or held.dtype).reshape(held.shape)
        yield
    finally:
        for held, data in kept:
            held.data = data


@contextmanager
def installed(module: torch.nn.Module, slots: Sequence[Slot], weights: Mapping[str, Weight]) -> Iterator[None]:
    """For a while the model holds the compact layers themselves."""
    kept = dict(module.named_modules(remove_duplicate=False))
    try:
        anatomy.replace_all(module, {slot.map.path: weights[slot.name] for slot in slots if slot.name in weights})
        yield
    finally:
        now = dict(module.named_modules(remove_duplicate=False))
        for path, layer in kept.items():
            if path and now.get(path) is not layer:
                module.set_submodule(path, layer)


def _flattened(found: Mapping[str, Statistics]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of statistics, a tensor that several maps share stored once."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    maps: dict[str, Any] = {}
    for name, statistics in found.items():
        held = {}
        for part, value in vars(statistics).items():
            if isinstance(value, Tensor):
                key = names.setdefault(id(value), f"{name}/{part}")
                tensors[key] = value
                held[part] = key
        maps[name] = {"count": statistics.count, "tensors": held}
    return tensors, {"maps": maps}


class _Journalled(Mapping[str, Statistics]):
    """Statistics by map name, read when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], maps: Mapping[str, Any]) -> None:
        self.tensors, self.maps = tensors, maps

    def __getitem__(self, name: str) -> Statistics:
        fact = self.maps[name]
        return Statistics(fact["count"], **{part: self.tensors[key] for part, key in fact["tensors"].items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)


def chosen_levers(text: str | Sequence[str] | None, budgets: Sequence[Budget]) -> tuple[Card, ...]:
    """The levers a fit may use: names, rooms ("quantize"), or changes of the default ("+quantize.gptq,-factorize.svd").

    Raises:
        OptionError: nothing is left, or a lever that no plan can use.
        RecipeError: an unknown lever.
    """
    structural = any(budget.resource in ("params", "flops", "latency") for budget in budgets)
    names = list(DEFAULT_LEVERS + (STRUCTURAL_LEVERS if structural else ()))
    asked = [part.strip() for part in (text.split(",") if isinstance(text, str) else text or ())]
    if any(not part.startswith(("+", "-")) for part in asked):
        names = []
    for part in asked:
        bare = part.lstrip("+-")
        room = [card.name for card in all_levers(bare) if card.reach == "weight"]
        if not room and find(bare).reach != "weight":
            raise OptionError(f"--levers {bare}: it changes whole models, which no plan does; apply a recipe with it")
        for name in room or [find(bare).name]:
            if part.startswith("-"):
                names = [kept for kept in names if kept != name]
            elif name not in names:
                names.append(name)
    if not names:
        raise OptionError(f"--levers {text!r} leaves none; name at least one (`pennyweight levers` lists them)")
    return tuple(find(name) for name in names)
