"""A fifth of SmolLM2's blocks gone for real: whole blocks, widths, or both; before and after recovery, with its speed.

    python -P benchmarks/structured.py [--rows NAME ...] [--steps 160] [--results FILE.jsonl]

Every row removes at least the parameters that the depth-only row removes, and recovers with as many steps on the same
calibration text: towards the distributions of the original, all but the embedding trained. The learning rate is chosen
on other calibration text, for the depth-only row, and is that of all. Judged on held-out text against the original.
Time is that of the processor on one thread, the original and the shrunk model in turns: other work on the machine
neither adds to it nor takes from it. Finished rows are read back from the results file.
"""

from __future__ import annotations

import argparse
import json
import time
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
from pennyweight.measure.latency import Comparison
from pennyweight.measure.stats import Interval, bootstrap, paired_ratio
from pennyweight.model.model import Model
from pennyweight.solvers.recovery import Divergence, head_of, recover, states_of
from pennyweight.work import Work

Steps = tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Row:
    """A way to shrink: levers in order."""

    title: str
    steps: Steps


def _ffn(width: int) -> tuple[str, dict[str, Any]]:
    return "prune.width", {"kind": "ffn", "removed": 1 - width / 1536, "multiple_of": 16}


ROWS = {
    "depth": Row("depth only: 6 of 30 blocks", (("prune.depth", {"blocks": 6}),)),
    "width": Row("width: 1,120 of 1,536 hidden units", (_ffn(1120),)),
    "mixed": Row("both: 3 blocks; 1,296 units", (("prune.depth", {"blocks": 3}), _ffn(1296))),
}
_LENGTH, _SEEN, _CHOOSE, _JUDGED = 256, 16, 16, 16
_RATES, _TRIAL = (1e-4, 3e-4, 1e-3), 24
_PROMPT, _TOKENS, _REPEATS = 512, 8, 12


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

    def speed(self, module: nn.Module) -> dict[str, Any]:
        """Ratios of time, in bfloat16 on one thread of the processor."""
        before = self.asset.fresh().module.to(torch.bfloat16)
        prompt = self.held.flatten()[:_PROMPT]
        found = decoding.compare(
            before, module.to(torch.bfloat16), prompt, tokens=_TOKENS, repeats=_REPEATS, clock=time.process_time
        )
        return {name: _times(one) for name, one in zip(("prefill", "decode"), found, strict=True)}


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
            speeds = [
                f"{s['ratio']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" if when == "after" else ""
                for s in (found.get(f"{key}-speed", {}).get(what) for what in ("prefill", "decode"))
                if s is not None
            ]
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

    wanted = [key for key in asked.rows if not {f"{key}-after", f"{key}-speed"} <= set(found)]
    if not wanted:
        print(page(found))
        return
    bench = Bench(asked.steps)
    if "rate" not in found:
        rate, tried = bench.rate()
        store("rate", {"rate": rate, "tried": {f"{key:g}": value for key, value in tried.items()}})
    for key in wanted:
        module = bench.shrunk(ROWS[key]).module
        params = sum(one.numel() for one in module.parameters())
        size = {"params": params, "bytes": 2 * params}
        if f"{key}-before" not in found:
            store(f"{key}-before", {**size, **bench.judged(module)})
        if f"{key}-after" not in found:
            began = time.process_time()
            recover(module, bench.text, bench.states, steps=asked.steps, rate=found["rate"]["rate"])
            seconds = time.process_time() - began
            store(f"{key}-after", {**size, **bench.judged(module), "seconds": seconds})
        if f"{key}-speed" not in found:
            store(f"{key}-speed", bench.speed(module))
    print("\n" + page(found))


if __name__ == "__main__":
    main()
