"""Seconds and peak memory of solving a whole model, one walk over 16,384 calibration tokens each.

    python benchmarks/whole_model.py [MODEL] [--levers quantize.gptq:bits=4,group_size=64 ...]

Each lever runs in a process of its own, so that its peak memory is its own; loading the model is not counted as time.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

LEVERS = (
    "quantize.gptq:bits=4,group_size=64", "quantize.gptq:bits=3,group_size=64", "prune.sparsegpt:sparsity=0.5",
    "prune.wanda:sparsity=0.5", "quantize.rtn:bits=4,group_size=64", "quantize.entropy:bits=4.0",
)  # fmt: skip


def one(name: str, text: str) -> None:
    """Walk the model with one lever and print what it took."""
    import yaml

    from pennyweight import calibrate
    from pennyweight.data import windows
    from pennyweight.lever import make, needs_of
    from pennyweight.model import load

    lever_name, _, options = text.partition(":")
    settings = {key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in options.split(",") if pair)}
    lever = make(lever_name, settings)
    model = load(name)
    ids = windows("wiki", model.tokenizer, part="calibration", count=32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blocks = [layer.name for layer in model.anatomy.layers() if layer.block is not None]
    group = getattr(lever, "solve_group", None)
    began = time.perf_counter()
    calibrate.walk(
        model, ids, None if group else lambda _, weight, statistics: lever.solve(weight, statistics),
        solve_group=None if group is None else lambda _, weights, statistics: group(weights, statistics[0]),
        needs=needs_of(lever) & {"second_moment", "absolute"}, only=blocks,
    )  # fmt: skip
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  {text:<44} {took:6.1f} s   peak {peak / 1024:6.0f} MiB (before {before / 1024:.0f})", flush=True)


def main() -> None:
    """Print one line a lever."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--levers", nargs="*", default=LEVERS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.model, asked.one)
        return
    print(f"{asked.model}, 32 windows of 512 tokens, blocks only", flush=True)
    for text in asked.levers:
        subprocess.run([sys.executable, __file__, asked.model, "--one", text], check=True)


if __name__ == "__main__":
    main()
