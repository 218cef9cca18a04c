"""Every way to round the weights of a model, beside rounding to nearest and GPTQ, in no more bytes than those take.

    python benchmarks/quantizers.py [--quick] [--models smollm2-135m ...] [--settings 4x64 ...] [--methods gptq awq ...]

A setting "4x64" is what 4-bit codes with a two-byte scale and a whole zero for every 64 inputs take: the budget of its
rows. A method of another overhead takes the group size that keeps within it; one that cannot use the bytes up (NF4, the
lattice) is printed with what it takes; the diagonals that AWQ cannot fold come on top. Calibration statistics are of
the unmodified model for all. Columns: bits stored a weight, perplexity over the original's on held-out text (encoders:
none), relative error of the outputs (logits, or last hidden states), and the seconds it took to solve. `--quick` rounds
four blocks and reads four windows.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
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
Options = dict[str, Any]


def budget(bits: int, group: int) -> float:
    """Bits a weight of codes, scale and whole zero."""
    return bits + (16 + bits) / group


def plain(bits: int, group: int) -> Options:
    return {"bits": bits, "group_size": group}


def float_zero(bits: int, group: int) -> Options:
    """Groups so much longer that a zero of two bytes fits."""
    return {"bits": bits, "group_size": 64 * math.ceil(group * 32 / (16 + bits) / 64)}


#: By name: the lever, and from bits and group size its options, or None where it has none so narrow or wide.
METHODS: dict[str, tuple[str, Callable[[int, int], Options | None]]] = {
    "rtn": ("quantize.rtn", plain),
    "rtn, searched": ("quantize.rtn", lambda b, g: plain(b, g) | {"search": 16}),
    "rtn, searched, weighted": ("quantize.rtn", lambda b, g: plain(b, g) | {"search": 16, "importance": "inputs"}),
    "gptq": ("quantize.gptq", plain),
    "gptq, searched, weighted": ("quantize.gptq", lambda b, g: plain(b, g) | {"search": 16, "importance": "inputs"}),
    "awq, unclipped": ("quantize.awq", lambda b, g: plain(b, g) | {"clip": False}),
    "awq": ("quantize.awq", plain),
    "hqq": ("quantize.hqq", float_zero),
    "nf4": ("quantize.nf4", lambda b, g: {} if b == 4 else None),
    "incoherence": ("quantize.incoherence", lambda b, g: {"bits": b} if b in (2, 4) else None),
    "bias correction": ("quantize.bias_correction", plain),
    "entropy": ("quantize.entropy", lambda b, g: {"bits": budget(b, g)}),
}


def run(model: Model, windows: Tensor) -> Tensor:
    """The first output on ``windows``, a few at a time."""
    with looking(model.module):
        return torch.cat([first_tensor(model.module(input_ids=part)) for part in windows.split(4)])


def loss(logits: Tensor, windows: Tensor) -> float:
    """Nats a token."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def compare(name: str, settings: list[str], methods: list[str], *, quick: bool) -> None:
    base = load(name)
    count, length = (4, 256) if quick else (16, 512)
    seen, fresh = (
        data.windows("wiki", base.tokenizer, part=part, length=min(length, 256), count=count, seed=0)
        for part in ("calibration", "heldout")
    )
    blocks = [layer for layer in base.anatomy.layers() if layer.block is not None]
    if quick:
        last = len(base.anatomy.blocks)
        blocks = [layer for layer in blocks if layer.block in (0, 1, last // 2, last - 1)]
    statistics = calibrate.collect(base, seen, needs={"second_moment", "absolute", "gradient"}, gradient_tokens=1024)
    wanted = run(base, fresh)
    causal = base.kind == "causal-lm"
    start = loss(wanted, fresh) if causal else 0.0
    weights = sum(layer.shape[0] * layer.shape[1] for layer in blocks)
    print(f"\n{name}: {len(blocks)} maps of {weights / 1e6:.1f} M weights; {fresh.numel()} held-out tokens")
    print(f"{'setting':8s} {'method':26s} {'bits':>6s} {'perplexity':>11s} {'outputs':>8s} {'seconds':>8s}", flush=True)
    for setting in settings:
        bits, group = map(int, setting.split("x"))
        for method in methods:
            lever_name, options = METHODS[method][0], METHODS[method][1](bits, group)
            if options is None:
                continue
            lever = make(lever_name, options)
            changed = replace(base, module=copy.deepcopy(base.module))
            before = time.perf_counter()
            try:
                if find(lever_name).reach == "model":
                    lever.change(changed, Work(model=changed, windows=seen, maps=tuple(blocks)))
                else:
                    for layer in blocks:
                        matrix = anatomy.matrix(base.module, layer).float()
                        solved = lever.solve(Dense(matrix), statistics[layer.name])
                        anatomy.replace(changed.module, layer.path, solved)
            except ValueError as error:  # a model without biases has none to correct
                print(f"{setting:8s} {method:26s} {str(error)[:80]}", flush=True)
                continue
            took = time.perf_counter() - before
            stored = sum(changed.module.get_submodule(layer.path).weight.cost().bytes for layer in blocks)
            found = run(changed, fresh)
            ratio = f"{math.exp(loss(found, fresh) - start):11.3f}" if causal else f"{'':11s}"
            error = float((found - wanted).norm() / wanted.norm())
            print(f"{setting:8s} {method:26s} {8 * stored / weights:6.3f} {ratio} {error:8.4f} {took:8.1f}", flush=True)


def main() -> None:
    """Print one table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--settings", nargs="*", default=SETTINGS, help='bits and group size, as "4x64"')
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="four blocks, four windows")
    asked = parser.parse_args()
    for name in asked.models:
        compare(name, asked.settings, asked.methods, quick=asked.quick)


if __name__ == "__main__":
    main()
