"""A fifth of SmolLM2's blocks gone for real: whole blocks, widths, or both; before and after recovery, with its speed.

    python -P benchmarks/structured.py [--rows NAME ...] [--steps 160] [--results FILE.jsonl]
    python -P benchmarks/structured.py --speed --results FILE.jsonl

Every row removes at least the parameters that the depth-only row removes, and recovers with as many steps on the same
calibration text: towards the distributions of the original, all but the embedding trained. The learning rate is chosen
on other calibration text, for the depth-only row, and is that of all. Judged on held-out text against the original.
Time (--speed, for a machine that does nothing else) is that of the processor on one thread, the original and all shapes
in turns; it knows no values, so blocks and units are then the first ones. Finished rows are read back from the results
file.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pennyweight.claims.assets import Assets
from pennyweight.evaluate.agreement import agreement
from pennyweight.lever import make
from pennyweight.measure import decoding
from pennyweight.measure.latency import Comparison, comparison, order
from pennyweight.measure.stats import Interval, bootstrap, paired_ratio
from pennyweight.model.model import Model
from pennyweight.solvers.recovery import Divergence, head_of, recover, states_of
from pennyweight.work import Work

_BLOCKS, _UNITS = 30, 1536


@dataclass(frozen=True)
class Row:
    """What is left: blocks, and hidden units in each; and what says which blocks go."""

    blocks: int = _BLOCKS
    units: int = _UNITS
    metric: str = "angular"

    @property
    def title(self) -> str:
        blocks, units = f"{_BLOCKS - self.blocks} of {_BLOCKS} blocks", f"{self.units:,} of {_UNITS:,} units"
        if self.units == _UNITS:
            return f"depth only: {blocks}"
        return f"width only: {units}" if self.blocks == _BLOCKS else f"both: {blocks}; {units}"

    @property
    def steps(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Levers with their options, in order."""
        depth = ("prune.depth", {"blocks": _BLOCKS - self.blocks, "metric": self.metric})
        width = ("prune.width", {"kind": "ffn", "removed": 1 - self.units / _UNITS, "multiple_of": 16})
        return tuple(one for one, asked in ((depth, self.blocks < _BLOCKS), (width, self.units < _UNITS)) if asked)

    def sized(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` of this shape, the first blocks and units kept: as fast as any other choice."""
        module: Any = copy.deepcopy(model)
        module.config.num_hidden_layers = self.blocks
        module.model.layers = module.model.layers[: self.blocks]
        for block in module.model.layers:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight = nn.Parameter(layer.weight[: self.units].clone())
            block.mlp.down_proj.weight = nn.Parameter(block.mlp.down_proj.weight[:, : self.units].clone())
        made: nn.Module = module
        return made


#: With five blocks the metric whose run diverges less on other calibration text (of three and six both take one run).
ROWS = {
    "depth": Row(blocks=24),
    "width": Row(units=1120),
    "mixed": Row(27, 1296),
    "deeper": Row(25, 1440, "influence"),
}
_LENGTH, _SEEN, _CHOOSE, _JUDGED = 256, 16, 16, 16
_RATES, _TRIAL = (1e-4, 3e-4, 1e-3), 24
_PROMPT, _TOKENS, _REPEATS = 512, 8, 7


class Bench:
    """The original, its texts, and what it expects of them."""

    def __init__(self, steps: int) -> None:
        self.asset, self.steps = Assets().load("smollm2-135m"), steps
        drawn = self.asset.windows("wiki", part="calibration", length=_LENGTH, count=2 * steps + _SEEN + _CHOOSE)
        self.seen, self.choose, self.text = drawn.tensor_split([_SEEN, _SEEN + _CHOOSE])
        self.held = self.asset.windows("wiki", part="heldout", length=2 * _LENGTH, count=_JUDGED, seed=1)
        self.states = states_of(self.asset.model.module, self.text)
        self.chosen = states_of(self.asset.model.module, self.choose)

    def shrunk(self, row: Row) -> Model:
        """The model after the levers of ``row``, not recovered."""
        model = self.asset.fresh()
        for name, options in row.steps:
            maps = tuple(one for one in model.anatomy.layers() if one.block is not None)
            make(name, options).change(model, Work(model=model, windows=self.seen, maps=maps))
            model = replace(model)  # its anatomy anew
        return model

    def rate(self) -> tuple[float, dict[float, float]]:
        """The rate with the least divergence on calibration text after a few steps of the depth-only row, and all."""
        found = {}
        for rate in _RATES:
            module = self.shrunk(ROWS["depth"]).module
            recover(module, self.text, self.states, steps=_TRIAL, rate=rate)
            states, head = states_of(module, self.choose), head_of(module).weight.detach()
            rows, wanted = states.flatten(0, 1), self.chosen.flatten(0, 1)
            found[rate] = float(Divergence.apply(rows, wanted, head))  # type: ignore[no-untyped-call]  # torch's own
            print(f"rate {rate:g}: {found[rate]:.4f} nats on calibration text", flush=True)
        return min(found, key=found.__getitem__), found

    def judged(self, module: nn.Module) -> dict[str, Any]:
        """By held-out window: agreement, divergence, and losses of both."""
        found = agreement(self.asset.model.module, module, self.held, dtype=torch.bfloat16)
        losses = {"before": found.original_losses, "after": found.other_losses}
        each = {"same": found.same.float(), "kl": found.kl, **losses}
        return {name: value.mean(1).tolist() for name, value in each.items()}


def speeds() -> dict[str, Any]:
    """By row: ratios of time to the original's, in bfloat16 on one thread of the processor."""
    asset = Assets().load("smollm2-135m")
    original = asset.model.module.to(torch.bfloat16)
    prompt = asset.windows("wiki", part="heldout", length=_PROMPT, count=1, seed=1).flatten()
    modules = [original, *(row.sized(original) for row in ROWS.values())]
    seconds = np.zeros((_REPEATS + 1, len(modules), 2))
    for turn, rounds in enumerate(seconds):
        for at in order(len(modules), turn):
            run = decoding.greedy(modules[at], prompt, tokens=_TOKENS, clock=time.process_time)
            rounds[at] = run.prefill, run.decode
    warm = seconds[1:]
    return {
        key: {what: _times(comparison(warm[:, [0, at], which])) for which, what in enumerate(("prefill", "decode"))}
        for at, key in enumerate(ROWS, 1)
    }


def _times(found: Comparison) -> dict[str, float]:
    ratio = found.ratio
    return {"ms": found.second.milliseconds, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}


def _kept(one: dict[str, Any], baseline: dict[str, Any]) -> Interval:
    """Agreement as a share of that of ``baseline``, with its interval over windows."""
    pairs = np.array([one["same"], baseline["same"]]).T
    return bootstrap(pairs, lambda drawn: drawn[..., 0].mean(-1) / drawn[..., 1].mean(-1))


def page(found: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        "| model | parameters | MB | prefill | decode | recovered | agreement | of depth only's | perplexity ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, row in ROWS.items():
        for when in ("before", "after"):
            one, base = found.get(f"{key}-{when}"), found.get(f"depth-{when}")
            if one is None:
                continue
            timed = found.get("speed", {}).get(key) if when == "after" else None
            speeds = [f"{s['ratio']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in (timed or {}).values()]
            share = _kept(one, base) if base is not None and key != "depth" else None
            ratio = paired_ratio(one["before"], one["after"])
            after = f"{one['seconds'] / 60:.1f} min" if when == "after" else "no"
            cells = [
                row.title, f"{one['params']:,}", f"{one['bytes'] / 1e6:.1f}", *(speeds or ["", ""]), after,
                f"{np.mean(one['same']):.4f}",
                f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]" if share else "",
                f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked and not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=160, help="of recovery, 512 tokens each")
    parser.add_argument("--results", type=Path, help="JSON lines of finished rows; read first, and added to")
    parser.add_argument("--speed", action="store_true", help="time all rows, and do nothing else")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    if asked.results and asked.results.exists():
        found = {one["row"]: one for one in map(json.loads, asked.results.read_text().splitlines())}

    def store(key: str, value: dict[str, Any]) -> None:
        found[key] = {"row": key, **value}
        print(
            key,
            {name: float(np.mean(one)) for name, one in value.items() if isinstance(one, (list, float))},
            flush=True,
        )
        if asked.results:
            with asked.results.open("a") as file:
                file.write(json.dumps(found[key]) + "\n")

    if asked.speed:
        store("speed", speeds())
    wanted = [] if asked.speed else [key for key in asked.rows if f"{key}-after" not in found]
    if wanted:
        _run(wanted, asked.steps, found, store)
    print("\n" + page(found))


def _run(wanted: Sequence[str], steps: int, found: dict[str, dict[str, Any]], store: Callable[..., None]) -> None:
    bench = Bench(steps)
    if "rate" not in found:
        rate, tried = bench.rate()
        store("rate", {"rate": rate, "tried": {f"{key:g}": value for key, value in tried.items()}})
    for key in wanted:
        module = bench.shrunk(ROWS[key]).module
        params = sum(one.numel() for one in module.parameters())
        size = {"params": params, "bytes": 2 * params}
        if f"{key}-before" not in found:
            store(f"{key}-before", {**size, **bench.judged(module)})
        began = time.process_time()
        recover(module, bench.text, bench.states, steps=steps, rate=found["rate"]["rate"])
        seconds = time.process_time() - began
        store(f"{key}-after", {**size, **bench.judged(module), "seconds": seconds})


if __name__ == "__main__":
    main()
