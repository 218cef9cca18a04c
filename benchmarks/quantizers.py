"""Every way to round the weights of a model, beside rounding to nearest and GPTQ, in no more bytes than those take.

    python benchmarks/quantizers.py [--quick] [--models smollm2-135m ...] [--settings 4x64 ...] [--methods gptq awq ...]
                                    [--windows 16] [--results FILE] [--table docs/quantizers.md]

A setting "4x64" is what 4-bit codes with a two-byte scale and a whole zero for every 64 inputs take: the budget of its
rows. A method of another overhead takes the group size that keeps within it; one that cannot use the bytes up (NF4, the
lattice) is printed with what it takes; the diagonals that AWQ cannot fold come on top. Calibration statistics are of
the unmodified model for all. Columns: bits stored a weight, perplexity over the original's on held-out text (encoders:
none), relative error of the outputs (logits, or last hidden states), and the seconds it took to solve. `--quick` rounds
four blocks and reads four windows.

Each row is appended to `--results` (JSON lines) as soon as it is found, and one found there already is not run again:
a run can be stopped at any time; `--table` writes all that the file holds between the two marks of a page.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight import calibrate, data
from pennyweight.evaluate.forward import first_tensor, looking
from pennyweight.lever import find, make
from pennyweight.model import anatomy, load
from pennyweight.model.model import Model
from pennyweight.weights import Dense
from pennyweight.work import Work

SETTINGS = ("4x64", "4x128", "3x64", "2x32")
MODELS = ("smollm2-135m", "smollm2-135m-permuted", "minilm-l6")
MARKS = ("<!-- table: python benchmarks/quantizers.py -->", "<!-- end of table -->")
Options = dict[str, Any]
Shape = tuple[int, int]


def budget(bits: int, group: int) -> float:
    """Bits a weight of codes, scale and whole zero."""
    return bits + (16 + bits) / group


def plain(bits: int, group: int, shape: Shape | None = None) -> Options:
    return {"bits": bits, "group_size": group}


def searched(bits: int, group: int, shape: Shape) -> Options:
    return plain(bits, group) | {"search": 16, "importance": "inputs"}


def float_zero(bits: int, group: int, shape: Shape) -> Options:
    """Groups so much longer that a zero of two bytes fits."""
    return {"bits": bits, "group_size": 64 * math.ceil(group * 32 / (16 + bits) / 64)}


def low_rank(bits: int, group: int, shape: Shape) -> Options:
    """Groups twice as long, and what that saves spent on directions of the error in 8 bits."""
    rows, columns = shape
    saved = (math.ceil(columns / group) - math.ceil(columns / (2 * group))) * rows * (16 + bits)
    return {"bits": bits, "group_size": 2 * group, "rank": saved // (8 * (rows + columns) + 32), "factor_bits": 8}


#: By name: the lever, and from bits, group size and shape its options, or None where it has none so narrow or wide.
METHODS: dict[str, tuple[str, Callable[[int, int, Shape], Options | None]]] = {
    "rtn": ("quantize.rtn", plain),
    "rtn, searched": ("quantize.rtn", lambda b, g, s: plain(b, g) | {"search": 16}),
    "rtn, searched, weighted": ("quantize.rtn", searched),
    "gptq": ("quantize.gptq", plain),
    "gptq, searched, weighted": ("quantize.gptq", searched),
    "lorc": ("quantize.lorc", low_rank),
    "awq, unclipped": ("quantize.awq", lambda b, g, s: plain(b, g) | {"clip": False}),
    "awq": ("quantize.awq", plain),
    "hqq": ("quantize.hqq", float_zero),
    "nf4": ("quantize.nf4", lambda b, g, s: {} if b == 4 else None),
    "incoherence": ("quantize.incoherence", lambda b, g, s: {"bits": b} if b in (2, 4) else None),
    "bias correction": ("quantize.bias_correction", plain),
    "entropy": ("quantize.entropy", lambda b, g, s: {"bits": budget(b, g)}),
}
Row = dict[str, Any]


def run(model: Model, windows: Tensor) -> Tensor:
    """The first output on ``windows``, a few at a time."""
    with looking(model.module):
        return torch.cat([first_tensor(model.module(input_ids=part)) for part in windows.split(4)])


def loss(logits: Tensor, windows: Tensor) -> float:
    """Nats a token."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def kept(results: Path | None) -> dict[tuple[str, str, str], Row]:
    """The rows that a file of results holds, by model, setting and method."""
    if results is None or not results.exists():
        return {}
    rows = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {(row["model"], row["setting"], row["method"]): row for row in rows}


def line(row: Row) -> str:
    """A row as it is printed."""
    start = f"{row['setting']:8s} {row['method']:26s}"
    if "refused" in row:
        return f"{start} {row['refused']}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
    return f"{start} {row['bits']:6.3f} {ratio:>11s} {row['error']:8.4f} {row['seconds']:8.1f}"


def pages(rows: list[Row]) -> str:
    """The rows as one table a model, settings side by side."""
    parts = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name and "refused" not in row]
        if not mine:
            continue
        settings = [s for s in SETTINGS if any(row["setting"] == s for row in mine)]
        parts.append(f"### {name}\n\n{mine[0]['tokens']:,} held-out tokens.\n")
        causal = any(row["ratio"] is not None for row in mine)
        columns = ("bits", "ratio", "error") if causal else ("bits", "error")
        parts.append("| method | " + " | ".join(f"{s}: {' | '.join(columns)}" for s in settings) + " |")
        parts.append("|---|" + "---|" * len(columns) * len(settings))
        for method in METHODS:
            cells = []
            for setting in settings:
                found = [row for row in mine if row["setting"] == setting and row["method"] == method]
                if not found:
                    cells += [""] * len(columns)
                    continue
                ratio = found[0]["ratio"]
                shown = [] if ratio is None else [f"{ratio:.3f}" if ratio < 100 else f"{ratio:.0f}"]
                cells += [f"{found[0]['bits']:.3f}", *shown, f"{found[0]['error']:.3f}"]
            if any(cells):
                parts.append(f"| {method} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def write(table: Path, rows: list[Row]) -> None:
    """Put the tables between the marks of a page."""
    page = table.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    table.write_text(f"{before}{MARKS[0]}\n\n{pages(rows)}\n{MARKS[1]}{after}", encoding="utf-8")


def compare(name: str, asked: argparse.Namespace) -> None:
    """Find and print the rows of one model that are not kept yet."""
    known = kept(asked.results)
    wanted_rows = [
        (setting, method) for setting in asked.settings for method in asked.methods
        if METHODS[method][1](*map(int, setting.split("x")), (576, 576)) is not None
    ]  # fmt: skip
    if all((name, *row) in known for row in wanted_rows):
        return
    base = load(name)
    count, length = (4, 256) if asked.quick else (asked.windows, 512)
    seen, fresh = (
        data.windows("wiki", base.tokenizer, part=part, length=min(length, 256), count=windows, seed=0)
        for part, windows in (("calibration", 4 if asked.quick else 16), ("heldout", count))
    )
    blocks = [layer for layer in base.anatomy.layers() if layer.block is not None]
    if asked.quick:
        last = len(base.anatomy.blocks)
        blocks = [layer for layer in blocks if layer.block in (0, 1, last // 2, last - 1)]
    statistics = calibrate.collect(base, seen, needs={"second_moment", "absolute", "gradient"}, gradient_tokens=1024)
    wanted = run(base, fresh)
    causal = base.kind == "causal-lm"
    start = loss(wanted, fresh) if causal else 0.0
    weights = sum(layer.shape[0] * layer.shape[1] for layer in blocks)
    print(f"\n{name}: {len(blocks)} maps of {weights / 1e6:.1f} M weights; {fresh.numel()} held-out tokens")
    print(f"{'setting':8s} {'method':26s} {'bits':>6s} {'perplexity':>11s} {'outputs':>8s} {'seconds':>8s}", flush=True)
    for setting, method in wanted_rows:
        row = known.get((name, setting, method))
        if row is None:
            row = {"model": name, "setting": setting, "method": method, "tokens": fresh.numel()}
            changed = replace(base, module=copy.deepcopy(base.module))
            before = time.perf_counter()
            try:
                solve(changed, base, blocks, statistics, seen, setting, method)
            except ValueError as error:  # a model without biases has none to correct
                row["refused"] = str(error)[:80]
            else:
                took = time.perf_counter() - before
                stored = sum(changed.module.get_submodule(layer.path).weight.cost().bytes for layer in blocks)
                found = run(changed, fresh)
                ratio = math.exp(min(loss(found, fresh) - start, 700)) if causal else None
                error = float((found - wanted).norm() / wanted.norm())
                row |= {"bits": 8 * stored / weights, "ratio": ratio, "error": error, "seconds": took}
            if asked.results:
                with asked.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)


def solve(
    changed: Model, base: Model, blocks: list[Any], statistics: Any, seen: Tensor, setting: str, method: str
) -> None:
    """Round the maps of ``changed`` by ``method`` from those of ``base``."""
    bits, group = map(int, setting.split("x"))
    lever_name, options = METHODS[method]
    if find(lever_name).reach == "model":
        lever = make(lever_name, options(bits, group, blocks[0].shape) or {})
        lever.change(changed, Work(model=changed, windows=seen, maps=tuple(blocks)))
        return
    for layer in blocks:
        lever = make(lever_name, options(bits, group, layer.shape) or {})
        solved = lever.solve(Dense(anatomy.matrix(base.module, layer).float()), statistics[layer.name])
        anatomy.replace(changed.module, layer.path, solved)


def main() -> None:
    """Print one table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--settings", nargs="*", default=SETTINGS, help='bits and group size, as "4x64"')
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 256 tokens")
    parser.add_argument("--quick", action="store_true", help="four blocks, four windows")
    parser.add_argument("--results", type=Path, help="file that keeps the rows, and gives those it has")
    parser.add_argument("--table", type=Path, help="page that gets the tables of all rows kept")
    asked = parser.parse_args()
    for name in asked.models:
        compare(name, asked)
    if asked.table:
        write(asked.table, list(kept(asked.results).values()))


if __name__ == "__main__":
    main()
