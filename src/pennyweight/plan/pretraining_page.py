"""A training plan as one self-contained page, in the style of the report of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from pennyweight.plan.pretraining_text import HEADS, costs, interval, scaled
from pennyweight.report.text import escape, table

if TYPE_CHECKING:
    from pennyweight.plan.pretraining import TrainingPlan

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _FLOOR = 640, 320, 56, 20, 16, 280


def page(plan: TrainingPlan) -> str:
    """The plan as a string of HTML: no network, no script."""
    one = plan.chosen
    style = (files("pennyweight.report") / "style.css").read_text(encoding="utf-8")
    notes = "".join(f"<li>{escape(note)}</li>" for note in plan.warnings)
    figures = [
        ("parameters", scaled(one.params), f"{one.bits:g} bits stored"),
        ("tokens", scaled(one.tokens), f"{one.tokens / one.params:.3g} a parameter"),
        ("expected loss", f"{one.loss:.3f}", f"nats a token{interval(one.loss_interval)}"),
        ("training", f"{one.train_flops:.3g}", "FLOPs"),
    ]
    cells = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="aside">{escape(aside)}</dd></div>'
        for name, value, aside in figures
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Training plan</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        '<header class="top">\n<p class="brand"><span><b>Pennyweight</b> training plan</span></p>\n'
        f"<h1>{escape(scaled(one.params))} parameters on {escape(scaled(one.tokens))} tokens.</h1>\n"
        f'<p class="verdict"><b>{escape(one.name)}:</b> {escape(plan.reason)}. Budget: '
        f"{escape(str(plan.budget['compute']))}.</p>\n"
        + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
        + f'<dl class="figures">{cells}</dl>\n</header>\n<main>\n{"".join(_sections(plan))}</main>\n</body>\n</html>\n'
    )


def _sections(plan: TrainingPlan) -> Iterator[str]:
    rows = [
        (
            escape(answer.law), escape(scaled(answer.N)), escape(scaled(answer.D)), f"{answer.ratio:.3g}",
            "" if answer.loss is None else escape(f"{answer.loss:.4f}{interval(answer.intervals.get('loss'))}"),
        )
        for answer in plan.answers
    ]  # fmt: skip
    low, high = plan.spread["N"]
    yield (
        "<section><h2>What each law says</h2>"
        f"<p>Sizes spread over a factor of {high / low:.2f}; the plan follows {escape(plan.law)}.</p>"
        + table("Answers of the laws", ("law", "parameters", "tokens", "tokens a parameter", "its own loss"), rows)
        + "</section>\n"
    )
    yield (
        "<section><h2>Size at equal compute</h2><p>Predicted loss against parameters; the mark is the best size of "
        f"each budget.</p>{curves(plan)}</section>\n"
    )
    cells = [[escape(cell) for cell in costs(one)] for one in plan.alternatives]
    used = [at for at in range(len(HEADS)) if any(row[at] for row in cells)]
    yield (
        "<section><h2>Alternatives</h2>"
        + table("Alternatives", [HEADS[at] for at in used], [[row[at] for at in used] for row in cells])
        + "</section>\n"
    )
    shape = plan.shape
    settings = [
        ("width, layers, heads", f"{shape.d_model}, {shape.layers}, {shape.heads}"),
        ("feed-forward", f"{shape.d_ff}"),
        *((f"vocabulary, {method}", f"{size:,}") for method, size in plan.vocabulary.items()),
        *((f"batch, {law}", f"{scaled(size)} tokens") for law, size in plan.batches.items()),
        *((f"peak rate, {law}", f"{rate:.3g}") for law, rate in plan.rates.items()),
        ("steps", f"{plan.steps:,}"),
        ("schedule", plan.schedule),
    ]
    rows_ = [(escape(name), escape(value)) for name, value in settings]
    yield "<section><h2>Settings</h2>" + table("Settings", ("setting", "value"), rows_) + "</section>\n"


def curves(plan: TrainingPlan) -> str:
    """IsoFLOP curves as SVG."""
    points = [point for line in plan.contours.values() for point in line]
    least = min(loss for _, loss in points)
    kept = {name: [p for p in line if p[1] <= 1.35 * least] for name, line in plan.contours.items()}
    kept = {name: line for name, line in kept.items() if line}
    points = [point for line in kept.values() for point in line]
    xs, ys = [math.log10(n) for n, _ in points], [loss for _, loss in points]

    def x(n: float) -> float:
        return round(_LEFT + (math.log10(n) - min(xs)) / (max(xs) - min(xs)) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(loss: float) -> float:
        return round(_FLOOR - (loss - min(ys)) / (max(ys) - min(ys)) * (_FLOOR - _TOP), 1)

    lines = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" class="picture" '
        'aria-label="Loss against size at equal compute">',
        f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_FLOOR}" y2="{_FLOOR}"/>',
    ]
    for power in range(math.ceil(min(xs)), math.floor(max(xs)) + 1):
        lines.append(
            f'<text class="tick" x="{x(10.0**power)}" y="{_FLOOR + 18}" '
            f'text-anchor="middle">{scaled(10.0**power)}</text>'
        )
    for value in _ticks(min(ys), max(ys)):
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        lines.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{value:.2f}</text>')
    for name, line in kept.items():
        path = " ".join(f"{x(n)},{y(loss)}" for n, loss in line)
        best = min(line, key=lambda point: point[1])
        lines.append(f'<polyline class="frontier" fill="none" points="{path}"><title>{escape(name)}</title></polyline>')
        lines.append(f'<circle class="candidate" cx="{x(best[0])}" cy="{y(best[1])}" r="4"/>')
        lines.append(
            f'<text class="tick" x="{x(best[0])}" y="{y(best[1]) - 8}" text-anchor="middle">{escape(name)}</text>'
        )
    return "\n".join([*lines, "</svg>"])


def _ticks(low: float, high: float) -> Sequence[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step)
    return [at * step for at in range(first, math.floor(high / step) + 1)]
