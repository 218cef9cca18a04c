"""Tiny runs made on the spot, for laws to be fitted to: byte-level GPTs of 1,000 to 1,000,000 parameters.

A sweep is a grid of settings; each run's loss curve is kept as JSON under a name that is a hash of all it depends on,
so that a sweep asked for twice costs nothing, and one that was stopped goes on where it was. Runs share nothing and go
side by side on one thread each: through Ray where it is installed (the extra ``ray``), on the machines of a cluster
that one has joined or on this one alone, else in a pool of processes.

    rows = bench.sweep(bench.grid(width=(16, 32, 64), steps=(200, 800), seed=(0,)))
    law = laws.fit(bench.points(rows), "chinchilla")

Imports torch only inside a run. Losses are nats a byte on held-out text; N counts parameters outside the embedding,
D = steps * batch * bytes a window.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pennyweight.errors import DataError, MissingExtraError, OptionError
from pennyweight.safe_write import write_text

#: Changes whenever a run of the same settings would give other numbers.
VERSION = 1
ScheduleName = Literal["cosine", "constant", "wsd", "power"]
Way = Literal["ray", "processes"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of one tiny run.

    Attributes:
        text: a short name of `pennyweight.data` ("stdlib-code", "wiki").
        width: of the GPT.
        depth: blocks.
        steps: of the optimizer.
        batch: windows a step.
        length: bytes predicted a window.
        lr: peak learning rate.
        warmup: steps.
        schedule: "cosine" to a tenth, "constant", "wsd" (10 % of decay) or "power".
        weight_decay: decoupled.
        seed: of weights and order.
        windows: to train on, the first of the text; None for all. Fewer than steps * batch are seen again.
        evaluations: held-out losses along the run, evenly spaced, the last at the end.
        held_out: windows to judge by.
    """

    text: str = "stdlib-code"
    width: int = 32
    depth: int = 2
    steps: int = 400
    batch: int = 16
    length: int = 32
    lr: float = 3e-3
    warmup: int = 20
    schedule: ScheduleName = "cosine"
    weight_decay: float = 0.0
    seed: int = 0
    windows: int | None = None
    evaluations: int = 1
    held_out: int = 256

    def __post_init__(self) -> None:
        numbers = (self.width, self.depth, self.steps, self.batch, self.evaluations, self.held_out)
        if min(numbers) < 1 or self.length < 2 or not self.lr > 0 or self.warmup < 0 or self.weight_decay < 0:
            raise OptionError(f"{self}: give sizes of at least 1, a positive rate, and no warm-up or decay below 0")
        if self.schedule not in ("cosine", "constant", "wsd", "power"):
            raise OptionError(f"bench: schedule = {self.schedule!r}; give cosine, constant, wsd or power")
        if self.width % 4 or self.evaluations > self.steps:
            raise OptionError(
                f"bench: width {self.width}, {self.evaluations} evaluations; give a multiple of 4, and steps"
            )

    @property
    def key(self) -> str:
        """The name of its record: a hash of all it depends on."""
        said = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return f"run-{hashlib.sha256(said.encode()).hexdigest()[:32]}"

    @property
    def params(self) -> int:
        """N: parameters outside the embedding (the head is tied to it)."""
        return 12 * self.depth * self.width**2 + 2 * self.depth * self.width + self.width

    @property
    def tokens(self) -> int:
        """D."""
        return self.steps * self.batch * self.length


@dataclass(frozen=True)
class Record:
    """A finished run: its settings, and (steps, held-out loss) along it."""

    run: Run
    curve: tuple[tuple[int, float], ...]
    train: tuple[float, ...] = field(default=(), repr=False)

    @property
    def loss(self) -> float:
        """Held-out loss at the end."""
        return self.curve[-1][1]


def grid(base: Run | None = None, /, **axes: Iterable[Any]) -> list[Run]:
    """Every combination of the axes: ``grid(width=(16, 32), steps=(100, 400))``.

    Raises:
        OptionError: an axis that is no setting of a run.
    """
    start = base or Run()
    if unknown := [name for name in axes if name not in asdict(start)]:
        raise OptionError(f"bench: no setting is called {unknown[0]!r}; there are {', '.join(asdict(start))}")
    return [replace(start, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def train(run: Run) -> Record:
    """Train one GPT, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(run)
    finally:
        torch.set_num_threads(before)


def _train(run: Run) -> Record:
    import torch

    from pennyweight.evaluate.perplexity import token_losses
    from pennyweight.train import Samples, Trainer, schedules
    from pennyweight.zoo.gpt import GPT, GPTConfig

    windows, held = _text(run)
    config = GPTConfig(width=run.width, depth=run.depth, num_heads=2, vocabulary=256, context=run.length + 1)
    module = GPT(config, generator=torch.Generator().manual_seed(run.seed))
    made = sum(p.numel() for n, p in module.named_parameters() if not n.startswith(("embedding", "lm_head")))
    assert made == run.params, (made, run.params)
    rate: Callable[[], Any] = {
        "cosine": lambda: schedules.cosine(run.steps, run.warmup, peak=run.lr),
        "constant": lambda: schedules.constant(run.warmup, peak=run.lr),
        "wsd": lambda: schedules.wsd(run.steps, run.warmup, 0.1, "linear", peak=run.lr),
        # `lr` is the amplitude, in windows as sequences and bytes as tokens
        "power": lambda: schedules.power(
            run.batch, run.lr, -0.51, 0.02, run.warmup * run.batch * run.length, 0.1, total_tokens=run.tokens
        ),
    }[run.schedule]
    trainer = Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=run.weight_decay),
        Samples(windows, seed=run.seed),
        batch=run.batch,
        schedule=_counted(rate(), run),
        clip=1.0,
    )
    curve, losses = [], []
    for at in range(1, run.evaluations + 1):
        losses += trainer.run(round(at * run.steps / run.evaluations))
        curve.append((trainer.steps, float(token_losses(module, held, batch=128).mean())))
    return Record(run, tuple(curve), tuple(losses))


def _counted(schedule: Any, run: Run) -> Any:
    """A schedule in bytes predicted, asked with steps: the trainer counts the byte before each window too."""
    from pennyweight.train.schedules import Schedule

    if schedule.unit == "steps":
        return schedule
    each = run.batch * run.length
    return Schedule(schedule.name, "steps", run.steps, lambda steps: schedule(steps * each))


def _text(run: Run) -> tuple[Any, Any]:
    from pennyweight.train import byte_windows

    key = (run.text, run.length)
    if key not in _TEXTS:
        if len(_TEXTS) > 3:
            _TEXTS.clear()
        _TEXTS[key] = (
            byte_windows(run.text, part="calibration", length=run.length + 1),
            byte_windows(run.text, part="heldout", length=run.length + 1),
        )
    windows, held = _TEXTS[key]
    if len(held) < run.held_out:
        raise DataError(f"bench: {run.text} has {len(held)} held-out windows; held_out = {run.held_out} were asked for")
    stride = len(held) // run.held_out
    part = windows if run.windows is None else windows[: run.windows]
    return part, held[: stride * run.held_out : stride]


_TEXTS: dict[tuple[str, int], tuple[Any, Any]] = {}


def sweep(
    runs: Sequence[Run],
    *,
    cache: str | Path | None = None,
    workers: int | None = None,
    through: Way | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Records of all runs, in order; those in ``cache`` are read, the rest are made.

    Args:
        runs: settings.
        cache: a directory of JSON files; None keeps nothing.
        workers: runs at once; 1 stays in this process, None takes half of the processors (of a Ray cluster: all).
        through: "ray" or "processes"; None for Ray where it is installed, else processes. A Ray that nobody started is
            started here, without a dashboard and without telling anybody, and stopped again.
        report: called with the runs done and all of them.

    Raises:
        DataError: a damaged record.
        MissingExtraError: Ray was asked for and is not installed.
    """
    place = None if cache is None else Path(cache)
    found: dict[Run, Record] = {}
    for run in runs:
        if place is not None and run not in found and (path := place / f"{run.key}.json").is_file():
            found[run] = read(path)
    left = list(dict.fromkeys(run for run in runs if run not in found))
    done = len(found)
    for record in _side_by_side(left, workers, through):
        found[record.run] = record
        done += 1
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
            write_text(place / f"{record.run.key}.json", json.dumps(plain(record)) + "\n")
        if report is not None:
            report(done, len(set(runs)))
    return [found[run] for run in runs]


def _side_by_side(runs: Sequence[Run], workers: int | None, through: Way | None) -> Iterable[Record]:
    if through not in (None, "ray", "processes"):
        raise OptionError(f"bench: through = {through!r}; give ray, processes or None")
    if workers is not None and workers < 1:
        raise OptionError(f"bench: workers = {workers}; give 1 or more")
    ray = None if through == "processes" else _ray(needed=through == "ray")
    count = min(len(runs), max(1, (os.cpu_count() or 2) // 2) if workers is None else workers)
    if through is None and count <= 1 and not (ray is not None and workers is None and ray.is_initialized()):
        yield from map(train, runs)
    elif ray is not None:
        yield from _by_ray(ray, runs, count, workers)
    else:
        # spawned: a fork of a process that has run torch may hang
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(train, runs)


def _by_ray(ray: Any, runs: Sequence[Run], count: int, workers: int | None) -> Iterable[Record]:
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        remote = ray.remote(num_cpus=1)(train)
        left = list(reversed(runs))
        waiting: list[Any] = []
        most = len(runs) if workers is None else workers
        while left or waiting:
            while left and len(waiting) < most:
                waiting.append(remote.remote(left.pop()))
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)
    finally:
        if ours:
            ray.shutdown()


def _ray(*, needed: bool) -> Any:
    """Ray, where it is installed."""
    try:
        import ray  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        if needed:
            raise MissingExtraError("bench: Ray is not installed; pip install 'pennyweight[ray]'") from error
        return None
    return ray


def plain(record: Record) -> dict[str, Any]:
    """A record as JSON has it."""
    return {"version": VERSION, "run": asdict(record.run), "curve": record.curve, "train": record.train}


def read(path: str | Path) -> Record:
    """The record in a file.

    Raises:
        DataError: it is damaged, or of another version.
    """
    try:
        held = json.loads(Path(path).read_text("utf-8"))
        if held["version"] != VERSION:
            raise ValueError(f"version {held['version']}, this is {VERSION}")
        curve = tuple((int(step), float(loss)) for step, loss in held["curve"])
        return Record(Run(**held["run"]), curve, tuple(map(float, held["train"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a record of a tiny run ({error}); delete it, and it is made again") from error


def points(records: Iterable[Record], *, curve: bool = False, warmup: int = 0) -> dict[str, list[float]]:
    """Columns that `pennyweight.laws.fit` and `trajectory.fit` read.

    Args:
        records: of a sweep.
        curve: every evaluation of a run is a point, and not only its end.
        warmup: with ``curve``, steps to leave out.

    Returns:
        N, D, C (6 N D), steps, B (bytes a step), lr and loss.
    """
    columns: dict[str, list[float]] = {name: [] for name in ("N", "D", "C", "steps", "B", "lr", "loss")}
    for record in records:
        run = record.run
        each = run.batch * run.length
        for step, loss in record.curve if curve else record.curve[-1:]:
            if step < warmup:
                continue
            row = (run.params, step * each, 6.0 * run.params * step * each, step, each, run.lr, loss)
            for name, value in zip(columns, row, strict=True):
                columns[name].append(float(value))
    return columns


def write_csv(records: Iterable[Record], path: str | Path, *, curve: bool = False) -> None:
    """The points as a CSV file, for ``pennyweight laws fit``."""
    columns: Mapping[str, list[float]] = points(records, curve=curve)
    lines = [
        ",".join(columns),
        *(",".join(f"{value:.10g}" for value in row) for row in zip(*columns.values(), strict=True)),
    ]
    write_text(Path(path), "\n".join(lines) + "\n")


def held_out_error(
    records: Sequence[Record], form: str, *, largest: int = 1, axis: str | None = None, **options: Any
) -> float:
    """Mean relative error on the runs of the ``largest`` sizes, of a law fitted to all others."""
    import numpy as np

    from pennyweight.laws.fitter import fit

    sizes = sorted({record.run.params for record in records})
    if len(sizes) <= largest:
        raise DataError(f"held_out_error: {len(sizes)} sizes; leave at least one to fit")
    small = points([r for r in records if r.run.params < sizes[-largest]])
    large = points([r for r in records if r.run.params >= sizes[-largest]])
    law = fit(small, form, axis=axis, holdout=False, **options)
    at = {name: np.array(large[name]) for name in law.variables}
    truth = np.array(large["loss"])
    return float(np.abs(np.asarray(law(**at)) / truth - 1).mean())
