"""A report with every section filled: invented numbers of the size that a small language model has."""

from __future__ import annotations

import random

from pennyweight.report import Cell, Figure, Measure, Point, Prediction, ReportData, Sample, Step

_SHAPES = {
    "attention.query": (576, 576),
    "attention.key": (192, 576),
    "attention.value": (192, 576),
    "attention.output": (576, 576),
    "ffn.gate": (1536, 576),
    "ffn.up": (1536, 576),
    "ffn.down": (576, 1536),
}


def cells() -> list[Cell]:
    """Thirty blocks of seven matrices, an embedding and a few norms."""
    draw = random.Random(0)
    found = [
        Cell(
            block=None,
            role="embedding",
            params=49152 * 576,
            bytes=15_482_880,
            lever="quantize.embedding bits 4, group_size 64",
        ),
        Cell(block=None, role="norms", params=61 * 576, bytes=61 * 576 * 2),
    ]
    for block in range(30):
        for role, (rows, columns) in _SHAPES.items():
            params = rows * columns
            bits = draw.choice((2, 3, 3, 4)) + (role == "attention.value") + (block in (0, 29))
            rank = 8 if role == "ffn.down" and block % 7 == 3 else None
            sparsity = 0.5 if role == "ffn.up" and 12 <= block < 15 else 0.0
            stored = params * bits // 8 + 3 * params // 64 + (rank or 0) * (rows + columns) * 2
            lever = f"quantize.gptq bits {bits}, group_size 64"
            found.append(
                Cell(block=block, role=role, params=params, bytes=stored, rank=rank, sparsity=sparsity, lever=lever)
            )
    found[-1] = Cell(block=29, role="ffn.down", params=884_736, bytes=2 * 884_736)
    return found


def example() -> ReportData:
    draw = random.Random(1)

    def curve(size: float) -> float:
        return 1 + 0.225 * (67.3e6 / size) ** 3.2

    candidates = [draw.uniform(48e6, 104e6) for _ in range(40)]
    sizes = (48e6, 53e6, 58e6, 62.5e6, 72e6, 78e6, 85e6, 93e6, 101e6)
    points = [Point(bytes=67_299_112, ratio=1.2254, kind="chosen")]
    points += [Point(bytes=int(s), ratio=curve(s), kind="frontier", predicted=True) for s in sizes]
    points += [
        Point(bytes=int(s), ratio=curve(s) * draw.uniform(1.01, 1.35), kind="candidate", predicted=True)
        for s in candidates
    ]
    points += [
        Point(bytes=89_100_000, ratio=1.107, kind="reference", label="4-bit non-linear"),
        Point(bytes=86_400_000, ratio=1.193, kind="reference", label="2-bit mix"),
        Point(bytes=78_000_000, ratio=2.31, kind="reference", label="uniform GPTQ 3 bit"),
        Point(bytes=78_000_000, ratio=49.0, kind="reference", label="uniform RTN 3 bit"),
    ]
    recipe = """\
# pennyweight recipe
version: 1
model: smollm2-135m
steps:
  - quantize.embedding: {bits: 4, group_size: 64}
  - quantize.gptq:
      layers: "*.mlp.*"
      bits: 3
      group_size: 64
      order: activation
  - quantize.gptq: {layers: "*.self_attn.*", bits: 4, group_size: 64}
"""
    return ReportData(
        model="smollm2-135m",
        original_bytes=269_030_016,
        fitted_bytes=67_299_112,
        budget="25%",
        budget_bytes=67_299_840,
        quality=Figure(value=1.2254, low=1.209, high=1.243),
        floor=1.3,
        floor_holds=True,
        verdict="Perplexity stays under 1.30 times the original at 95 % confidence: upper limit 1.239 over 64 windows "
        "of 512 tokens; a difference of 0.014 would have been seen.",
        measures=[
            Measure(
                name="Perplexity",
                before=Figure(value=18.42, low=17.1, high=19.9),
                after=Figure(value=22.57, low=20.9, high=24.4),
                ratio=Figure(value=1.2254, low=1.209, high=1.243),
                note="held-out Wikipedia text, 64 windows of 512 tokens",
            ),
            Measure(
                name="Loss",
                unit="nats",
                before=Figure(value=2.913, low=2.84, high=2.99),
                after=Figure(value=3.117, low=3.04, high=3.19),
                ratio=Figure(value=1.07, low=1.065, high=1.075),
                note="the same windows",
            ),
            Measure(
                name="Files",
                unit="bytes",
                before=Figure(value=269_030_016),
                after=Figure(value=67_299_112),
                ratio=Figure(value=0.25015),
            ),
            Measure(
                name="KV cache a token",
                unit="bytes",
                before=Figure(value=23_040),
                after=Figure(value=23_040),
                ratio=Figure(value=1.0),
            ),
            Measure(
                name="Latency of one token",
                unit="ms",
                before=Figure(value=21.4, low=21.1, high=21.9),
                after=Figure(value=17.9, low=17.6, high=18.4),
                ratio=Figure(value=0.836, low=0.82, high=0.86),
                note="2 threads, medians, interleaved",
            ),
            Measure(name="Top-1 agreement", unit="%", after=Figure(value=81.3, low=80.6, high=82.0)),
        ],
        points=points,
        cells=cells(),
        predictions=[
            Prediction(name="Files", unit="bytes", predicted=67_299_112, measured=67_299_112),
            Prediction(name="Loss increase on new text", unit="nats", predicted=0.171, measured=0.2033),
            Prediction(name="Time", unit="s", predicted=214, measured=188.3),
            Prediction(name="Peak memory", unit="bytes", predicted=2.1e9, measured=2.31e9),
            Prediction(name="Tokens a second", predicted=23, measured=55.9),
        ],
        samples=[
            Sample(
                prompt="The lighthouse keeper climbed the stairs and",
                before=" opened the door. The light was on, and the keeper could see the sea, grey and quiet under a "
                "sky that had not made up its mind.",
                after=" opened the door. The light was on, and he saw the ship at once: it lay on its side, and the "
                "water around it was still.",
            ),
            Sample(
                prompt="def mean(values):\n    ",
                before='"""Return the mean of a list of numbers."""\n    return sum(values) / len(values)',
                after='"""Return the mean of a list of numbers."""\n    return sum(values) / len(values)',
            ),
        ],
        steps=[
            Step(name="measure", seconds=31.2, peak_bytes=1_420_000_000),
            Step(name="calibrate", seconds=44.9, peak_bytes=2_310_000_000),
            Step(name="plan", seconds=2.8, peak_bytes=1_900_000_000),
            Step(name="apply", seconds=97.0, peak_bytes=2_200_000_000),
            Step(name="verify", seconds=12.4),
        ],
        recipe=recipe,
        receipt=[
            ("model", "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"),
            ("data", "sha256:60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752 (wiki, seed 0)"),
            ("recipe", "sha256:fd61a03af4f77d870fc21e05e7e80678095c92d808cfb3b5c279ee04c74aca13"),
            ("plan", "optimal, gap 0.0 %, 210 matrices, 12 options each, solved in 0.8 s"),
            ("versions", "pennyweight 0.1.0, torch 2.13.0, transformers 5.23.0, python 3.11.9"),
        ],
        notes=["Two plans were statistically equal; the simpler one was taken."],
        created="2 May 2025, 14:03 UTC",
        version="0.1.0",
    )
