"""Numbers, strings and tables as the page shows them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from pennyweight.report.data import Figure

#: A narrow space that does not break, between a number and its unit.
THIN = "\u202f"
TIMES = f"{THIN}\u00d7"
MINUS = "\u2212"
# control characters, lone surrogates and noncharacters
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def escape(text: str) -> str:
    """``text`` for HTML and SVG, in elements and in attributes; what no document may hold becomes U+FFFD."""
    return html.escape(_FORBIDDEN.sub("\ufffd", text.replace("\r\n", "\n")), quote=True)


def number(value: float, digits: int = 3, decimals: int | None = None) -> str:
    """``value`` to ``digits`` significant digits or to ``decimals``; thousands apart by narrow spaces."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "\u221e" if value > 0 else f"{MINUS}\u221e"
    if decimals is None:
        if value == int(value) and abs(value) < 1e15:
            decimals = 0  # a count is written out
        elif not 1e-4 <= abs(value) < 1e15:
            return f"{value:.{digits - 1}e}".replace("-", MINUS)
        else:
            # of the rounded value: 99.96 has its three digits as 100
            decimals = max(0, digits - 1 - math.floor(math.log10(float(f"{abs(value):.{digits - 1}e}"))))
    return f"{value:,.{decimals}f}".replace(",", THIN).replace("-", MINUS)


def quantity(value: float, unit: str, decimals: int | None = None) -> str:
    """``value`` with its unit; "bytes" and "params" are scaled to three or four digits."""
    if unit not in ("bytes", "params"):
        return number(value, 4, decimals) + (f"{THIN}{unit}" if unit else "")
    size, prefix = next(
        ((s, p) for s, p in _PREFIXES if math.isfinite(value) and float(f"{abs(value):.2e}") >= s), (1.0, "")
    )
    return f"{number(value / size)}{THIN}{prefix}{'B' if unit == 'bytes' else f'{THIN}params' if prefix else 'params'}"


def times(value: float, decimals: int | None = None) -> str:
    """A ratio with its sign; 1 and 1.3 as 1.00 and 1.30."""
    if decimals is None and math.isfinite(value) and 0.1 <= abs(value) < 10:
        decimals = 2 if abs(value) >= 1 else 3
    return f"{number(value, decimals=decimals)}{TIMES}"


def count(value: int) -> str:
    """A count, scaled: "28.3 M"."""
    return quantity(value, "params").removesuffix("params").rstrip()


def percent(share: float) -> str:
    """A share of 1, to a tenth of a percent."""
    return f"{number(100 * share, decimals=1)}{THIN}%"


def spread(*figures: Figure | None) -> int | None:
    """Decimals that show the narrowest of their intervals to one or two digits; None without an interval."""
    widths = [f.high - f.low for f in figures if f is not None and f.low is not None and f.high is not None]
    width = min((width for width in widths if math.isfinite(width) and width > 0), default=None)
    if width is None:
        return None
    size = math.floor(math.log10(width))
    # two digits of a width of 0.12, one of 0.9: neither noise nor a bound rounded away
    return max(0, (1 if width < 5 * 10**size else 0) - size)


def alike(*values: float) -> int | None:
    """Decimals that show the smallest of ``values`` to three digits, for figures to be compared; None where unfit."""
    least = min((abs(value) for value in values if math.isfinite(value) and value), default=0.0)
    return max(0, 2 - math.floor(math.log10(least))) if 1e-4 <= least < 1e15 else None


def bounds(figure: Figure, unit: str = "", decimals: int | None = None) -> str:
    """The interval of ``figure``, or nothing."""
    if figure.low is None or figure.high is None:
        return ""
    if unit in ("bytes", "params"):
        return f"{quantity(figure.low, unit)} \u2013 {quantity(figure.high, unit)}"
    decimals = spread(figure) if decimals is None else decimals
    return f"{number(figure.low, 4, decimals)} \u2013 {number(figure.high, 4, decimals)}"


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, css: str = "") -> str:
    """A table whose first column names the rows and whose others hold numbers; all arguments are HTML already."""
    first, *others = heads
    head = f'<th scope="col">{first}</th>' + "".join(f'<th scope="col" class="n">{name}</th>' for name in others)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td class=n>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<table class="{css}"><caption class="hidden">{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def section(name: str, about: str, matter: str, *, wide: bool = False) -> str:
    """A part of a page: its name and a line about it in the margin, the matter beside them; all HTML already.

    Where it is ``wide``, the matter is below them.
    """
    css = ' class="wide"' if wide else ""
    return f'<section{css}><h2>{name}</h2><p class="about">{about}</p><div class="matter">{matter}</div></section>\n'


def small(text: str) -> str:
    """``text`` (HTML already) as a quiet second line, or nothing."""
    return f"<small>{text}</small>" if text else ""
