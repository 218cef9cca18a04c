"""A training plan as one self-contained page, in the style of the report of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from pennyweight.plan.pretraining_text import HEADS, costs, interval, scaled
from pennyweight.report.text import escape, section, small, table

if TYPE_CHECKING:
    from pennyweight.plan.pretraining import Alternative, TrainingPlan

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
    yield section(
        "What each law says",
        f"Sizes spread over a factor of {high / low:.2f}; the plan follows {escape(plan.law)}.",
        table("Answers of the laws", ("law", "parameters", "tokens", "tokens a parameter", "its own loss"), rows),
    )
    yield section(
        "Size at equal compute",
        "Predicted loss against parameters; the marks are the best size of each budget.",
        curves(plan),
    )
    yield section(
        "Loss by size and tokens",
        "Along each curve the predicted loss is the same; the straight line is the budget, the mark the plan.",
        surface(plan),
    )
    cost = "all FLOPs of its life" if plan.budget["inference_tokens"] else "bytes to store"
    yield section(
        "What loss costs",
        f"Predicted loss of the alternatives against {cost}; the line joins those that fit and that no other betters "
        "at less cost.",
        trade_off(plan),
    )
    cells = [[_lines(cell) for cell in costs(one)] for one in plan.alternatives]
    used = [at for at in range(1, len(HEADS) - 1) if any(row[at] for row in cells)]
    shown = [[row[0] + small(row[-1]), *(row[at] for at in used)] for row in cells]  # the remark below the name
    heads = [HEADS[0], *(HEADS[at] for at in used)]
    yield section(
        "Alternatives",
        "Every way to spend the budget that was priced, with what keeps it from fitting.",
        f'<div class="scroll">{table("Alternatives", heads, shown, css="alternatives")}</div>',
        wide=True,
    )
    shape = plan.shape
    settings = [
        ("width, layers, heads", f"{shape.d_model}, {shape.layers}, {shape.heads}"),
        ("feed-forward", f"{shape.d_ff}"),
        *((f"vocabulary, {method}", f"{size:,}") for method, size in plan.vocabulary.items()),
        *((f"batch, {law}", f"{scaled(size)} tokens") for law, size in plan.batches.items()),
        *((f"peak rate, {law}", f"{rate:.3g}") for law, rate in plan.rates.items()),
        ("steps", f"{plan.steps:,}"),
    ]
    rows_ = [(escape(name), escape(value)) for name, value in settings]
    yield section("Settings", f"Schedule: {escape(plan.schedule)}.", table("Settings", ("setting", "value"), rows_))


def _lines(cell: str) -> str:
    """A figure, and its interval below it."""
    figure, bracket, span = cell.partition(" [")
    return escape(figure) + small(escape(f"{bracket}{span}".strip()))


@dataclass(frozen=True)
class _Axes:
    """The scales of a picture: logarithms across, and upward plain numbers or logarithms too."""

    points: Sequence[tuple[float, float]]
    log_up: bool = False

    def _span(self, at: int) -> tuple[float, float]:
        values = [math.log10(p[at]) if at == 0 or self.log_up else p[at] for p in self.points]
        low, high = min(values), max(values)
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    def x(self, value: float) -> float:
        low, high = self._span(0)
        return round(_LEFT + (math.log10(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self._span(1)
        return round(_FLOOR - ((math.log10(value) if self.log_up else value) - low) / (high - low) * (_FLOOR - _TOP), 1)

    def within(self, point: tuple[float, float]) -> bool:
        (left, right), (low, high) = self._span(0), self._span(1)
        up = math.log10(point[1]) if self.log_up else point[1]
        return left <= math.log10(point[0]) <= right and low <= up <= high

    def drawn(self, label: str, marks: Sequence[str]) -> str:
        """The picture, axes first."""
        lines = [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" class="picture" '
            f'aria-label="{escape(label)}">',
            f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_FLOOR}" y2="{_FLOOR}"/>',
        ]
        for value in _powers(*self._span(0)):
            lines.append(
                f'<text class="tick" x="{self.x(value)}" y="{_FLOOR + 18}" text-anchor="middle">{_tick(value)}</text>'
            )
        low, high = self._span(1)
        for value in _powers(low, high) if self.log_up else _ticks(low, high):
            at, said = self.y(value), scaled(value) if self.log_up else f"{value:.2f}"
            lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
            lines.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4}" text-anchor="end">{said}</text>')
        return "\n".join([*lines, *marks, "</svg>"])

    def line(self, points: Sequence[tuple[float, float]], title: str) -> str:
        path = " ".join(f"{self.x(across)},{self.y(up)}" for across, up in points)
        return f'<polyline class="frontier" fill="none" points="{path}"><title>{escape(title)}</title></polyline>'

    def dot(self, point: tuple[float, float], title: str, kind: str = "candidate") -> str:
        x, y = self.x(point[0]), self.y(point[1])
        return f'<circle class="{kind}" cx="{x}" cy="{y}" r="4"><title>{escape(title)}</title></circle>'

    def words(self, point: tuple[float, float], text: str) -> str:
        x, y = self.x(point[0]), self.y(point[1])
        side = "end" if x > 0.8 * _WIDTH else "start" if x < 0.2 * _WIDTH else "middle"
        return f'<text class="tick" x="{x}" y="{y - 8}" text-anchor="{side}">{escape(text)}</text>'


def curves(plan: TrainingPlan) -> str:
    """IsoFLOP curves as SVG."""
    least = min(loss for line in plan.contours.values() for _, loss in line)
    kept = {name: [p for p in line if p[1] <= 1.35 * least] for name, line in plan.contours.items()}
    kept = {name: line for name, line in kept.items() if line}
    axes = _Axes([point for line in kept.values() for point in line])
    marks = []
    for name, line in kept.items():
        best = min(line, key=lambda point: point[1])
        marks += [axes.line(line, name), axes.dot(best, name), axes.words(best, name)]
    return axes.drawn("Loss against size at equal compute", marks)


def surface(plan: TrainingPlan) -> str:
    """Lines of equal loss over size and tokens, and what the budget reaches of them, as SVG."""
    one = plan.chosen
    # the size that was averaged over training; 6 N D of it is what is paid
    size = one.train_flops / (6 * one.tokens)
    budget = float(plan.budget["train_flops"])
    sizes = [n for line in plan.surface.values() for n, _ in line]
    edge = [(n, budget / (6 * n)) for n in (min(sizes), max(sizes))]
    axes = _Axes([*edge, (size, one.tokens)], log_up=True)
    (x1, y1), (x2, y2) = ((axes.x(n), axes.y(d)) for n, d in edge)
    marks = [f'<line class="chosen" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"><title>the budget</title></line>']
    for loss, line in plan.surface.items():
        if inside := [point for point in line if axes.within(point)]:
            marks += [axes.line(inside, f"loss {loss}"), axes.words(inside[len(inside) // 2], loss)]
    marks.append(axes.dot((size, one.tokens), f"the plan: {one.name}", "chosen"))
    return axes.drawn("Lines of equal loss over parameters and tokens", marks)


def trade_off(plan: TrainingPlan) -> str:
    """What each alternative costs over its life (or to store, where nothing is served) against its loss, as SVG."""
    served = bool(plan.budget["inference_tokens"])

    def at(one: Alternative) -> tuple[float, float]:
        return (one.lifetime_flops if served else one.stored_bytes), one.loss

    axes = _Axes([at(one) for one in plan.alternatives])
    fitting = sorted((one for one in plan.alternatives if one.fits), key=at)
    best = [one for i, one in enumerate(fitting) if all(one.loss < other.loss for other in fitting[:i])]
    marks = [axes.line([at(one) for one in best], "none that fits is better and cheaper")] if len(best) > 1 else []
    for one in plan.alternatives:
        if one is not plan.chosen:
            said, kind = (one.name, "candidate") if one.fits else (f"{one.name}: {one.why}", "frontier")
            marks.append(axes.dot(at(one), said, kind))
    marks += [axes.dot(at(plan.chosen), plan.chosen.name, "chosen"), axes.words(at(plan.chosen), plan.chosen.name)]
    return axes.drawn(f"Loss against {'lifetime FLOPs' if served else 'stored bytes'}", marks)


def _tick(value: float) -> str:
    return scaled(value) if value < 1e15 else f"{value:.2g}"


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms; where there is none, the ends."""
    found = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    return found if len(found) > 1 else [10.0**low, *found, 10.0**high]


def _ticks(low: float, high: float) -> Sequence[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step)
    return [at * step for at in range(first, math.floor(high / step) + 1)]
