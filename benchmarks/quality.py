"""Perplexity against the bytes of the written files: `fit` beside uniform RTN and GPTQ of the same or larger size.

    python benchmarks/quality.py [MODEL ...] [--shares 0.25 0.2 ...] [--json FILE] [--keep DIR] [--repair 10min]

Every row of a model is scored on the same held-out windows in one process, ratios paired by window. Rows of llama.cpp
and other tools are quoted from a run on the same class of machine over another slice of the same text, and marked so.
With --keep a run that was cut off goes on where it was; the JSON is written row by row.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from pennyweight.apply import run
from pennyweight.fit import plan_and_solve, with_exact_bytes
from pennyweight.job import Job, Settings, chosen_levers, standing_in
from pennyweight.journal import Journal
from pennyweight.model import bf16_bytes, load
from pennyweight.recipe import Recipe
from pennyweight.repair import repair
from pennyweight.task import task_of
from pennyweight.units import Budget, parse_seconds

#: bits, group of the blocks; bits, group of the embedding. Each is at least as large as the fit it stands beside.
UNIFORM = {0.25: (4, 64, 4, 64), 0.20: (3, 64, 4, 64), 0.15: (2, 32, 4, 64), 0.125: (2, 64, 3, 64)}
QUOTED = {
    "Q4_K_M + imatrix (llama.cpp)": (103_700_000, 1.035),
    "IQ4_XS + imatrix (llama.cpp)": (89_100_000, 1.107),
    "Q2_K + imatrix (llama.cpp)": (86_400_000, 1.193),
    "W4 g64 GPTQ (llm-compressor)": (114_000_000, 1.201),
}


def recipe(lever: str, bits: int, group: int, table_bits: int, table_group: int) -> Recipe:
    """One width for all blocks, another for the table."""
    return Recipe.parse(
        "pennyweight: 1\nsteps:\n"
        f"- {lever}: {{bits: {bits}, group_size: {group}}}\n"
        "  where: ['*', '!role:embedding', '!role:head']\n"
        f"- quantize.rtn: {{bits: {table_bits}, group_size: {table_group}}}\n"
        "  where: ['role:embedding', 'role:head']\n",
        source=f"{lever} W{bits} g{group}, table W{table_bits} g{table_group}",
    )


def main() -> None:
    """Print the table of every model, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "smollm2-135m-permuted"])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.385, 0.33, 0.32, *UNIFORM])
    parser.add_argument(
        "--rough", action="store_true", help="score with bfloat16 products: twice as fast, within 0.2 %%"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="directory of the journal; what is there is not computed again")
    parser.add_argument("--repair", type=parse_seconds, help="time of a repair, which gets a row below its fit")
    asked = parser.parse_args()
    found = []
    for name in asked.models:
        model = load(name)
        size = bf16_bytes(model)
        with nullcontext(asked.keep / name) if asked.keep else TemporaryDirectory() as folder:
            job = Job(
                model=model, task=task_of(model), data="wiki", budgets=(), floor=None, cards=chosen_levers(None, ()),
                settings=Settings(), journal=Journal(folder), progress=lambda *_: None,
            )  # fmt: skip
            before = job.scores("original", "original", model.module, job.heldout, exact=not asked.rough)
            print(f"\n{name}: {size:,} bytes in bf16, perplexity {job.task.figure(before):.3f}", flush=True)
            for share in asked.shares:
                rows = []
                job.budgets = (Budget.parse(f"{100 * share:g}%"),)
                began = time.perf_counter()
                solved = plan_and_solve(job, mending=asked.repair is not None)
                rows.append(
                    (f"fit {share:.1%}", solved, time.perf_counter() - began, job.task.effect_of(solved.predicted))
                )
                if asked.repair is not None:
                    began = time.perf_counter()
                    mended = with_exact_bytes(job, repair(job, solved, asked.repair))
                    print(f"  {mended.notes[-1]}", flush=True)
                    rows.append((f"fit {share:.1%}, repaired", mended, time.perf_counter() - began, None))
                for lever in ("quantize.rtn", "quantize.gptq") if share in UNIFORM else ():
                    began = time.perf_counter()
                    made = run(job, recipe(lever, *UNIFORM[share]))
                    rows.append((made.recipe.source, made, time.perf_counter() - began, None))
                for title, each, seconds, predicted in rows:
                    with standing_in(model.module, each.slots, each.weights, each.tensors):
                        after = job.scores("fit", each.digest, model.module, job.heldout, exact=not asked.rough)
                    ratio = job.task.effect(before, after)
                    said = "" if predicted is None else f", predicted {predicted:.4f}"
                    print(
                        f"  {title:<46} {each.spent['bytes']:>12,} B {each.spent['bytes'] / size:6.1%}  "
                        f"x {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]  {seconds:5.0f} s{said}",
                        flush=True,
                    )
                    found.append(
                        {"model": name, "row": title, "bytes": each.spent["bytes"], "ratio": ratio.value,
                         "low": ratio.low, "high": ratio.high, "seconds": seconds, "predicted": predicted}
                    )  # fmt: skip
                    if asked.json:
                        asked.json.write_text(json.dumps(found, indent=2))
            for title, (bytes_, quoted) in QUOTED.items():
                print(f"  {title:<46} {bytes_:>12,} B {bytes_ / size:6.1%}  x {quoted:.3f}  (quoted, unpermuted model)")


if __name__ == "__main__":
    main()
