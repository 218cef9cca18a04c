"""Where the bytes and bits are: the share of each part, the map of blocks by roles, what lies outside the blocks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from pennyweight.report.data import Cell
from pennyweight.report.text import THIN, count, escape, number, percent, quantity, small, table

#: Columns of the map in the order in which a block computes; other roles follow by name.
_ROOMS = ("attention", "cross_attention", "conv", "ffn", "moe")
_PARTS = (
    *("query", "query_down", "query_up", "kv_down", "kv_up", "key", "value", "qkv", "output"),
    *("router", "experts", "shared", "gate", "up", "gate_up", "down"),
)
_SHARES = {"attention": "attention", "cross_attention": "attention", "ffn": "feed-forward", "moe": "experts"}
_DENSE = 16.0  # bits from which a matrix counts as untouched
_FULL = 8.0  # bits of the full colour


def bits_section(cells: Sequence[Cell]) -> str:
    """The matter of the section, given at least one cell."""
    inside = [cell for cell in cells if cell.block is not None]
    outside = [cell for cell in cells if cell.block is None]
    return "\n".join([_shares(cells), _map(inside) if inside else "", _others(outside) if outside else ""])


def bits_per_weight(cells: Sequence[Cell]) -> float:
    """Stored bits for each weight stood for, scales and all."""
    return 8 * sum(cell.bytes for cell in cells) / max(1, sum(cell.params for cell in cells))


def _shares(cells: Sequence[Cell]) -> str:
    sums: dict[str, int] = defaultdict(int)
    for cell in cells:
        room = cell.role.split(".")[0]
        part = room if cell.block is None and room in ("embedding", "head") else _SHARES.get(room, "the rest")
        sums[part] += cell.bytes
    whole = max(1, sum(sums.values()))
    parts = sorted(sums.items(), key=lambda part: (part[0] == "the rest", -part[1]))
    bar, listed = [], []
    for index, (name, size) in enumerate(parts):
        tint = max(10, 100 - 30 * index)
        bar.append(f'<i style="flex:{size} 1 0;--t:{tint}%"></i>')
        listed.append(
            f'<li><i style="--t:{tint}%" aria-hidden="true"></i>{name} '
            f"<span>{quantity(size, 'bytes')}, {percent(size / whole)}</span></li>"
        )
    return (
        f'<div class="share"><div class="bar" aria-hidden="true">{"".join(bar)}</div><ul>{"".join(listed)}</ul></div>'
    )


def _map(cells: Sequence[Cell]) -> str:
    grid: dict[tuple[int, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        assert cell.block is not None, "cells of the map lie in blocks"
        grid[cell.block, re.sub(r"\[\d+\]", "", cell.role)].append(cell)  # all experts of a block in one column
    columns = sorted({column for _, column in grid}, key=_order)
    rows = []
    for block in sorted({block for block, _ in grid}):
        row = [grid.get((block, column), []) for column in columns]
        total = _stored([cell for square in row for cell in square])
        rows.append(f'<tr><th scope="row">{block}</th>{"".join(map(_square, row))}<td class="sum">{total}</td></tr>')
    head = "".join(f'<th scope="col">{_heading(column)}</th>' for column in columns)
    head = f'<th scope="col" class="block">block</th>{head}<th scope="col" class="sum">together</th>'
    listed = (
        (
            f"{block} {escape(column)}" + small(escape(_made(cells))),
            " ".join(_marks(cells)),
            f"{bits_per_weight(cells):.2f}",
            _stored(cells),
        )
        for (block, column), cells in sorted(grid.items(), key=lambda item: (item[0][0], _order(item[0][1])))
    )
    heads = ("block and role", "zeros, rank", "bits a weight", "stored")
    return (
        f'<p class="scale" aria-hidden="true">0 <i></i> {_FULL:.0f} bits a weight and more</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Map of bits">'
        f'<table class="map" style="--columns:{len(columns)}">'
        '<caption class="hidden">Bits a weight and stored bytes of every matrix, by block and role</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<details><summary>What made each field</summary>{table('Every field of the map', heads, listed)}</details>"
    )


def _order(column: str) -> tuple[tuple[int, ...], str]:
    room, *parts = column.split(".")
    known = _ROOMS.index(room) if room in _ROOMS else len(_ROOMS)
    return (known, *(_PARTS.index(part) if part in _PARTS else len(_PARTS) for part in parts)), column


def _heading(column: str) -> str:
    *room, part = column.split(".")
    return "<br>".join(escape(words).replace("_", " ") for words in (" ".join(room), part) if words)


def _square(cells: Sequence[Cell]) -> str:
    if not cells:
        return "<td></td>"
    bits = bits_per_weight(cells)
    tint = "" if bits >= _DENSE else f' style="--t:{100 * min(bits, _FULL) / _FULL:.0f}%"'
    return (
        f'<td class="{"dense" if bits >= _DENSE else "bits"}"{tint} title="{escape(_made(cells))}">'
        f"{bits:.1f} <span>{_stored(cells)}</span>{''.join(map(small, _marks(cells)))}</td>"
    )


def _stored(cells: Sequence[Cell]) -> str:
    return quantity(sum(cell.bytes for cell in cells), "bytes")


def _made(cells: Sequence[Cell]) -> str:
    """What made them, once each, and the few most used where experts differ."""
    counts = Counter(cell.lever or "untouched" for cell in cells)
    if len(counts) == 1:
        return next(iter(counts))
    said = [f"{count} {lever}" for lever, count in counts.most_common(4)]
    return "; ".join(said + ["and others"] * (len(counts) > 4))


def _marks(cells: Sequence[Cell]) -> Iterator[str]:
    """Sparsity and rank, where there are any."""
    zeros = sum(cell.sparsity * cell.params for cell in cells) / max(1, sum(cell.params for cell in cells))
    if zeros > 0:
        yield f"{number(100 * zeros, decimals=0)}{THIN}% zero"
    ranks = sorted({cell.rank for cell in cells if cell.rank is not None})
    if ranks:
        yield f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]}\u2013{ranks[-1]}"


def _others(cells: Sequence[Cell]) -> str:
    rows = (
        (
            escape(cell.role).replace("_", " ") + small(escape(cell.lever or "untouched")),
            f"{bits_per_weight([cell]):.2f}",
            count(cell.params),
            _stored([cell]),
        )
        for cell in sorted(cells, key=lambda cell: -cell.bytes)
    )
    heads = ("outside the blocks", "bits a weight", "weights", "stored")
    return table("Matrices outside the blocks", heads, rows, css="others")
