"""The end of a fit: held-out figures, the floor's verdict, the written directory, its recipe, receipt and report."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight import report
from pennyweight.errors import BudgetError, ModelError
from pennyweight.job import Job, standing_in
from pennyweight.laws.density import worth
from pennyweight.measure.stats import Interval, Verdict
from pennyweight.model import anatomy, compact, load
from pennyweight.model.kv_cache import KVSetting, keep, keeping
from pennyweight.model.model import Model, bf16_bytes, parameters
from pennyweight.model.saving import save, saved_bytes
from pennyweight.plan.slots import Slot, matrix_of
from pennyweight.receipt import (
    BudgetLine,
    Certificate,
    Data,
    Estimate,
    Figure,
    FileLine,
    FloorLine,
    Machine,
    Receipt,
    Request,
    Run,
    Source,
    StageLine,
    versions,
)
from pennyweight.recipe import Recipe
from pennyweight.safe_write import staged, write_text
from pennyweight.weights import Weight

RECIPE, REPORT = "recipe.yaml", "report.html"
_PROMPTS = ("The capital of France is", "Water boils when", "In the early nineteenth century,")
_NEW_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Weights that were solved and are to be written.

    Attributes:
        slots: the places that could change.
        weights: slot name -> compact weight.
        recipe: what made them.
        tensors: other parameters that were changed, by name.
        kv: the setting of the cache that goes with it; None leaves it as it is.
        module: the changed model itself, where more than ``weights`` and ``tensors`` changed; it holds both.
        labels: slot name -> what made its weight, in a few words.
        spent: resource -> what it costs; bytes exactly as the files will be.
        allowed: resource -> budget in base units.
        planned: resource -> what the plan said it would cost.
        predicted: the harm the plan was predicted to do; None where nothing was planned.
        measured: the harm on the check windows.
        curve: the predicted frontier, (bytes, harm) by rising bytes.
        certificate: what the solver proved.
        notes: what a reader must know.
    """

    slots: tuple[Slot, ...]
    weights: Mapping[str, Weight]
    recipe: Recipe
    labels: Mapping[str, str]
    spent: Mapping[str, float]
    allowed: Mapping[str, int | float] = field(default_factory=dict)
    planned: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    kv: KVSetting | None = None
    module: nn.Module | None = None
    predicted: float | None = None
    measured: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of all that changed."""
        others = self.tensors if self.module is None else self.module.state_dict()
        found = digest(self.weights, self.slots, others)
        manner = "" if self.module is None else compact.behavior(self.module)
        return hashlib.sha256(f"{found} {manner}".encode()).hexdigest() if manner else found

    @contextmanager
    def computing(self, module: nn.Module) -> Iterator[nn.Module]:
        """What computes as the changed model: ``module`` with the changes standing in for a while, or the changed one.

        Args:
            module: the original.
        """
        if self.module is not None:
            yield self.module
        else:
            with keeping(module, self.kv), standing_in(module, self.slots, self.weights, self.tensors):
                yield module


def digest(weights: Mapping[str, Weight], slots: Sequence[Slot], others: Mapping[str, Tensor] | None = None) -> str:
    """A hash of these weights in these slots, and of other tensors by name."""
    found = hashlib.sha256()
    for name, tensor in sorted((others or {}).items()):
        found.update(name.encode())
        if tensor.numel():
            found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for slot in slots:
        if slot.name in weights:
            for name, tensor in weights[slot.name].state_dict().items():
                found.update(f"{slot.name}.{name}".encode())
                if tensor.numel():
                    found.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    return found.hexdigest()


@dataclass(frozen=True)
class Fitted:
    """What a fit hands back.

    Attributes:
        model: compact, as read back from ``directory``.
        recipe: what was done, to which map.
        receipt: what was asked, predicted and measured.
        directory: where everything was written.
    """

    model: Model
    recipe: Recipe
    receipt: Receipt
    directory: Path

    @property
    def report(self) -> Path:
        """The page that shows it."""
        return self.directory / REPORT


@dataclass(frozen=True)
class Figures:
    """Held-out scores before and after, and what the floor's test says."""

    before: Tensor
    after: Tensor
    effect: Interval
    verdict: Verdict | None
    samples: tuple[report.Sample, ...]


def finish(job: Job, solved: Solved, out: Path, *, overwrite: bool) -> Fitted:
    """Measure ``solved`` on held-out text, test the floor, and write everything to ``out`` in one step.

    Raises:
        BudgetError: the floor is not shown to hold on held-out text; nothing is written, the journal stays.
    """
    figures = _figures(job, solved)
    if figures.verdict is not None and not figures.verdict.holds:
        raise BudgetError(_floor_missed(job, solved, figures))
    source = Source(
        name=job.model.name, sha256=job.model.fingerprint, kind=job.model.kind,
        params=parameters(job.model.module), bf16_bytes=bf16_bytes(job.model),
    )  # fmt: skip
    cells = _cells(job, solved)
    recipe = solved.recipe
    install(job.model, solved)
    with staged(out, overwrite=overwrite) as aside:
        with job.stage("writing"):
            save(job.model, aside / "model")
            for file in (aside / "model").iterdir():
                shutil.move(file, aside / file.name)
            (aside / "model").rmdir()
            write_text(aside / RECIPE, recipe.text())
            if job.target is not None:
                job.target.export(job.model, aside)
        with job.stage("reading back"):
            again = load(aside, name=job.model.name)
            _same(job.model, again)
        receipt = _receipt(job, solved, figures, source, recipe, aside)
        receipt.write(aside)
        report.write(aside / REPORT, _report(job, solved, figures, receipt, recipe, cells))
    job.journal.clear()
    return Fitted(again, recipe, receipt, out)


def install(model: Model, solved: Solved) -> None:
    """Make the changes the model's for good."""
    if solved.module is not None:
        model.module = solved.module
        vars(model).pop("anatomy", None)  # of the module that was
        return
    weights = {slot.map.path: solved.weights[slot.name] for slot in solved.slots if slot.name in solved.weights}
    anatomy.replace_all(model.module, weights)
    for name, tensor in solved.tensors.items():
        parameter = model.module.get_parameter(name)
        parameter.data = tensor.to(parameter.dtype)
    if solved.kv is not None:
        keep(model, solved.kv)


def _figures(job: Job, solved: Solved) -> Figures:
    module = job.model.module
    before = job.scores("measuring the original", "original", module, job.heldout, exact=True)
    with job.stage("samples"):
        first = continuations(job.model)
    with solved.computing(module) as changed:
        after = job.scores("measuring the fit", solved.digest, changed, job.heldout, exact=True)
        with job.stage("samples"):
            second = continuations(replace(job.model, module=changed))
    verdict = None if job.floor is None else job.task.judge(job.floor, before, after)
    samples = tuple(
        report.Sample(prompt=p, before=a, after=b) for p, a, b in zip(_PROMPTS, first, second, strict=False)
    )
    return Figures(before, after, job.task.effect(before, after), verdict, samples)


def continuations(model: Model, *, count: int = len(_PROMPTS)) -> list[str]:
    """Greedy continuations of the sample prompts; none for models that do not generate."""
    if model.kind != "causal-lm" or not hasattr(model.module, "generate"):
        return []
    tokenizer = model.need_tokenizer()
    found = []
    for prompt in _PROMPTS[:count]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            generate: Any = model.module.generate
            made = generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, do_sample=False,
                pad_token_id=tokenizer.eos_token_id or 0,
            )  # fmt: skip
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def _floor_missed(job: Job, solved: Solved, figures: Figures) -> str:
    assert job.floor is not None
    assert figures.verdict is not None
    harm = float(job.task.harm(figures.before, figures.after).double().mean())
    wanted = job.task.harm_of(job.floor, figures.before)
    scale = harm / solved.predicted if solved.predicted else 1.0
    enough = [size for size, predicted in solved.curve if scale * predicted < 0.9 * wanted]
    nearest = f"; by this measurement about {min(enough):,} bytes would hold it" if enough else ""
    return (
        f"floor {job.floor} is not shown to hold at {solved.spent['bytes']:,} bytes: {job.task.metric} measured "
        f"{figures.verdict.estimate:.4g}, upper 95 % limit {figures.verdict.upper:.4g} against "
        f"{figures.verdict.margin:.4g} on {figures.verdict.n} windows{nearest}; raise the budget or "
        "lower the floor, and resume (the journal is kept)"
    )


def _same(written: Model, read: Model) -> None:
    """What was read back is what was written, bit by bit."""
    first, second = written.module.state_dict(), read.module.state_dict()
    for name, tensor in first.items():
        if name not in second or not torch.equal(tensor.to(second[name].dtype), second[name]):
            raise ModelError(f"{name}: read back otherwise than written; the disk or its driver is at fault")


def _receipt(job: Job, solved: Solved, figures: Figures, source: Source, recipe: Recipe, directory: Path) -> Receipt:
    calibration, heldout = job.calibration, job.heldout
    ids = hashlib.sha256(calibration.numpy().tobytes() + heldout.numpy().tobytes()).hexdigest()
    written = saved_bytes(directory) if job.target is None else job.target.size(directory)
    effect = _estimate(figures.effect)
    before, after = job.task.figure(figures.before), job.task.figure(figures.after)
    predicted = None if solved.predicted is None else job.task.effect_of(solved.predicted)
    if before is not None and after is not None:
        quality = Figure(
            name=job.task.title, unit=job.task.unit, before=Estimate(value=before, n=len(heldout)),
            after=Estimate(value=after, n=len(heldout)), ratio=effect,
            predicted=None if predicted is None else before * predicted,
        )  # fmt: skip
    else:
        quality = Figure(
            name=job.task.title, unit=job.task.unit, before=None, after=effect, predicted=predicted,
            lower_is_better=False,
        )  # fmt: skip
    size = Figure(
        name="model files" if job.target is None else job.target.file, unit="bytes",
        before=Estimate(value=source.bf16_bytes), after=Estimate(value=written),
        ratio=Estimate(value=written / source.bf16_bytes), predicted=solved.planned.get("bytes"),
    )  # fmt: skip
    spent: Mapping[str, float] = {**solved.spent, "bytes": written}
    lines = tuple(
        BudgetLine(
            asked=str(budget), resource=budget.resource, allowed=solved.allowed[budget.resource],
            spent=spent[budget.resource], predicted=solved.planned.get(budget.resource),
        )
        for budget in job.budgets
    )  # fmt: skip
    assert all(line.holds for line in lines), lines
    certificate = solved.certificate
    if certificate is not None and "bytes" in certificate.binds:
        certificate = certificate.model_copy(update={"relaxing": {"bytes": _relaxing(solved, "bytes")}})
    stages = [StageLine(name=s.name, seconds=s.seconds, peak_bytes=s.peak_rss_bytes) for s in job.steps]
    names = {RECIPE, "receipt.json", REPORT}
    return Receipt(
        model=source,
        data=Data(
            name=str(job.data)[:200], sha256=ids, calibration_tokens=calibration.numel(),
            heldout_tokens=heldout.numel(), window=job.settings.length,
        ),
        recipe_sha256=recipe.sha256,
        request=Request(
            budgets=tuple(map(str, job.budgets)), floor=None if job.floor is None else str(job.floor),
            levers=",".join(card.name for card in job.cards), target=None if job.target is None else job.target.name,
        ),
        seeds={"windows": job.settings.seed},
        versions=versions(),
        figures=(quality, size, *_densities(job, figures.effect, source, written)),
        budgets=lines,
        floor=None if figures.verdict is None else _floor_line(job, figures.verdict),
        certificate=certificate,
        files=tuple(
            FileLine.of(path).model_copy(update={"name": path.relative_to(directory).as_posix()})
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name not in names
        ),
        notes=solved.notes,
        run=Run.now(Machine.here(threads=torch.get_num_threads()), stages),
    )  # fmt: skip


def _densities(job: Job, effect: Interval, source: Source, written: int) -> tuple[Figure, ...]:
    """Row 250: what the fit is worth in parameters, over the original's, a parameter left (zeros too) and a byte."""
    if job.task.metric != "perplexity":
        return ()
    # the largest ratio of perplexities is the lower end of the density
    sizes = [float(worth(source.params, math.log(ratio))) for ratio in (effect.high, effect.value, effect.low)]
    kept = {"density": parameters(job.model.module) / source.params, "density a byte": written / source.bf16_bytes}
    found = []
    for name, share in kept.items():
        low, value, high = (size / source.params / share for size in sizes)
        found.append(
            Figure(
                name=name, unit="of the original's, by the law of size", before=Estimate(value=1.0),
                after=Estimate(value=value, low=low, high=high, level=effect.level, n=effect.n), lower_is_better=False,
            )
        )  # fmt: skip
    return tuple(found)


def _floor_line(job: Job, verdict: Verdict) -> FloorLine:
    return FloorLine(
        asked=str(job.floor), holds=verdict.holds, value=verdict.estimate, upper=verdict.upper, limit=verdict.margin,
        p_value=verdict.p_value, n=verdict.n, detectable=verdict.detectable,
    )  # fmt: skip


def _relaxing(solved: Solved, resource: str) -> float:
    """Harm saved by one percent more bytes, read off the predicted frontier."""
    sizes, harms = zip(*solved.curve, strict=True)
    limit = float(solved.allowed[resource])
    now, then = np.interp([limit, 1.01 * limit], sizes, harms)
    return float(now - then)


def _estimate(interval: Interval) -> Estimate:
    return Estimate(value=interval.value, low=interval.low, high=interval.high, level=interval.level, n=interval.n)


def _cells(job: Job, solved: Solved) -> tuple[report.Cell, ...]:
    """One cell a slot of the map of bits, while the original matrices still stand; none for what was taken away."""
    module = job.model.module if solved.module is None else solved.module
    there = {path for path, _ in module.named_modules(remove_duplicate=False)}
    found = []
    for slot in solved.slots:
        if slot.map.path not in there:
            continue
        weight = solved.weights.get(slot.name)
        matrix = matrix_of(module, slot) if weight is None else weight.dense()
        found.append(
            report.Cell(
                block=slot.map.block, role=slot.map.role, params=matrix.numel(),
                bytes=2 * matrix.numel() if weight is None else weight.cost().bytes,
                sparsity=float((matrix == 0).float().mean()),
                lever=solved.labels.get(slot.name, ""),
            )
        )  # fmt: skip
    return tuple(found)


def _report(
    job: Job, solved: Solved, figures: Figures, receipt: Receipt, recipe: Recipe, cells: tuple[report.Cell, ...]
) -> report.ReportData:
    quality, size = receipt.figures[:2]
    effect = report.Figure(value=figures.effect.value, low=figures.effect.low, high=figures.effect.high)
    ratios = job.task.metric == "perplexity"
    measures = [
        report.Measure(
            name=quality.name[0].upper() + quality.name[1:],
            before=None if quality.before is None else report.Figure(value=quality.before.value),
            after=report.Figure(value=quality.after.value, low=quality.after.low, high=quality.after.high),
            ratio=effect if ratios else None,
            note=f"{len(figures.before)} held-out windows of {job.settings.length} tokens, paired",
        ),
        report.Measure(
            name="Size of the files", unit="bytes", before=report.Figure(value=receipt.model.bf16_bytes),
            after=report.Figure(value=size.after.value),
            ratio=report.Figure(value=size.after.value / receipt.model.bf16_bytes), note="against the original in bf16",
        ),
        *(
            report.Measure(
                name=figure.name.capitalize(), before=report.Figure(value=1.0),
                after=report.Figure(value=figure.after.value, low=figure.after.low, high=figure.after.high),
                note="worth in parameters, by the refit Chinchilla law, over those (or bytes) there are",
            )
            for figure in receipt.figures[2:]
        ),
    ]  # fmt: skip
    to_bytes = [
        report.Point(bytes=cost, ratio=job.task.effect_of(harm), kind="frontier", predicted=True)
        for cost, harm in _thinned(solved.curve)
        if job.task.effect_of(harm) < 4
    ]
    chosen = report.Point(bytes=int(size.after.value), ratio=figures.effect.value, kind="chosen", label="this fit")
    verdict = figures.verdict
    budget_bytes = next((int(line.allowed) for line in receipt.budgets if line.resource == "bytes"), None)
    return report.ReportData(
        model=job.model.name,
        original_bytes=receipt.model.bf16_bytes,
        fitted_bytes=int(size.after.value),
        budget=", ".join(map(str, job.budgets)),
        budget_bytes=budget_bytes,
        quality=effect,
        quality_name=job.task.metric,
        floor=None if verdict is None else verdict.margin,
        floor_holds=None if verdict is None else verdict.holds,
        verdict=""
        if verdict is None
        else f"{job.floor}: upper 95 % limit {verdict.upper:.4g}, {verdict.n} windows, p = {verdict.p_value:.2g}; "
        f"{verdict.detectable:.3g} from the floor would be seen with 80 % power",
        measures=measures,
        points=[*to_bytes, chosen],
        cells=cells,
        predictions=_predictions(job, solved, figures, size),
        samples=figures.samples,
        steps=[report.Step(name=s.name, seconds=s.seconds, peak_bytes=s.peak_rss_bytes) for s in job.steps],
        recipe=recipe.text(),
        receipt=[
            ("model", receipt.model.sha256), ("recipe", receipt.recipe_sha256),
            ("data", receipt.data.sha256 if receipt.data else ""), ("evidence", receipt.evidence_sha256),
            *receipt.versions.items(),
        ],
        notes=receipt.notes,
        created=receipt.run.finished,
        version=receipt.versions.get("pennyweight", ""),
    )  # fmt: skip


def _predictions(job: Job, solved: Solved, figures: Figures, size: Figure) -> list[report.Prediction]:
    if solved.predicted is None or solved.measured is None:
        return []
    said = job.task.effect_of(solved.predicted)
    what = f"{job.task.metric} ratio" if job.task.metric == "perplexity" else f"mean {job.task.metric}"
    return [
        report.Prediction(name=f"{what}, held-out text", predicted=said, measured=figures.effect.value),
        report.Prediction(name=f"{what}, check windows", predicted=said, measured=job.task.effect_of(solved.measured)),
        report.Prediction(name="Bytes", predicted=float(size.predicted or 0), measured=size.after.value, unit="bytes"),
    ]


def _thinned(curve: tuple[tuple[int, float], ...]) -> list[tuple[int, float]]:
    """At most sixty points of the frontier, the ends among them."""
    step = max(1, len(curve) // 60)
    if not curve:
        return []
    return [*curve[:-1:step], curve[-1]]
