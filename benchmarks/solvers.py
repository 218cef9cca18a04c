"""How long the column solvers take beside plain loops: `python benchmarks/solvers.py [--large]`.

Prints one line a shape: the median seconds of the plain reference of tests/reference, of ours, and their ratio, on
the same tensors in turn; and the seconds to solve every linear map of a 30-block model of SmolLM2-135M's shapes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from pennyweight.levers.prune.sparsegpt import SparseGPT
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.solvers.factor import factorize
from pennyweight.statistics import Statistics
from pennyweight.weights import Dense

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference.gptq import gptq
from reference.sparsegpt import sparsegpt

#: Stacked heights of the maps that read one input, and its width: q+k+v, o, gate+up, down.
SMOLLM2 = (((576, 192, 192), 576), ((576,), 576), ((1536, 1536), 576), ((576,), 1536))


def problem(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A matrix and the second moment of correlated inputs of uneven size."""
    mix = torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(2 * width, width, generator=generator) @ mix * torch.rand(width, generator=generator).exp()
    return 0.02 * torch.randn(rows, width, generator=generator), inputs.T @ inputs / (2 * width)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(name: str, plain: Callable[[], object], ours: Callable[[], object], repeats: int) -> None:
    ours()
    pairs = [(seconds(plain), seconds(ours)) for _ in range(repeats)]
    slow, fast = (median(side) for side in zip(*pairs, strict=True))
    ratio = median(a / b for a, b in pairs)
    print(f"{name:34s} plain {slow:8.3f} s   ours {fast:8.3f} s   ratio {ratio:5.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="4096 x 4096 as well")
    large = parser.parse_args().large
    generator = torch.Generator().manual_seed(0)
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}")
    for rows, width in ((576, 1536), (1536, 576), *([(4096, 4096)] if large else [])):
        matrix, moment = problem(rows, width, generator)
        repeats = 3 if width > 2000 else 7

        def ours(lever: GPTQ | SparseGPT, matrix: Tensor = matrix, moment: Tensor = moment) -> object:
            # a new tensor each time: the factor is made, not remembered
            return lever.solve(Dense(matrix), Statistics(second_moment=moment.clone()))

        shape = f"{rows}x{width}"
        for act_order in (False, True):
            lever = GPTQ(act_order=act_order, static_groups=act_order)
            compare(
                f"gptq {shape}{' act_order' if act_order else ''}",
                lambda m=matrix, h=moment, a=act_order: gptq(
                    m, h, bits=4, group_size=128, act_order=a, static_groups=a
                ),
                lambda lever=lever: ours(lever),
                repeats,
            )
        for name, sparse, pattern in (
            ("50 %", SparseGPT(sparsity=0.5), None),
            ("2:4", SparseGPT(pattern="2:4"), (2, 4)),
        ):
            compare(
                f"sparsegpt {name} {shape}",
                lambda m=matrix, h=moment, p=pattern: sparsegpt(m, h, pattern=p),
                lambda lever=sparse: ours(lever),
                repeats,
            )
    groups = [([problem(rows, width, generator) for rows in heights], width) for heights, width in SMOLLM2]
    for lever in (
        GPTQ(group_size=64),
        GPTQ(group_size=64, search=16),
        SparseGPT(sparsity=0.5),
        SparseGPT(pattern="2:4"),
    ):

        def model(lever: GPTQ | SparseGPT = lever) -> None:
            for _ in range(30):
                for members, _ in groups:
                    statistics = Statistics(second_moment=members[0][1].clone())
                    lever.solve_group([Dense(matrix) for matrix, _ in members], statistics)

        print(f"30 blocks of SmolLM2-135M's shapes, {lever}: {seconds(model):.1f} s", flush=True)
    print(
        f"of that, factors: {30 * sum(seconds(lambda h=m[0][1]: factorize(h, damping=0.01)) for m, _ in groups):.1f} s"
    )


if __name__ == "__main__":
    main()
