"""A study of post-training quantization: method by bits by group by activations, one table.

Row 118. Source: Z. Yao, X. Wu, C. Li, S. Youn and Y. He, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs
from Comprehensive Study to Low Rank Compensation", arXiv:2303.08302: weights alone, activations alone (integers with a
range for each token) and both, under round to nearest, GPTQ and low-rank compensation. Its classes of sensitivity are
the perplexity lost: I up to 0.1, II up to 0.5, III beyond. Differs from the source: every figure has its paired
interval, and the bytes of the file stand beside it.

The maps inside blocks are quantized, embedding and head are not. Statistics are those of the original, taken once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from pennyweight.calibrate import collect
from pennyweight.data import windows
from pennyweight.errors import OptionError
from pennyweight.job import Progress, Settings, quiet
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.levers.quantize.lorc import LoRC
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import anatomy, load
from pennyweight.model.anatomy import Map
from pennyweight.model.compact import compact_layer
from pennyweight.model.model import Model
from pennyweight.model.saving import file_bytes
from pennyweight.safe_write import write_text
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.task import task_of
from pennyweight.weights import Activation, Dense, Weight
from pennyweight.weights.activations import FLOATS

METHODS = ("rtn", "gptq", "lorc")
_CLASSES = ((0.1, "I"), (0.5, "II"))


@dataclass(frozen=True)
class Cell:
    """One setting and what it does.

    Attributes:
        method: "rtn", "gptq", "lorc"; "none" where weights are as they were.
        bits: of a weight; 16 as they were.
        group_size: input features that share a scale; None for the whole row.
        activations: what inputs are rounded to: bits of integers, a floating-point format, or "16" for nothing.
        bytes: of the file.
        effect: as people read it (perplexity over that of the original).
        low: lower end of its 95 % interval.
        high: upper end.
        sensitivity: the class of the perplexity lost; empty for models without one.
    """

    method: str
    bits: int
    group_size: int | None
    activations: str
    bytes: int
    effect: float
    low: float
    high: float
    sensitivity: str


@dataclass(frozen=True)
class Study:
    """The table, in the order of the grid.

    Attributes:
        model: its name.
        metric: what ``effect`` is about.
        windows: held-out windows judged on.
        figure: of the original; None for models that are only compared with themselves.
        cells: one a setting.
    """

    model: str
    metric: str
    windows: int
    figure: float | None
    cells: tuple[Cell, ...]

    def table(self) -> str:
        """The table as text."""
        known = "" if self.figure is None else f", {self.figure:.4g} before"
        lines = [
            f"{self.model}, {self.windows} held-out windows, {self.metric}{known}",
            f"{'method':<7} {'weights':>7} {'group':>6} {'inputs':>7} {'bytes':>14}  effect (95 %)              class",
        ]
        for cell in self.cells:
            group = "" if cell.bits == 16 else "row" if cell.group_size is None else str(cell.group_size)
            effect = f"{cell.effect:.4f} [{cell.low:.4f}, {cell.high:.4f}]"
            lines.append(
                f"{cell.method:<7} {cell.bits:>7} {group:>6} {cell.activations:>7} {cell.bytes:>14,}  {effect:<26} "
                f"{cell.sensitivity}".rstrip()
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)


def study(
    model: str | Path | torch.nn.Module | Model,
    *,
    methods: Sequence[str] = METHODS,
    bits: Sequence[int] = (4, 3),
    groups: Sequence[int | None] = (128,),
    activations: Sequence[str] = ("16", "8"),
    rank: int = 8,
    data: Any = "wiki",
    out: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress = quiet,
) -> Study:
    """Quantize every map in the blocks of ``model`` under each setting of the grid, and judge it on held-out text.

    Args:
        model: as for `pennyweight.fit.fit`; not changed.
        methods: out of `METHODS`.
        bits: of weights, 1 to 8; inputs are rounded under weights as they were, too.
        groups: input features that share a scale, None for the whole row.
        activations: "16" for inputs as they are, bits of integers with a range for each token ("8"), or a format of
            `pennyweight.weights.activations` ("e4m3").
        rank: of the compensation, at most the smaller side of a map.
        data: text to calibrate and judge on.
        out: a directory for ``study.json``.
        settings: how much text is read, and the seed.
        progress: called with (stage, done, total).

    Raises:
        OptionError: a grid that is empty, or a setting that does not exist.
    """
    _check(methods, bits, groups, activations)
    read = settings or Settings()
    loaded = model if isinstance(model, Model) else load(model)
    task, tokenizer = task_of(loaded), loaded.need_tokenizer()
    seen = windows(data, tokenizer, part="calibration", length=read.length, count=read.statistics, seed=read.seed)
    held = windows(data, tokenizer, part="heldout", length=read.length, count=read.heldout, seed=read.seed)
    maps = tuple(found for found in loaded.anatomy.layers() if found.block is not None and found.kind in _KINDS)
    if not maps:
        raise OptionError(f"study: {loaded.name} has no linear map in a block; give a model that has blocks")
    needed = any(method != "rtn" for method in methods)
    known = collect(loaded, seen, report=progress) if needed else dict.fromkeys((m.name for m in maps), NO_STATISTICS)
    before = task.scores(loaded.module, held, exact=True)
    figure = task.figure(before)
    grid: list[tuple[str, int, int | None]] = [("none", 16, None), *product(methods, bits, groups)]
    changed = replace(loaded, module=copy.deepcopy(loaded.module))
    cells = []
    for done, (method, width, group) in enumerate(grid):
        for found in maps:
            layer = compact_layer(changed.module, found)
            layer.weight = _solved(method, width, group, rank, anatomy.matrix(loaded.module, found), known, found)
        for inputs in activations:
            if method == "none" and inputs == "16":
                continue  # the original
            for found in maps:
                compact_layer(changed.module, found).activation = _activation(inputs)
            after = task.scores(changed.module, held, exact=True)
            effect, now = task.effect(before, after), task.figure(after)
            lost = "" if figure is None or now is None else _class(now - figure)
            cells.append(
                Cell(method, width, group, inputs, file_bytes(changed), effect.value, effect.low, effect.high, lost)
            )
        progress("study", done + 1, len(grid))
    table = Study(loaded.name, task.metric, len(held), figure, tuple(cells))
    if out is not None:
        write_text(Path(out) / "study.json", table.to_json())
    return table


_KINDS = ("linear", "conv1d-transposed")


def _check(
    methods: Sequence[str], bits: Sequence[int], groups: Sequence[int | None], activations: Sequence[str]
) -> None:
    for name, given in (("methods", methods), ("bits", bits), ("groups", groups), ("activations", activations)):
        if not given:
            raise OptionError(f"study: no {name}; give at least one")
    for method in methods:
        if method not in METHODS:
            raise OptionError(f"study: unknown method {method!r}; give {', '.join(METHODS)}")
    for width, group in product(bits, groups):
        RTN(bits=width, group_size=group)  # refuses both in its own words
    for inputs in activations:
        if inputs not in FLOATS and not (inputs.isdecimal() and 2 <= int(inputs) <= 16):
            raise OptionError(f"study: activations {inputs!r}; give 2 to 16 bits, or {', '.join(FLOATS)}")


def _solved(
    method: str,
    bits: int,
    group_size: int | None,
    rank: int,
    matrix: torch.Tensor,
    known: dict[str, Statistics],
    found: Map,
) -> Weight:
    dense, statistics = Dense(matrix.contiguous()), known[found.name]
    if method == "none":
        return dense
    group = None if group_size is None else min(group_size, matrix.shape[1])
    if method == "rtn":
        return RTN(bits=bits, group_size=group).solve(dense, statistics)
    if method == "gptq":
        return GPTQ(bits=bits, group_size=group).solve(dense, statistics)
    return LoRC(bits=bits, group_size=group, rank=min(rank, *matrix.shape)).solve(dense, statistics)


def _activation(inputs: str) -> Activation | None:
    if inputs in FLOATS:
        return Activation(bits=FLOATS[inputs], format=inputs)
    return None if inputs == "16" else Activation(bits=int(inputs))


def _class(lost: float) -> str:
    return next((name for limit, name in _CLASSES if lost <= limit), "III")
