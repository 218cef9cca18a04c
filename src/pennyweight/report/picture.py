"""The picture of size against quality, as an inline SVG drawn for one width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pennyweight.report.data import Point, ReportData
from pennyweight.report.text import escape, quantity, times

_RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2, 3, 4, 6, 10, 20, 50, 100, 300, 1000)
#: Points this many times worse than the chosen one would press all others flat; they are counted, not drawn.
_TOO_FAR = 4.0
_GLYPH = 6.5  # mean advance of a 12 px letter, a little wide so that labels keep apart
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 30, 46


#: left, top, right, bottom in pixels
Box = tuple[float, float, float, float]


@dataclass
class _Frame:
    """The scales of a picture, and what lies where: labels keep off ``taken``, and off ``minor`` if they can."""

    width: int
    height: int
    sizes: tuple[float, float]
    ratios: tuple[float, float]
    taken: list[Box] = field(default_factory=list)
    minor: list[Box] = field(default_factory=list)

    def x(self, size: float) -> float:
        low, high = self.sizes
        return round(_LEFT + (size - low) / (high - low) * (self.width - _LEFT - _RIGHT), 1)

    def y(self, ratio: float) -> float:  # logarithmic: equal steps are equal losses
        low, high = (math.log(r) for r in self.ratios)
        return round(_TOP + (high - math.log(ratio)) / (high - low) * (self.height - _TOP - _BOTTOM), 1)

    @property
    def floor_y(self) -> int:
        return self.height - _BOTTOM

    def fits(self, x: float, y: float, anchor: str, text: str, taken: Sequence[Box]) -> bool:
        """Whether ``text`` can stand at (x, baseline y); its place is then taken."""
        wide = _GLYPH * len(text)
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        box = (left, y - 11, left + wide, y + 3)
        inside = box[0] >= _LEFT and box[2] <= self.width and box[1] >= 0 and box[3] <= self.floor_y
        if not inside or any(_overlap(box, other) for other in taken):
            return False
        self.taken.append(box)
        return True

    def place(self, x: float, y: float, text: str, gap: float) -> tuple[float, float, str] | None:
        """Where the label of a mark at (x, y) can stand: (x, baseline, anchor), or None where all is taken."""
        spots = [
            *((gap, 4, "start"), (-gap, 4, "end"), (0, -gap, "middle"), (0, gap + 10, "middle")),
            *((gap, -gap, "start"), (gap, gap + 10, "start"), (-gap, -gap, "end"), (-gap, gap + 10, "end")),
            *((0, -gap - 14, "middle"), (0, gap + 24, "middle"), (0, gap + 24, "start"), (0, gap + 24, "end")),
        ]
        for taken in ([*self.taken, *self.minor], self.taken):
            for dx, dy, anchor in spots:
                if self.fits(x + dx, y + dy, anchor, text, taken):
                    return round(x + dx, 1), round(y + dy, 1), anchor
        return None

    def beside(self, spots: Sequence[tuple[float, float, str]], text: str) -> str:
        """The label of a limit at the first of ``spots`` that is free, at the very first where none is."""
        free = (
            spot
            for taken in ([*self.taken, *self.minor], self.taken)
            for spot in spots
            if self.fits(*spot, text, taken)
        )
        x, y, anchor = next(free, spots[0])
        return f'<text class="limit" x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}">{text}</text>'


def _overlap(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def drawn(data: ReportData) -> tuple[Point, ...]:
    """The points that the picture holds: finite ones, and none many times worse than the chosen one."""
    finite = [p for p in data.points if math.isfinite(p.ratio) and p.ratio > 0]
    chosen = [p.ratio for p in finite if p.kind == "chosen"]
    best = chosen[0] if chosen else min((p.ratio for p in finite), default=1.0)
    return tuple(p for p in finite if p.ratio <= _TOO_FAR * best)


def pareto(data: ReportData, *, width: int, height: int, name: str) -> str:
    """An SVG of ``width`` by ``height`` pixels; ``name`` makes its ids unique on the page."""
    points = drawn(data)
    assert points, "the caller shows no picture without points"
    frame = _frame(data, points, width, height)
    described = f"{len(points)} models by the size of their files and their {data.quality_name} ratio to the original. "
    lines = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc" class="picture {name}">',
        f'<title id="{name}-title">Size against {escape(data.quality_name)}</title>',
        f'<desc id="{name}-desc">{escape(described)}The same figures stand in the table below.</desc>',
        *_axes(data, frame),
        *_limits(data, frame),
        *_marks(data, points, frame),
        "</svg>",
    ]
    return "\n".join(lines)


def _frame(data: ReportData, points: Sequence[Point], width: int, height: int) -> _Frame:
    sizes = [float(p.bytes) for p in points] + ([float(data.budget_bytes)] if data.budget_bytes else [])
    ratios = [1.0, *(p.ratio for p in points), *([data.floor] if data.floor else [])]
    margin = 0.07 * (max(sizes) - min(sizes)) or 0.1 * max(sizes) or 1.0
    stretch = (max(ratios) / min(ratios)) ** 0.06 if max(ratios) > min(ratios) else 1.1
    frame = _Frame(
        width,
        height,
        (max(0.0, min(sizes) - margin), max(sizes) + margin),
        (min(ratios) / stretch, max(ratios) * stretch),
    )
    for point in points:
        spot = _around(frame.x(point.bytes), frame.y(point.ratio), 8 if point.kind == "chosen" else 4)
        (frame.minor if point.kind == "candidate" else frame.taken).append(spot)
    for one, two in pairwise(_frontier(points)):
        for part in (step / 24 for step in range(25)):  # the line lies there as well
            size, ratio = one.bytes + part * (two.bytes - one.bytes), one.ratio * (two.ratio / one.ratio) ** part
            frame.taken.append(_around(frame.x(size), frame.y(ratio), 2))
    return frame


def _frontier(points: Sequence[Point]) -> list[Point]:
    """The points that the line joins, by size; none without a frontier."""
    on = [point for point in points if point.kind in ("frontier", "chosen")]
    return sorted(on, key=lambda point: point.bytes) if any(p.kind == "frontier" for p in on) else []


def _axes(data: ReportData, frame: _Frame) -> Iterator[str]:
    last = math.inf
    for ratio in _RATIOS:
        if frame.ratios[0] <= ratio <= frame.ratios[1] and last - frame.y(ratio) >= 26:
            last = frame.y(ratio)
            yield f'<line class="grid" x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{last}" y2="{last}"/>'
            yield f'<text class="tick" x="{_LEFT - 8}" y="{last + 4}" text-anchor="end">{ratio:g}</text>'
    scale, unit = next(((s, u) for s, u in _UNITS if frame.sizes[1] >= s), (1.0, "B"))
    for size in _ticks(*frame.sizes, count=max(3, frame.width // 130)):
        x, y = frame.x(size), frame.floor_y + 18
        yield f'<text class="tick" x="{x}" y="{y}" text-anchor="middle">{size / scale:g}</text>'
    yield f'<line class="base" x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{frame.floor_y}" y2="{frame.floor_y}"/>'
    yield f'<text class="axis" x="0" y="12">{escape(data.quality_name)} ratio, logarithmic</text>'
    yield (
        f'<text class="axis" x="{frame.width - _RIGHT}" y="{frame.height - 6}" text-anchor="end">'
        f"size of the files, {unit}</text>"
    )


def _ticks(low: float, high: float, count: int) -> Iterator[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    tick = math.ceil(low / step) * step
    while tick <= high:
        yield tick
        tick += step


def _limits(data: ReportData, frame: _Frame) -> Iterator[str]:
    """The budget and the floor, and the corner where both hold."""
    right = frame.x(data.budget_bytes) if data.budget_bytes else frame.width - _RIGHT
    above = frame.y(data.floor) if data.floor else float(_TOP)
    if data.budget_bytes or data.floor:
        yield (
            f'<rect class="feasible" x="{_LEFT}" y="{above}" width="{round(right - _LEFT, 1)}" '
            f'height="{round(frame.floor_y - above, 1)}"/>'
        )
    if data.budget_bytes:
        yield f'<line class="limit" x1="{right}" x2="{right}" y1="{_TOP - 6}" y2="{frame.floor_y}"/>'
        words = f"budget {quantity(data.budget_bytes, 'bytes')}"
        yield frame.beside([(right + 6, _TOP + 4, "start"), (right - 6, _TOP + 4, "end")], words)
        frame.taken.append((right - 2, _TOP, right + 2, frame.floor_y))
    if data.floor:
        edge = frame.width - _RIGHT
        yield f'<line class="limit" x1="{_LEFT}" x2="{edge}" y1="{above}" y2="{above}"/>'
        ends = [(edge, above - 6, "end"), (edge, above + 15, "end")]
        starts = [(_LEFT + 4, above - 6, "start"), (_LEFT + 4, above + 15, "start")]
        yield frame.beside(ends + starts, f"floor {times(data.floor)}")


def _marks(data: ReportData, points: Sequence[Point], frame: _Frame) -> Iterator[str]:
    frontier = _frontier(points)
    chosen = [p for p in points if p.kind == "chosen"]
    references = [p for p in points if p.kind == "reference"]
    if frontier:
        path = " ".join(f"{frame.x(p.bytes)},{frame.y(p.ratio)}" for p in frontier)
        yield f'<polyline class="frontier" points="{path}"/>'
    for point in points:
        x, y = frame.x(point.bytes), frame.y(point.ratio)
        shown = f"<title>{escape(_named(point))}</title>"
        if point.kind == "candidate":
            yield f'<circle class="candidate" cx="{x}" cy="{y}" r="2.5">{shown}</circle>'
        elif point.kind == "frontier":
            yield f'<circle class="frontier" cx="{x}" cy="{y}" r="3.5">{shown}</circle>'
        elif point.kind == "reference":
            yield f'<path class="reference" d="M{x} {round(y - 5, 1)}l5 5l-5 5l-5 -5z">{shown}</path>'
    for point in chosen:
        x, y = frame.x(point.bytes), frame.y(point.ratio)
        bounds = (data.quality.low, data.quality.high) if data.quality else (None, None)
        if bounds[0] and bounds[1]:
            low, high = (frame.y(min(max(b, frame.ratios[0]), frame.ratios[1])) for b in bounds if b)
            yield f'<line class="chosen" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>'
        yield f'<circle class="chosen" cx="{x}" cy="{y}" r="6.5"><title>{escape(_named(point))}</title></circle>'
    for point in [*chosen, *references]:
        text = point.label or "this fit"
        gap = 12 if point.kind == "chosen" else 9
        if place := frame.place(frame.x(point.bytes), frame.y(point.ratio), text, gap):
            x, y, anchor = place
            yield f'<text class="{point.kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _named(point: Point) -> str:
    """What a pointer held over the mark is told."""
    name = point.label or {"chosen": "this fit", "frontier": "frontier", "candidate": "candidate"}.get(point.kind, "")
    predicted = ", predicted" if point.predicted else ""
    return f"{name}: {quantity(point.bytes, 'bytes')}, {times(point.ratio)}{predicted}"
