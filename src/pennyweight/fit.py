"""The main job: a model, data, a budget and a floor in; a fitted model with its recipe, receipt and report out.

statistics -> predictions -> plan -> solve -> measure -> (rescale, plan, solve, measure) -> verify -> write
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pennyweight.damage import Prediction
from pennyweight.errors import BudgetError, OptionError
from pennyweight.export import targets
from pennyweight.export.targets import Target
from pennyweight.finish import Fitted, Solved, digest, finish
from pennyweight.job import Job, Progress, Settings, chosen_levers, installed, quiet, standing_in
from pennyweight.journal import Journal
from pennyweight.lever import find, make
from pennyweight.measure.stats import tied
from pennyweight.model import bf16_bytes, load
from pennyweight.model.kv_cache import KVSetting, keeping
from pennyweight.model.model import Model, parameters
from pennyweight.plan import cache
from pennyweight.plan.choose import frontier
from pennyweight.plan.rounds import Plan, Prices, label_of
from pennyweight.plan.slots import Slot, slots_of
from pennyweight.receipt import Certificate
from pennyweight.recipe import Recipe, Step
from pennyweight.repair import repair as mend
from pennyweight.repair import reserved_bytes
from pennyweight.safe_write import check_free
from pennyweight.task import task_of
from pennyweight.units import Budget, Floor, base, parse_seconds, show_bytes, whole
from pennyweight.weights import Weight

__all__ = ["Fitted", "Settings", "Solved", "fit", "plan_and_solve"]

#: Plans solved at most: the first teaches the prices, the second spends by them, the third mends an overrun.
ROUNDS = 3
#: Resources a plan can be made against: read off the structure of a weight, by the energy model, measured here, or (kv)
#: a matter of the cache alone.
PLANNED = ("bytes", "params", "flops", "latency", "memory", "energy", "kv")
#: Plans within this factor of each other count as equal.
_TIE = 1.01
#: How much worse, in predicted harm, a simpler plan may be and still be worth solving.
_REACH = 0.005
#: Spread of the harm over windows, as a multiple of its mean, until it has been measured.
_SPREAD = 0.7


def fit(
    model: str | Path | torch.nn.Module | Model,
    *,
    data: Any = "wiki",
    budgets: Sequence[str | Budget] = (),
    floor: str | Floor | None = None,
    levers: str | Sequence[str] | None = None,
    time: str | float | None = None,
    out: str | Path | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    repair: bool | None = None,
    seed: int = 0,
    target: str | None = None,
    settings: Settings | None = None,
    progress: Progress = quiet,
) -> Any:
    """Fit ``model`` to ``budgets`` at the best quality, or to ``floor`` at the fewest bytes; both together check both.

    Args:
        model: a short name, a directory, a GGUF file, a cached hub id, or a loaded model.
        data: text to calibrate and judge on: a short name, a path, or documents.
        budgets: "25%", "35MB", "params=90M", "flops=60%", ...; a budget in bytes means the files that are written.
        floor: "perplexity<=1.10x", "cosine>=0.99": held to by a one-sided test at 95 %.
        levers: names or rooms; "+name" and "-name" change the default set.
        time: seconds or "10min": what repair may take; none is done without.
        out: directory to write to; needed unless ``dry_run``.
        dry_run: predict cost, quality, time, memory and disk instead, after a smoke pass of every stage.
        resume: go on from the journal that a killed run left beside ``out``.
        overwrite: replace an earlier result in ``out``.
        repair: tune what is tunable against the original; None does so when ``time`` is given.
        seed: of every draw.
        target: the engine's format ("gguf") that is planned for, within what it holds bit for bit, and written, too; a
            budget in bytes then means its file.
        settings: how much text is read.
        progress: called with (stage, done, total).

    Raises:
        BudgetError: what is asked cannot be met; it says the nearest that can.
        UserError: anything else that is wrong with what was given.
    """
    limits = tuple(Budget.parse(b) if isinstance(b, str) else b for b in budgets)
    wanted = Floor.parse(floor) if isinstance(floor, str) else floor
    seconds = parse_seconds(time) if isinstance(time, str) else time
    if not limits and wanted is None:
        raise OptionError('fit: nothing is asked; give a budget ("25%") or a floor ("perplexity<=1.10x")')
    if len({b.resource for b in limits}) < len(limits):
        raise OptionError("fit: two budgets for one resource; give each once")
    if repair and seconds is None:
        raise OptionError("fit: repair needs to know how long it may take; give a time (--time 10min)")
    if out is None and not dry_run:
        raise OptionError("fit: give a directory to write to (--out DIR), or ask for a dry run")
    if out is not None:
        check_free(out, overwrite=overwrite or resume)
    for budget in limits:
        if budget.resource not in PLANNED:
            raise OptionError(
                f"fit: plans are made against {', '.join(PLANNED)}, not {budget.resource}; "
                f"`pennyweight measure` says what {budget.resource} a fitted model has"
            )
    aim = None if target is None else _aimed(target, limits, levers=levers, mending=seconds is not None)
    cards = chosen_levers(levers, limits) if aim is None else (find(aim.lever),)
    loaded = model if isinstance(model, Model) else load(model)
    if aim is not None:
        aim.check(loaded)
    task = task_of(loaded)
    if wanted is not None:
        task.check(wanted)
    job = Job(
        model=loaded, task=task, data=data, budgets=limits, floor=wanted, cards=cards,
        settings=replace(settings or Settings(), seed=seed), progress=progress,
        journal=Journal.beside(out if out is not None else Path.cwd() / "pennyweight-dry-run", resume=resume),
        target=aim,
    )  # fmt: skip
    if dry_run:
        from pennyweight.dry_run import estimate  # the two need each other: it plans with the pieces below

        return estimate(job)
    assert out is not None
    mending = seconds if repair is not False else None
    solved = plan_and_solve(job, mending=mending is not None)
    if mending is not None:
        solved = with_exact_bytes(job, mend(job, solved, mending))
    return finish(job, solved, Path(out), overwrite=overwrite or resume)


def _aimed(name: str, limits: Sequence[Budget], *, levers: object, mending: bool) -> Target:
    """The target ``name``, when what else is asked goes with it."""
    found = targets.target(name)
    if levers is not None:
        raise OptionError(f"fit: a target decides what is offered ({found.lever}); leave out the levers or the target")
    if mending:
        raise OptionError(f"fit: repair moves scales off the grids that {name} holds; leave out the time or the target")
    other = [budget.resource for budget in limits if budget.resource != "bytes"]
    if other:
        raise OptionError(f"fit: a plan for {name} is made against bytes, not {other[0]}; leave out one or the other")
    return found


def with_exact_bytes(job: Job, solved: Solved) -> Solved:
    """``solved`` with the bytes its files will have, once more within the budget."""
    with installed(job.model.module, solved.slots, solved.weights):
        written = job.written()
    if written > solved.allowed.get("bytes", written):
        raise BudgetError(f"repair: {written:,} bytes are over the budget; this is a bug, fit with --no-repair")
    return replace(solved, spent={**solved.spent, "bytes": written})


def plan_and_solve(job: Job, *, mending: bool = False) -> Solved:
    """The rounds of the main job; see the module's text.

    Args:
        job: what was asked.
        mending: leave room for the scales that a repair adds.
    """
    before = job.scores("baseline", "original", job.model.module, job.check, exact=False)
    budget = next((b for b in job.budgets if b.resource == "kv"), None)
    if budget is None:
        return _rounds(job, before, mending=mending)
    limit = int(budget.limit_for(cache.bytes_of(job.model) if budget.relative else 0))
    if len(job.budgets) == 1 and job.floor is None:
        raise OptionError(
            "fit: a kv budget alone changes no weight; apply a recipe with infer.kv_cache, or add a budget"
        )

    def harm(module: torch.nn.Module, setting: KVSetting) -> float:
        after = job.scores(f"trying a cache of {setting.bits} bits", "original", module, job.check, exact=False)
        return float(job.task.harm(before, after).double().mean())

    setting, size, _ = cache.setting_for(job.model, limit, harm)
    with keeping(job.model.module, setting):  # weights are planned and judged beside it
        found = _rounds(job, before, mending=mending)
    recipe = found.recipe
    if setting is not None:
        step = Step(make("infer.kv_cache", {**vars(setting)}))
        recipe = Recipe((*recipe.steps, step), recipe.source)
    return replace(
        found, kv=setting, recipe=recipe, spent={**found.spent, "kv": size}, allowed={**found.allowed, "kv": limit},
        planned={**found.planned, "kv": size},
    )  # fmt: skip


def _rounds(job: Job, before: torch.Tensor, *, mending: bool) -> Solved:
    reference = bf16_bytes(job.model)
    slots = slots_of(job.model.anatomy, job.statistics())
    offers = job.offers(slots)
    prices, allowed = first_plan(job, slots, offers, reference)
    ceiling = None
    if job.floor is not None and not allowed:
        ceiling = job.task.harm_of(job.floor, before)
    room = {name: whole(name, limit) for name, limit in allowed.items()}
    if mending and "bytes" in room:
        room["bytes"] -= reserved_bytes(slots, offers)
    spread, found = _SPREAD, None
    for number in range(1, ROUNDS + 1):
        plan = prices.plan(slots, offers, room, None if ceiling is None else ceiling / _caution(job, spread))
        if all(offer.lever is None for offer in plan.picked.values()):
            raise BudgetError(f"{job.model.name} meets what is asked as it is; tighten a budget, or leave it alone")
        now, prices, deviation = _attempt(job, slots, offers, plan, prices, before, allowed, number)
        assert now.measured is not None
        spread = deviation / now.measured if now.measured > 0 else _SPREAD
        fits = _within(now, room)
        floor_met = ceiling is None or now.measured * _caution(job, spread) <= ceiling
        now = replace(now, weights={})  # they lie in the journal, and two rounds of them need not lie in memory
        if fits and floor_met and (found is None or _better(now, found, ceiling)):
            found, chosen = now, plan
        if found is not None and number > 1:
            break
    if found is None:
        assert now.measured is not None
        raise BudgetError(
            f"after {ROUNDS} rounds no plan holds: the last one spends {show_bytes(now.spent['bytes'])} and measures "
            f"{job.task.metric} {job.task.effect_of(now.measured):.3f}; relax what was asked a little"
        )
    found = replace(found, weights=job.solve(slots, chosen))
    if ceiling is None:
        found = _simpler(job, slots, offers, prices, before, found, room)
    return found


def _attempt(
    job: Job, slots: tuple[Slot, ...], offers: Mapping[str, Sequence[Prediction]], plan: Plan, prices: Prices,
    before: torch.Tensor, allowed: Mapping[str, int | float], number: int,
) -> tuple[Solved, Prices, float]:  # fmt: skip
    """``plan`` solved and measured, the prices that this taught, and the harm's deviation over windows."""
    weights = job.solve(slots, plan)
    prices, spent = solved_cost(job, prices, plan, weights, slots)
    harm, prices, deviation = measure(job, slots, weights, plan, prices, before)
    solved = Solved(
        slots=slots,
        weights=weights,
        recipe=Recipe.of({name: o.lever for name, o in plan.picked.items() if o.lever is not None}),
        labels={name: label_of(offer) for name, offer in plan.picked.items() if offer.lever is not None},
        spent={name: base(name, value) for name, value in spent.items()},
        allowed=allowed,
        planned={name: base(name, value) for name, value in plan.choice.cost.items()},
        predicted=plan.choice.damage,
        measured=harm,
        curve=tuple((cost, damage) for cost, damage, _ in frontier(prices.problem(slots, offers))),
        certificate=_certificate(plan, sum(map(len, offers.values())), number),
    )
    return solved, prices, deviation


def _within(solved: Solved, room: Mapping[str, int]) -> bool:
    return all(whole(name, solved.spent[name]) <= limit for name, limit in room.items())


def _simpler(
    job: Job, slots: tuple[Slot, ...], offers: Mapping[str, Sequence[Prediction]], prices: Prices,
    before: torch.Tensor, found: Solved, room: Mapping[str, int],
) -> Solved:  # fmt: skip
    """The plan with one setting for all blocks where it is statistically as good as ``found``; else ``found``.

    It is tried only where the prediction puts it within reach: a tie is claimed when both one-sided tests put the two
    within a percent of each other on the check windows.
    """
    assert found.predicted is not None
    blocks = [slot.name for slot in slots if slot.group == "blocks"]
    common = [o.lever for o in offers[blocks[0]]] if blocks else []
    common = [lever for lever in common if all(any(o.lever == lever for o in offers[name]) for name in blocks)]
    plans = []
    for lever in common:
        some = {**offers, **{name: [o for o in offers[name] if o.lever == lever] for name in blocks}}
        with suppress(BudgetError):
            plans.append(prices.plan(slots, some, room))
    best = min(plans, key=lambda plan: plan.choice.damage, default=None)
    if best is None or best.choice.damage > found.predicted + _REACH or len(found.recipe.steps) <= 2:
        return found
    now, _, _ = _attempt(job, slots, offers, best, prices, before, found.allowed, 0)
    if not _within(now, room):
        return found
    first, second = (_check_harm(job, before, each) for each in (found, now))
    tie = tied(first, second, _TIE)
    if tie.outcome not in ("tied", "second"):
        return found
    note = (
        f"a plan with one setting for all blocks is statistically as good (ratio {tie.ratio.value:.4f}, "
        f"p {tie.p_equal:.2g} of differing by {100 * (_TIE - 1):.0f} % or more), and was taken for being simpler"
    )
    return replace(now, certificate=found.certificate, notes=(*found.notes, note))


def _check_harm(job: Job, before: torch.Tensor, solved: Solved) -> torch.Tensor:
    """(windows,) harm of ``solved`` on the check windows; measured before, so out of the journal."""
    with standing_in(job.model.module, solved.slots, solved.weights, dtype=torch.bfloat16):
        after = job.scores("comparing plans", solved.digest, job.model.module, job.check, exact=False)
    return job.task.harm(before, after)


def _caution(job: Job, spread: float) -> float:
    """How far below a floor a plan aims, as a factor on its harm: the held-out test looks at an upper limit, and the
    check that steers the plan has an error of its own; both grow with the harm."""
    cautious: float = 1 + spread * (1.7 / len(job.heldout) ** 0.5 + 1 / len(job.check) ** 0.5)
    return cautious


def _better(one: Solved, other: Solved, ceiling: float | None) -> bool:
    assert one.measured is not None
    assert other.measured is not None
    return one.measured < other.measured if ceiling is None else one.spent["bytes"] < other.spent["bytes"]


def measure(
    job: Job, slots: Sequence[Slot], weights: Mapping[str, Weight], plan: Plan, prices: Prices, before: torch.Tensor
) -> tuple[float, Prices, float]:
    """Mean harm of the plan on the check windows, prices rescaled group by group, the harm's deviation over windows."""
    groups = sorted({slot.group for slot in slots}, reverse=True)  # "embedding" first: it alone, then all
    harm, deviation, so_far = 0.0, 0.0, 0.0
    for index in range(len(groups)):
        part = [slot for slot in slots if slot.group in groups[: index + 1]]
        name = digest(weights, part)
        with standing_in(job.model.module, part, weights, dtype=torch.bfloat16):
            after = job.scores("checking the plan", name, job.model.module, job.check, exact=False)
        each = job.task.harm(before, after).double()
        harm, deviation = float(each.mean()), float(each.std())
        prices = prices.learn(groups[index], harm - so_far, plan.damage[groups[index]])
        so_far = harm
    return harm, prices, deviation


def _certificate(plan: Plan, choices: int, rounds: int) -> Certificate:
    proof = plan.choice.certificate
    return Certificate(
        solver="HiGHS", status=proof.status, objective=plan.choice.damage, bound=proof.bound, gap=proof.gap,
        binds=proof.binding, choices=choices, rounds=rounds,
    )  # fmt: skip


def _fixed(job: Job, slots: Sequence[Slot], offers: Mapping[str, Sequence[Prediction]]) -> dict[str, int]:
    """What every plan takes beside its slots, guessed; the first round replaces guesses by what was seen."""
    inside = sum(slot.map.shape[0] * slot.map.shape[1] for slot in slots)
    count = parameters(job.model.module) - inside
    # two bytes a number, and what headers and structure say of each tensor
    found = {"bytes": 2 * count + 4096 + 1200 * len(slots), "params": count, "flops": 0}
    whole_model = job.observed("original", job.model.module)
    for resource, value in whole_model.items():
        untouched = [offers[slot.name][-1].extra.get(resource, 0) for slot in slots]
        found[resource] = value - sum(untouched) if resource != "energy" else 0
    return found


def first_plan(
    job: Job, slots: Sequence[Slot], offers: Mapping[str, Sequence[Prediction]], reference: int
) -> tuple[Prices, dict[str, int | float]]:
    """The prices before anything was measured, and every budget in base units."""
    fused = job.target is not None and job.target.fused
    bundles = {slot.name: slot.map.input_group for slot in slots if fused}
    prices = Prices(fixed=_fixed(job, slots, offers), bundles=bundles)
    return prices, _limits(job, prices, slots, reference)


def _limits(job: Job, prices: Prices, slots: Sequence[Slot], reference: int) -> dict[str, int | float]:
    """Every budget in base units."""
    matrices = sum(slot.map.shape[0] * slot.map.shape[1] for slot in slots)
    originals: dict[str, float] = {
        "bytes": reference,
        "params": matrices + prices.fixed["params"],
        "flops": 2 * matrices,
    }
    originals |= {name: base(name, value) for name, value in job.observed("original", job.model.module).items()}
    return {b.resource: b.limit_for(originals[b.resource]) for b in job.budgets if b.resource != "kv"}


def solved_cost(
    job: Job, prices: Prices, plan: Plan, weights: Mapping[str, Weight], slots: Sequence[Slot]
) -> tuple[Prices, dict[str, int]]:
    """What the solved model costs, bytes exactly as its files will be, and what is measured as measured; and prices
    that know what is beside the slots."""
    inside: dict[str, int] = {}
    for slot in slots:
        picked = plan.picked[slot.name]
        for name, value in picked.costs.items():
            exact = getattr(weights[slot.name].cost(), name, value) if slot.name in weights else value
            inside[name] = inside.get(name, 0) + exact
    with installed(job.model.module, slots, weights):
        seen = {"bytes": job.written(), **job.observed(digest(weights, slots), job.model.module)}
    fixed = {**prices.fixed, **{name: value - inside[name] for name, value in seen.items()}}
    return replace(prices, fixed=fixed), {name: inside[name] + fixed[name] for name in inside}
