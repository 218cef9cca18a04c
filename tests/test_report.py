"""The report: what it says, what it never lets through, and how a browser lays it out."""

# ruff: noqa: RUF001 (what the page shows is written as it is read: minus signs, multiplication signs, dashes)

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from report_example import example

from pennyweight import report
from pennyweight.errors import DataError, OutputError
from pennyweight.report import Cell, Figure, Measure, Point, Prediction, ReportData, Sample
from pennyweight.report.text import THIN, alike, bounds, escape, number, percent, quantity, spread, times

HOSTILE = "\x00<script>alert('1')</script>\"'><img src=x onerror=y>&amp;\u202e\ud800]]>--><style>*{}"


class Outline(HTMLParser):
    """Start tags with the names of their attributes, in order; the text; and whether all elements are closed."""

    VOID = frozenset({"meta", "br", "wbr", "img", "link", "input", "hr"})
    SVG_SHAPES = frozenset({"line", "rect", "circle", "path", "polyline"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.SVG_SHAPES, f"<{tag}/> is no element that HTML lets close itself"
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def named(outline: Outline, attribute: str) -> list[str]:
    return [value or "" for name, value in outline.attributes if name == attribute]


def test_the_page_is_well_formed_and_self_contained():
    page = report.page(example())
    outline = Outline(page)
    assert outline.open == []
    assert not {"script", "link", "img", "iframe", "base"} & {tag for tag, _ in outline.tags}
    assert not {"src", "href", "onload", "action"} & {name for name, _ in outline.attributes}
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page
    assert page.count("<h1>") == 1
    ids = named(outline, "id")
    assert len(ids) == len(set(ids))
    assert set(" ".join(named(outline, "aria-labelledby")).split()) == set(ids)


def test_every_section_is_there_and_empty_ones_are_left_out():
    def headings(data: ReportData) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", report.page(data))

    assert headings(example()) == [
        *("Before and after", "Size against quality", "Where the bits are", "Predicted and measured"),
        *("Time and memory", "What it writes", "Recipe", "Receipt"),
    ]
    bare = ReportData(model="m", original_bytes=100, fitted_bytes=25)
    assert headings(bare) == []
    assert Outline(report.page(bare)).open == []


def test_the_headline_says_size_share_cost_and_verdict():
    text = Outline(report.page(example())).text.replace(THIN, " ")
    assert "smollm2-135m in 67.3 MB: 25.0 % of its size, at 1.23 × its perplexity." in text
    assert "The floor holds. Perplexity stays under 1.30 times" in text
    assert "728 bytes to spare" in text


@pytest.mark.parametrize(
    ("floor", "holds", "words"),
    [
        (1.3, True, "The floor holds."),
        (1.3, False, "The floor does not hold."),
        (1.3, None, "The floor was not tested."),
        (None, None, "No floor was set."),
    ],
)
def test_the_verdict_in_words(floor, holds, words):
    page = report.page(replace(example(), floor=floor, floor_holds=holds, verdict=""))
    assert f"<b>{words}</b>" in page


def test_one_byte_over_is_never_a_hundred_percent():
    def used(size: int) -> str:
        data = ReportData(model="m", original_bytes=10**9, fitted_bytes=size, budget="25%", budget_bytes=250_000_000)
        return Outline(report.page(data)).text.replace(THIN, " ")

    assert "100.0 %0 bytes to spare" in used(250_000_000)
    assert "100.0000004 %1 byte over it" in used(250_000_001)
    assert "100.001 %" in used(250_003_000)
    assert "99.999 %" in used(249_997_500)


def hostile(value):
    """The same data with every string replaced."""
    if isinstance(value, str):
        return value if value in ("", "bytes", "params", "chosen", "frontier", "candidate", "reference") else HOSTILE
    if dataclasses.is_dataclass(value):
        kept = {"kind", "role"}  # read as words of ours; `role` has its own test
        return replace(
            value,
            **{
                field.name: hostile(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if field.name not in kept
            },
        )
    return [hostile(item) for item in value] if isinstance(value, list) else value


def test_no_string_can_change_the_page():
    harmless, evil = example(), hostile(example())
    evil = replace(evil, receipt=[(HOSTILE, HOSTILE)] * len(harmless.receipt))
    evil = replace(evil, samples=[replace(sample, after=f"not {HOSTILE}") for sample in evil.samples])
    page = report.page(evil)
    assert page.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page)

    def frame(outline: Outline) -> list[tuple[str, tuple[str, ...]]]:
        # inside a sample or a label more text may stand, but no tag; long labels may find no place in the picture,
        # and an equal lever everywhere makes shorter titles
        return [tag for tag in outline.tags if tag[0] != "text"]

    before, after = Outline(report.page(harmless)), Outline(page)
    assert frame(after) == frame(before)
    assert after.text.count("<script>alert('1')</script>") > 20


def test_a_hostile_role_is_only_text():
    cells = [Cell(block=0, role=HOSTILE, params=8, bytes=4), Cell(block=None, role=HOSTILE, params=8, bytes=4)]
    outline = Outline(report.page(ReportData(model="m", original_bytes=100, fitted_bytes=25, cells=cells)))
    assert "script" not in {tag for tag, _ in outline.tags}
    assert outline.open == []


def test_a_mapping_is_as_good_as_the_data():
    data = example()
    assert report.page(ReportData.of(dataclasses.asdict(data))) == report.page(data)
    assert report.page(ReportData.of(json.loads(json.dumps(dataclasses.asdict(data))))) == report.page(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modell": "x"}, "report: unknown entry 'modell'; it takes budget, "),
        ({"fitted_bytes": "many"}, "report: fitted_bytes: .*integer.* not 'many'"),
        ({"points": [{"bytes": 1, "ratio": 1.0, "kind": "best"}]}, r"report: points\.0\.kind: .* not 'best'"),
        ({"model": None}, "report: model: .*string.* not None"),
    ],
)
def test_wrong_data_is_named(change, words):
    with pytest.raises(DataError, match=words):
        ReportData.of({"model": "m", "original_bytes": 100, "fitted_bytes": 25} | change)


def test_it_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    report.write(path, dataclasses.asdict(example()))
    good = path.read_text(encoding="utf-8")
    assert good == report.page(example())
    with pytest.raises(DataError):
        report.write(path, {"model": "m"})
    assert path.read_text(encoding="utf-8") == good
    with pytest.raises(OutputError):
        report.write(tmp_path, example())
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_points_that_fit_no_picture_are_counted_and_listed():
    points = [
        Point(bytes=10, ratio=1.1, kind="chosen"),
        Point(bytes=12, ratio=math.inf, kind="reference", label="broken"),
        Point(bytes=12, ratio=900.0, kind="candidate"),
    ]
    page = report.page(ReportData(model="m", original_bytes=100, fitted_bytes=10, points=points))
    assert "2 far worse, in the table only" in page
    assert f"∞{THIN}×" in page
    assert page.count('class="candidate"') == 1  # the key, not the picture


def test_a_picture_of_one_point_has_room_around_it():
    points = [Point(bytes=10, ratio=1.0, kind="chosen")]
    page = report.page(ReportData(model="m", original_bytes=100, fitted_bytes=10, points=points))
    (x,) = re.findall(
        r'<circle class="chosen" cx="([\d.]+)" cy="[\d.]+" r="6.5"', page.split('class="picture narrow"')[0]
    )
    assert 200 < float(x) < 600
    assert not re.search(r"\b(nan|inf)\b", page)


def test_the_frontier_falls_in_the_picture_as_it_does_in_numbers():
    page = report.page(example())
    (line,) = re.findall(r'<polyline class="frontier" points="([^"]+)"', page.split('class="picture narrow"')[0])
    drawn = [tuple(map(float, point.split(","))) for point in line.split()]
    told = sorted((p.bytes, p.ratio) for p in example().points if p.kind in ("frontier", "chosen"))
    xs, ys = zip(*drawn, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # down the page is better
    # the scales are linear in bytes and logarithmic in the ratio
    for index in range(1, len(told) - 1):
        along = (told[index][0] - told[0][0]) / (told[-1][0] - told[0][0])
        assert (xs[index] - xs[0]) / (xs[-1] - xs[0]) == pytest.approx(along, abs=1e-3)
        down = math.log(told[index][1] / told[0][1]) / math.log(told[-1][1] / told[0][1])
        assert (ys[index] - ys[0]) / (ys[-1] - ys[0]) == pytest.approx(down, abs=1e-3)


def test_the_map_has_a_row_a_block_and_a_column_a_role():
    page = report.page(example())
    table = page[page.index('<table class="map"') : page.index("</table>", page.index('<table class="map"'))]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    assert len(rows) == 31
    assert [re.sub("<.*?>", " ", head).split() for head in re.findall("<th.*?>(.*?)</th>", rows[0])] == [
        ["block"],
        *(["attention", part] for part in ("query", "key", "value", "output")),
        *(["ffn", part] for part in ("gate", "up", "down")),
        ["together"],
    ]
    assert all(row.count("<td") == 8 for row in rows[1:])
    assert 'class="dense"' in rows[30]  # the one left in 16 bits
    assert f"50{THIN}% zero" in rows[13]
    assert "rank 8" in rows[4]


def test_bits_and_bytes_of_experts_are_added_up():
    cells = [
        Cell(block=0, role=f"moe.experts[{i}].up", params=1000, bytes=250 + 250 * (i == 3), lever=f"l{i // 3}")
        for i in range(4)
    ]
    cells.append(Cell(block=0, role="moe.router", params=100, bytes=200))
    page = report.page(ReportData(model="m", original_bytes=9000, fitted_bytes=1450, cells=cells))
    # 1250 bytes for 4000 weights are 2.5 bits
    assert '<td class="bits" style="--t:31%" title="3 l0; 1 l1">2.5 <span>1.25\u202fkB</span></td>' in page
    assert '<td class="dense" title="untouched">16.0' in page
    assert "bits a weight</dt><dd" in page
    assert f"{8 * 1450 / 4100:.2f}" in page


def test_samples_are_grey_as_far_as_they_agree():
    sample = Sample(prompt="p", before=" one two three", after=" one two thrown")
    page = report.page(ReportData(model="m", original_bytes=9, fitted_bytes=3, samples=[sample]))
    assert '<span class="same">one two </span>three</p>' in page
    assert '<span class="same">one two </span>thrown</p>' in page
    same = replace(sample, after=sample.before)
    page = report.page(ReportData(model="m", original_bytes=9, fitted_bytes=3, samples=[same]))
    assert page.count('<span class="same">one two three</span></p>') == 2


@pytest.mark.parametrize(
    ("predicted", "measured", "words"),
    [
        (1.0, 1.0, '<circle cx="84.0"'),
        (2.0, 1.0, '<circle cx="8.0"'),
        (1.0, 2.0, '<circle cx="160.0"'),
        (1.0, 9.0, '<path d="M160.0 5l6 5'),
        (9.0, 1.0, '<path d="M8.0 5l-6 5'),
        (0.0, 1.0, "no ratio"),
        (1.0, math.nan, "no ratio"),
    ],
)
def test_the_dot_of_a_prediction(predicted, measured, words):
    predictions = [Prediction(name="loss", predicted=predicted, measured=measured)]
    assert words in report.page(ReportData(model="m", original_bytes=9, fitted_bytes=3, predictions=predictions))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0), "0"),
        (number(1234567), "1 234 567"),
        (number(0.012345), "0.0123"),
        (number(-2.5), "−2.50"),
        (number(1.5e-7), "1.50e−07"),
        (number(math.nan), "not a number"),
        (number(-math.inf), "−∞"),
        (number(99.96), "100"),
        (quantity(67_299_112, "bytes"), "67.3 MB"),
        (quantity(999, "bytes"), "999 B"),
        (quantity(1_000, "bytes"), "1 kB"),
        (quantity(999_999, "bytes"), "1.00 MB"),
        (quantity(134_515_008, "params"), "135 M params"),
        (quantity(math.inf, "bytes"), "∞ B"),
        (quantity(20.1234, "ms"), "20.12 ms"),
        (quantity(20.1234, ""), "20.12"),
        (times(1.2254), "1.23 ×"),
        (times(1), "1.00 ×"),
        (times(0.25015), "0.250 ×"),
        (times(12.3), "12.3 ×"),
        (percent(0.2501), "25.0 %"),
        (escape("a\x00<b>\"'&\r\n"), "a\ufffd&lt;b&gt;&quot;&#x27;&amp;\n"),
        (bounds(Figure(value=1.2254, low=1.209, high=1.243)), "1.209 – 1.243"),
        (bounds(Figure(value=81.3, low=80.6, high=82.0)), "80.6 – 82.0"),
        (bounds(Figure(value=1e6, low=1e6, high=2e6), "bytes"), "1 MB – 2 MB"),
        (bounds(Figure(value=1.0)), ""),
    ],
)
def test_numbers_as_they_are_read(shown, expected):
    assert shown.replace(THIN, " ") == expected


def test_decimals_follow_the_interval_and_the_company():
    assert spread(Figure(value=18.42, low=17.1, high=19.9), None) == 1
    assert spread(Figure(value=1.0), None) is None
    assert spread(Figure(value=1.0, low=1.0, high=1.0)) is None
    assert alike(214, 188.3) == 0
    assert alike(23, 55.9) == 1
    assert alike(0.171, 0.2033) == 3
    assert alike(0.0, math.inf) is None
    rows = [Measure(name="p", before=Figure(value=18.42, low=17.1, high=19.9), after=Figure(value=22.573))]
    assert "22.6" in report.page(ReportData(model="m", original_bytes=9, fitted_bytes=3, measures=rows))


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_can_be_read_on_what_lies_behind_it(scheme):
    style = (files("pennyweight.report") / "style.css").read_text(encoding="utf-8")
    light, dark, printed = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in parts_of(style))
    colors = {"light": light, "dark": light | dark, "print": light | printed}[scheme]
    for text in ("ink", "soft", "accent"):
        assert contrast(colors[text], colors["paper"]) >= 4.5, text
    assert contrast(colors["ink"], colors["ramp"]) >= 4.5
    assert contrast(colors["ink"], colors["raised"]) >= 4.5


def parts_of(style: str) -> tuple[str, str, str]:
    light, rest = style.split("@media (prefers-color-scheme: dark)", 1)
    dark, rest = rest.split("* { box-sizing", 1)
    # short colours are written out, so that one pattern finds them all
    printed = re.sub(r"#(\w)(\w)(\w)\b(?!\w)", r"#\1\1\2\2\3\3", rest.split("@media print", 1)[1])
    return light, dark, printed


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser found to render the report ({', '.join(BROWSERS)}); install chromium"
)


def browse(tmp_path, url: str, *options: str) -> str:
    """What headless Chromium prints for ``url``."""
    assert BROWSER is not None
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
    quiet += ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
    home = tmp_path / "profile"
    home.mkdir()
    command = [BROWSER, *quiet, f"--user-data-dir={home}", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


MEASURE = """<!doctype html><meta charset="utf-8"><body><script>
const page = PAGE;
const found = {}; let left = 2;
for (const width of [1280, 420]) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const doc = frame.contentDocument, shown = name => doc.querySelector(name).getBoundingClientRect().width;
    const texts = [...doc.querySelectorAll(width > 800 ? ".picture.wide text" : ".picture.narrow text")];
    found[width] = {
      scroll: doc.documentElement.scrollWidth, wide: shown(".picture.wide"), narrow: shown(".picture.narrow"),
      title: doc.querySelector("h1").getBoundingClientRect().height,
      labels: texts.map(text => { const b = text.getBoundingClientRect();
        return [text.textContent, b.left, b.top, b.right, b.bottom]; }),
      frame: (b => [b.left, b.top, b.right, b.bottom])(texts[0].ownerSVGElement.getBoundingClientRect()),
      cells: [...doc.querySelectorAll("table.map td.bits")].every(cell => cell.scrollWidth <= cell.clientWidth + 1),
    };
    if (--left === 0) { document.body.textContent = "FOUND" + JSON.stringify(found) + "END"; }
  };
  frame.srcdoc = page; document.body.append(frame);
}
</script>"""


CROWD = [
    Point(bytes=89_200_000 + 300_000 * i, ratio=1.11 + 0.002 * i, kind="reference", label=f"crowd {i}")
    for i in range(9)
]


@needs_browser
@pytest.mark.parametrize("crowd", [[], CROWD], ids=["usual", "crowded"])
def test_a_browser_lays_it_out_wide_and_narrow(tmp_path, crowd):
    data = replace(example(), points=[*example().points, *crowd])
    page = json.dumps(report.page(data)).replace("</", "<\\/")
    (tmp_path / "measure.html").write_text(MEASURE.replace("PAGE", page), encoding="utf-8")
    printed = browse(tmp_path, (tmp_path / "measure.html").as_uri(), "--virtual-time-budget=5000", "--dump-dom")
    assert "FOUND" in printed, printed[:500]
    found = json.loads(printed[printed.index("FOUND") + 5 : printed.index("END")].replace("&amp;", "&"))
    for width, seen in found.items():
        assert seen["scroll"] <= int(width), "the page scrolls sideways"
        assert seen["title"] > 30
        assert seen["cells"], "text leaves its field in the map"
        labels = seen["labels"]
        told = {label[0] for label in labels}
        assert {"this fit", "uniform GPTQ 3 bit"} <= told
        assert crowd or {"2-bit mix", "4-bit non-linear"} <= told
        for index, (text, left, top, right, bottom) in enumerate(labels):
            assert left >= seen["frame"][0] - 1, text
            assert right <= seen["frame"][2] + 1, text
            for other, left2, top2, right2, bottom2 in labels[:index]:
                apart = left >= right2 or left2 >= right or top >= bottom2 - 3 or top2 >= bottom - 3
                assert apart, f"{text!r} lies on {other!r} at {width} px"
    assert (found["1280"]["wide"] > 700, found["1280"]["narrow"]) == (True, 0)
    assert (found["420"]["wide"], found["420"]["narrow"] > 350) == (0, True)


@needs_browser
def test_a_browser_paints_it(tmp_path):
    report.write(tmp_path / "report.html", example())
    picture = tmp_path / "report.png"
    where = (tmp_path / "report.html").as_uri()
    browse(tmp_path, where, "--window-size=1280,1600", f"--screenshot={picture}")
    painted = picture.read_bytes()
    assert struct.unpack(">II", painted[16:24]) == (1280, 1600)
    assert len(painted) > 80_000  # an empty page packs to under 10 kB
