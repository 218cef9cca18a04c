"""Tokens a second of a fitted model beside its original, in plain `transformers` decoding, taken in turns.

    python benchmarks/decoding.py DIRECTORY [--original smollm2-135m] [--tokens 32] [--repeats 5]

Prefill of 128 tokens and greedy decoding, batch 1; the original in bfloat16 and in float32. Ratios of medians with
their 95 % intervals; the share is of what memory allows: bytes read a token over the bandwidth measured here.
"""

from __future__ import annotations

import argparse

import torch

from pennyweight.data import windows
from pennyweight.measure import decoding, roofline
from pennyweight.model import load
from pennyweight.weights import Weight


def main() -> None:
    """Print a line a rival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--original", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    fitted, original, half = load(asked.directory), load(asked.original), load(asked.original)
    half.module.to(torch.bfloat16)
    ids = windows("wiki", original.tokenizer, part="heldout", count=1)[0, :128]
    bandwidth = roofline.this_machine(torch.float32).bytes_per_second
    print(f"{torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s read")
    for name, rival in (("original, bfloat16", half), ("original, float32", original)):
        prefill, decode = decoding.compare(rival.module, fitted.module, ids, tokens=asked.tokens, repeats=asked.repeats)
        for what, found, count in (("prefill", prefill, len(ids)), ("decode", decode, 1)):
            before, after = found.first.seconds.value, found.second.seconds.value
            print(
                f"  {what:<8} {name:<20} {count / before:7.1f} tok/s, fitted {count / after:7.1f} tok/s; time x "
                f"{found.ratio.value:.3f} [{found.ratio.low:.3f}, {found.ratio.high:.3f}]"
            )
    read = sum(codes_read(part) for part in fitted.module.modules() if isinstance(part, Weight))
    limit = read / bandwidth / decode.second.seconds.value
    print(f"  codes read for a token: {read / 1e6:.1f} MB, {limit:.0%} of what memory allows")


def codes_read(weight: Weight) -> int:
    """Bytes of codes in memory; the coded stream they came from is not read."""
    return sum(held.nbytes for name, held in weight.named_buffers(recurse=False) if name in ("near", "packed", "codes"))


if __name__ == "__main__":
    main()
