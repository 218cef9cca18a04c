"""The page itself: sections of HTML put together from a `ReportData`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pennyweight.report.bits import bits_per_weight, bits_section
from pennyweight.report.data import Figure, Measure, Point, ReportData, Sample, Step
from pennyweight.report.picture import drawn, pareto
from pennyweight.report.text import (
    THIN,
    TIMES,
    alike,
    bounds,
    escape,
    number,
    percent,
    quantity,
    section,
    small,
    spread,
    table,
    times,
)
from pennyweight.safe_write import write_text


def write(path: str | Path, fitted_report: ReportData | Mapping[str, Any]) -> None:
    """Write the report to ``path``: one HTML file that needs nothing else.

    Args:
        path: where; a file that stands there is replaced in one step.
        fitted_report: what to say; a mapping has the names of `ReportData`.

    Raises:
        DataError: an unknown or missing entry, or a value of the wrong type.
        OutputError: a place that cannot be written.
    """
    write_text(path, page(ReportData.of(fitted_report)))


def page(data: ReportData) -> str:
    """The report as a string of HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # nothing may be loaded, whatever a model's name or a sample contains
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(data.model)}: fit report</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n"
        f"{_top(data)}\n<main>\n{''.join(_sections(data))}</main>\n"
        f"<footer>Sizes are of the files as written, in decimal units: 1{THIN}MB is 10<sup>6</sup> bytes.</footer>\n"
        "</body>\n</html>\n"
    )


@cache
def _style() -> str:
    return (files("pennyweight.report") / "style.css").read_text(encoding="utf-8")


def _top(data: ReportData) -> str:
    said = " · ".join(filter(None, (data.created, data.version and f"version {data.version}")))
    cost = f", at {times(data.quality.value)} its {escape(data.quality_name)}" if data.quality else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.notes)
    return (
        '<header class="top">\n'
        f'<p class="brand"><span><b>Pennyweight</b> fit report</span><span>{escape(said)}</span></p>\n'
        f'<h1>{escape(data.model)} in <em class="nowrap">{quantity(data.fitted_bytes, "bytes")}</em>: '
        f"{percent(data.fitted_bytes / data.original_bytes)} of its size{cost}.</h1>\n"
        f"{_verdict(data)}\n"
        + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
        + f'<dl class="figures">{"".join(_figures(data))}</dl>\n</header>'
    )


def _verdict(data: ReportData) -> str:
    words, path = {
        True: ("The floor holds.", "M2 8.5l4 4L14 3.5"),
        False: ("The floor does not hold.", "M3 3l10 10M13 3L3 13"),
        None: ("No floor was set." if data.floor is None else "The floor was not tested.", "M2 8h12"),
    }[data.floor_holds]
    mark = f'<svg viewBox="0 0 16 16" aria-hidden="true"><path d="{path}"/></svg>'
    return f'<p class="verdict">{mark}<b>{words}</b> {escape(data.verdict)}</p>'


def _figures(data: ReportData) -> Iterator[str]:
    """The four numbers one would quote."""

    def figure(name: str, value: str, aside: str) -> str:
        return f'<div><dt>{escape(name)}</dt><dd class="value">{value}</dd><dd class="aside">{aside}</dd></div>'

    original = quantity(data.original_bytes, "bytes")
    yield figure("files", quantity(data.fitted_bytes, "bytes"), f"of {original} in bf16")
    if data.quality:
        known = bounds(data.quality)
        aside = f"95{THIN}% interval {known}" if known else "no interval"
        yield figure(f"{data.quality_name} ratio", times(data.quality.value), aside)
    if data.cells:
        params = quantity(sum(cell.params for cell in data.cells), "params")
        yield figure("bits a weight", f"{bits_per_weight(data.cells):.2f}", f"{params}, scales included")
    if data.budget_bytes:
        left = data.budget_bytes - data.fitted_bytes
        spare = f"{number(abs(left))} byte{'s' * (abs(left) != 1)} {'to spare' if left >= 0 else 'over it'}"
        yield figure(f"of the budget, {data.budget}", _used(data.fitted_bytes / data.budget_bytes), spare)


def _used(share: float) -> str:
    # never "100.0 %" for a share that is not 1: one byte over the budget is over
    decimals = next((d for d in range(1, 12) if share == 1 or round(100 * share, d) != 100), 12)
    return f"{number(100 * share, decimals=decimals)}{THIN}%"


def _sections(data: ReportData) -> Iterator[str]:
    if data.measures:
        about = "Small figures are 95 % intervals; those of the last column come from paired comparisons."
        yield section("Before and after", about, _measures(data))
    if drawn(data):
        limits = {
            (True, True): " In the tinted corner both budget and floor hold.",
            (True, False): " In the tinted part the budget holds.",
            (False, True): " In the tinted part the floor holds.",
        }.get((bool(data.budget_bytes), bool(data.floor)), "")
        yield section("Size against quality", f"Down and to the left is better.{limits}", _pictures(data))
    if data.cells:
        about = (
            "Bits a weight count scales, zeros and indices. Rest the pointer on a field, or open the list, "
            "to see what made it."
        )
        yield section("Where the bits are", about, bits_section(data.cells))
    if data.predictions:
        about = "What the plan promised before any weight was touched, and what came out."
        yield section("Predicted and measured", about, _predictions(data))
    if data.steps:
        yield section("Time and memory", "What each step of the fit took.", _steps(data.steps))
    if data.samples:
        about = "The same prompts, continued greedily. Grey is word for word the same."
        yield section("What it writes", about, "".join(map(_sample, data.samples)))
    if data.recipe:
        about = "Run it again with <code>pennyweight apply</code>."
        yield section("Recipe", about, f'<pre tabindex="0"><code>{escape(data.recipe.rstrip())}</code></pre>')
    if data.receipt:
        entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in data.receipt)
        about = "Check it again with <code>pennyweight verify</code>."
        yield section("Receipt", about, f'<dl class="receipt">{entries}</dl>')


def _measures(data: ReportData) -> str:
    def cell(figure: Figure | None, unit: str, decimals: int | None) -> str:
        if figure is None:
            return '<span class="soft">not measured</span>'
        return escape(quantity(figure.value, unit, decimals)) + small(escape(bounds(figure, unit, decimals)))

    def row(m: Measure) -> tuple[str, ...]:
        decimals = spread(m.before, m.after)
        ratio = "" if m.ratio is None else times(m.ratio.value, spread(m.ratio)) + small(bounds(m.ratio))
        name = escape(m.name) + small(escape(m.note))
        return name, cell(m.before, m.unit, decimals), cell(m.after, m.unit, decimals), ratio

    rows = map(row, data.measures)
    heads = ('<span class="hidden">measure</span>', "before", "after", "after ÷ before")
    return table("Before and after the fit", heads, rows, css="measures")


_KEY = {
    "chosen": ('<circle class="chosen" cx="7" cy="7" r="6"/>', "this fit, with its interval"),
    "frontier": ('<circle class="frontier" cx="7" cy="7" r="3.5"/>', "best plan at its size"),
    "candidate": ('<circle class="candidate" cx="7" cy="7" r="2.5"/>', "other plans"),
    "reference": ('<path class="reference" d="M7 2l5 5l-5 5l-5 -5z"/>', "references"),
}


def _pictures(data: ReportData) -> str:
    kinds = {point.kind for point in data.points}
    key = [
        f'<li><svg class="picture" viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>{words}</li>'
        for kind, (mark, words) in _KEY.items()
        if kind in kinds
    ]
    if left_out := len(data.points) - len(drawn(data)):
        key.append(f"<li>{left_out} far worse, in the table only</li>")
    wide = pareto(data, width=784, height=430, name="wide")
    narrow = pareto(data, width=372, height=400, name="narrow")
    rows = map(_point, sorted(data.points, key=lambda point: (point.bytes, point.ratio)))
    listed = table("The points of the picture", ("model", "size", f"{escape(data.quality_name)} ratio"), rows)
    return (
        f'<figure>{wide}{narrow}<figcaption><ul class="key">{"".join(key)}</ul></figcaption></figure>'
        f"<details><summary>The same as a table</summary>{listed}</details>"
    )


def _point(point: Point) -> tuple[str, str, str]:
    name = point.label or _KEY[point.kind][1].split(",")[0]
    predicted = small("predicted") if point.predicted else ""
    return escape(name), quantity(point.bytes, "bytes"), times(point.ratio) + predicted


def _predictions(data: ReportData) -> str:
    rows = (
        (
            escape(p.name),
            escape(quantity(p.predicted, p.unit, alike(p.predicted, p.measured))),
            escape(quantity(p.measured, p.unit, alike(p.predicted, p.measured))),
            _dot(p.measured / p.predicted if p.predicted else math.nan),
        )
        for p in data.predictions
    )
    scale = (
        '<svg class="dot" viewBox="0 0 168 20" role="img" aria-label="measured over predicted">'
        f'<text x="8" y="14" text-anchor="middle">\u00bd</text><text x="84" y="14" text-anchor="middle">as predicted'
        f'</text><text x="160" y="14" text-anchor="middle">2{TIMES}</text></svg>'
    )
    heads = ('<span class="hidden">quantity</span>', "predicted", "measured", scale)
    return table("Predicted against measured", heads, rows, css="predictions")


def _dot(ratio: float) -> str:
    """Measured over predicted on a scale from half to twice; an arrow head at the edge lies beyond it."""
    if not (math.isfinite(ratio) and ratio > 0):
        return '<span class="soft">no ratio</span>'
    where = math.log2(ratio)
    x = round(84 + 76 * max(-1.0, min(1.0, where)), 1)
    side = 6 if where > 0 else -6
    mark = f'<circle cx="{x}" cy="10" r="4.5"/>' if abs(where) <= 1 else f'<path d="M{x} 5l{side} 5l{-side} 5z"/>'
    return (
        f'<svg class="dot" viewBox="0 0 168 20" role="img" aria-label="{times(ratio)} of what was predicted">'
        '<line x1="8" x2="160" y1="10" y2="10"/><line x1="8" x2="8" y1="6" y2="14"/>'
        f'<line x1="160" x2="160" y1="6" y2="14"/><line class="as" x1="84" x2="84" y1="3" y2="17"/>{mark}</svg>'
    )


def _steps(steps: Sequence[Step]) -> str:
    rows = (
        (
            escape(step.name),
            _duration(step.seconds),
            "" if step.peak_bytes is None else quantity(step.peak_bytes, "bytes"),
        )
        for step in steps
    )
    heads = ('<span class="hidden">step</span>', "time", "peak memory")
    return table("Time and memory of each step", heads, rows, css="steps")


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 90:
        return f"{number(seconds)}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 90:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    return f"{minutes // 60}{THIN}h {minutes % 60:02d}{THIN}min"


def _sample(sample: Sample) -> str:
    before, after = sample.before.lstrip(" "), sample.after.lstrip(" ")
    same = _shared(before, after)

    def text(whole: str) -> str:
        return f'<p dir="auto"><span class="same">{escape(whole[:same])}</span>{escape(whole[same:])}</p>'

    return (
        f'<div class="sample"><p class="prompt" dir="auto">{escape(sample.prompt.rstrip())}</p><div class="pair">'
        f"<div><h3>original</h3>{text(before)}</div><div><h3>fitted</h3>{text(after)}</div></div></div>"
    )


def _shared(one: str, two: str) -> int:
    """Length of the longest common start that ends between words."""
    if one == two:
        return len(one)
    ends = [0, *(match.end() for match in re.finditer(r"\s+", one))]
    return max(end for end in ends if one[:end] == two[:end])
