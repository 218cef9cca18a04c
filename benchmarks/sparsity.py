"""Half of SmolLM2's weights gone, at once or with a little training, with bytes counted; an encoder beside it (oBERT).

    python -P benchmarks/sparsity.py [--methods NAME ...] [--windows 16] [--results FILE.jsonl]
    python -P benchmarks/sparsity.py --choose --methods ast-24 --set rate=3e-4 --set steps=8

All linear maps inside blocks are pruned, embedding and head are left. Every method on a model calibrates on the same
windows of one part of the text and is judged on the same windows of another; ratios of perplexities are paired by
window. Those that train see more of the first part, all the same tokens; the rate of AST and of its control was chosen
(--choose) on windows of that part that none trains on. What a method stores is counted to the byte. Finished methods
are read back from the results file, so that a run may be cut short and gone on with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.calibrate import collect
from pennyweight.claims.assets import AssetModel, Assets
from pennyweight.evaluate.embedding import cosines, embed_windows
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.lever import find, make
from pennyweight.measure.stats import bootstrap, paired_ratio
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.weights import CompactLinear, Dense
from pennyweight.work import Work


@dataclass(frozen=True)
class Method:
    """A line of the table: a lever with its options, on one of the two models."""

    title: str
    pattern: str
    lever: str
    options: dict[str, Any]
    model: str = "smollm2-135m"


#: Of all that train: 24,576 tokens, each seen once.
_TRAINED: dict[str, Any] = {"steps": 24, "batch": 8, "windows": 192}
_AST: dict[str, Any] = {**_TRAINED, "rate": 1e-4, "warmup": 0.2}
METHODS = {
    "magnitude-50": Method("magnitude", "50 %", "prune.magnitude", {"sparsity": 0.5}),
    "wanda-50": Method("Wanda", "50 %", "prune.wanda", {"sparsity": 0.5}),
    "sparsegpt-50": Method("SparseGPT", "50 %", "prune.sparsegpt", {"sparsity": 0.5}),
    "sparsegpt-47.75": Method("SparseGPT, at ARMOR's bytes", "47.75 %", "prune.sparsegpt", {"sparsity": 0.4775}),
    "magnitude-24": Method("magnitude", "2:4", "prune.magnitude", {"pattern": "2:4"}),
    "wanda-24": Method("Wanda", "2:4", "prune.wanda", {"pattern": "2:4"}),
    "sparsegpt-24": Method("SparseGPT", "2:4", "prune.sparsegpt", {"pattern": "2:4"}),
    "trained-24": Method(
        "SparseGPT, then what it keeps trained",
        "2:4",
        "prune.ast",
        {**_AST, "prior": "sparsegpt", "every": 0, "decay": 0.0},
    ),
    "ast-24": Method("AST", "2:4", "prune.ast", {**_AST, "every": 4, "score": "wanda"}),
    "ast-sparsegpt-24": Method("AST from SparseGPT", "2:4", "prune.ast", {**_AST, "every": 4, "prior": "sparsegpt"}),
    "ast-slorb-24": Method(
        "AST, boosted (SLoRB)", "2:4 + 1/16", "prune.ast", {**_AST, "every": 4, "score": "wanda", "group": 16}
    ),
    "mask-24": Method("SparseGPT's masks, weights as they were", "2:4", "prune.maskllm", {"steps": 0}),
    "maskllm-24": Method(
        "MaskLLM from SparseGPT's masks, rate not searched", "2:4", "prune.maskllm", {**_TRAINED, "rate": 5e-3}
    ),
    "nowag-24": Method("NoWag, with its two sides", "2:4 + 7 %", "prune.armor", {"iterations": 0}),
    "armor-24": Method("ARMOR, 60 iterations", "2:4 + 7 %", "prune.armor", {"iterations": 60}),
    "minilm-magnitude": Method("magnitude", "50 %", "prune.magnitude", {"sparsity": 0.5}, "minilm-l6"),
    "minilm-wanda": Method("Wanda", "50 %", "prune.wanda", {"sparsity": 0.5}, "minilm-l6"),
    "minilm-sparsegpt": Method("SparseGPT", "50 %", "prune.sparsegpt", {"sparsity": 0.5}, "minilm-l6"),
    "minilm-obert": Method("oBERT", "50 %, over all layers", "prune.obert", {"sparsity": 0.5}, "minilm-l6"),
    "minilm-magnitude-24": Method("magnitude", "2:4", "prune.magnitude", {"pattern": "2:4"}, "minilm-l6"),
    "minilm-wanda-24": Method("Wanda", "2:4", "prune.wanda", {"pattern": "2:4"}, "minilm-l6"),
    "minilm-sparsegpt-24": Method("SparseGPT", "2:4", "prune.sparsegpt", {"pattern": "2:4"}, "minilm-l6"),
    "minilm-obert-24": Method("oBERT", "2:4", "prune.obert", {"pattern": "2:4"}, "minilm-l6"),
}
_LENGTH, _MOST = 128, 2800
#: Calibration windows of every method on a model; 256 for the encoder, for oBERT takes one a gradient.
_SEEN = {"smollm2-135m": 64, "minilm-l6": 256}


class Bench:
    """One model, its text, and what the original scores."""

    def __init__(self, asset: AssetModel, windows: int, *, choose: bool = False) -> None:
        self.asset = asset
        self.seen = self._draw(_SEEN[asset.name])
        if choose:  # the last of one order, where training takes the first
            self.fresh = self._draw(_MOST)[-2 * windows :]
        else:
            self.fresh = asset.windows("wiki", part="heldout", length=2 * _LENGTH, count=windows, seed=1)
        self.statistics: Any = None
        self.before = self._scores(asset.model)

    def _scores(self, model: Model) -> Tensor:
        if model.kind == "encoder":
            return embed_windows(model.module, self.fresh)
        return token_losses(model.module, self.fresh).mean(1)

    def run(self, method: Method) -> dict[str, Any]:
        """The figures of one line."""
        card = find(method.lever)
        model = self.asset.fresh()
        maps = tuple(one for one in model.anatomy.layers() if one.block is not None)
        began = time.perf_counter()
        lever = make(method.lever, method.options)
        if card.reach == "weight":
            if self.statistics is None:
                self.statistics = collect(self.asset.model, self.seen, needs={"second_moment"})
            for one in maps:
                weight = Dense(anatomy.matrix(model.module, one).float())
                anatomy.replace(model.module, one.path, lever.solve(weight, self.statistics[one.name]))
        else:
            lever.change(model, Work(model=model, windows=self.seen, maps=maps, draw=self._draw, report=_report))
        seconds = time.perf_counter() - began
        after = self._scores(model)
        effect = (
            bootstrap(1 - cosines(self.before, after)) if model.kind == "encoder" else paired_ratio(self.before, after)
        )
        return {
            "zeros": _zeros(model, maps), "bytes": _bytes(model, maps), "value": effect.value, "low": effect.low,
            "high": effect.high, "seconds": seconds,
        }  # fmt: skip

    def _draw(self, count: int) -> Tensor:
        return self.asset.windows("wiki", part="calibration", length=_LENGTH, count=count)


def _report(stage: str, done: int, total: int) -> None:
    if stage == "training":
        print(f"  {stage} {done} of {total}", file=sys.stderr, flush=True)


def _layers(model: Model, maps: tuple[Map, ...]) -> list[Any]:
    return [model.module.get_submodule(one.path) for one in maps]


def _zeros(model: Model, maps: tuple[Map, ...]) -> float:
    """Share of values that are not stored, of those a dense matrix has."""
    held = sum(
        layer.weight.cost().params if isinstance(layer, CompactLinear) else layer.weight.numel()
        for layer in _layers(model, maps)
    )
    return 1 - held / sum(one.shape[0] * one.shape[1] for one in maps)


def _bytes(model: Model, maps: tuple[Map, ...]) -> int:
    """Of the pruned matrices, patterns included."""
    return sum(
        layer.weight.cost().bytes if isinstance(layer, CompactLinear) else 2 * layer.weight.numel()
        for layer in _layers(model, maps)
    )


def page(found: dict[str, dict[str, Any]]) -> str:
    """The tables, in Markdown."""
    lines = []
    for name, figure in (("smollm2-135m", "perplexity / original"), ("minilm-l6", "1 - cosine to the original")):
        lines += [f"### {name}", "", f"| pattern | method | {figure} | 95 % | MB of the matrices | seconds |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for key, method in METHODS.items():
            if method.model == name and key in found:
                one = found[key]
                lines.append(
                    f"| {method.pattern} | {method.title} | {one['value']:.3f} | "
                    f"{one['low']:.3f} to {one['high']:.3f} | {one['bytes'] / 1e6:.1f} | {one['seconds']:.0f} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked and not done yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 256 tokens")
    parser.add_argument("--results", type=Path, help="JSON lines of finished methods; read first, and added to")
    parser.add_argument("--choose", action="store_true", help="judge on calibration text that no method trains on")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="OPTION=VALUE", help="of the levers")
    asked = parser.parse_args()
    if asked.set and asked.results:
        parser.error("--set is for trying settings; leave out --results, which holds those of the table")
    changed = {name: json.loads(value) for name, value in (one.split("=", 1) for one in asked.set)}
    found: dict[str, dict[str, Any]] = {}
    if asked.results and asked.results.exists():
        found = {one["method"]: one for one in map(json.loads, asked.results.read_text().splitlines())}
    assets, benches = Assets(), {}
    for key in asked.methods:
        if key in found:
            continue
        method = replace(METHODS[key], options={**METHODS[key].options, **changed})
        if method.model not in benches:
            benches[method.model] = Bench(assets.load(method.model), asked.windows, choose=asked.choose)
        found[key] = {"method": key, **benches[method.model].run(method)}
        one = found[key]
        print(f"{key:<22} {one['value']:.4f} [{one['low']:.4f}, {one['high']:.4f}] {one['bytes']:,} B "
              f"{one['seconds']:.0f} s", flush=True)  # fmt: skip
        if asked.results:
            with asked.results.open("a") as file:
                file.write(json.dumps(one) + "\n")
    print("\n" + page(found))


if __name__ == "__main__":
    main()
