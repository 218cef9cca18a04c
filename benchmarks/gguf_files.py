"""Our GGUF files beside llama.cpp's own quantizer, both run by llama.cpp: size, perplexity and speed of each type.

    python benchmarks/gguf_files.py --llama PYTHON [--model smollm2-135m] [--types Q4_0 Q5_0 Q8_0] [--windows 16]

PYTHON is the interpreter of a virtual environment that has `llama-cpp-python`. Ours are solved by `quantize.gptq` on
the very grid of the type (an importance-weighted search for scales), the embedding in Q8_0, written as they are;
theirs come from the float32 file, without an importance matrix. Ratios of perplexity to the float32 file on the same
held-out tokens, in llama.cpp's own arithmetic, with 95 % intervals over windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from pennyweight.apply import apply
from pennyweight.data import windows
from pennyweight.export import export
from pennyweight.measure import stats
from pennyweight.model import load
from pennyweight.recipe import Recipe

GRID = {
    "Q4_0": "bits: 4, group_size: 32, zero: none",
    "Q5_0": "bits: 5, group_size: 32, zero: none",
    "Q8_0": "bits: 8, group_size: 32, zero: none",
}
RECIPE = """pennyweight: 1
steps:
- quantize.rtn: {{bits: 8, group_size: 32, zero: none}}
  where: "*embed_tokens"
- quantize.gptq: {{{grid}, search: 40, importance: inputs}}
  where: "*_proj"
"""
QUANTIZE = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
options.token_embedding_type = options.output_tensor_type = 8  # Q8_0, as in ours
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), options) == 0
"""
RUN = """
import json, sys, time
import numpy as np, llama_cpp
ids = np.load(sys.argv[2])
model = llama_cpp.Llama(sys.argv[1], n_ctx=ids.shape[1], n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)
losses = []
for row in ids:
    model.reset()
    model.eval(row.tolist())
    logits = model.scores[: len(row) - 1].astype(np.float64)
    top = logits.max(1, keepdims=True)
    whole = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    losses.append(float((whole - logits[np.arange(len(row) - 1), row[1:]]).mean()))
del model
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False)
rates = []
for _ in range(4):
    model.reset()
    model.eval(ids[0, :32].tolist())
    start = time.perf_counter()
    for _ in range(64):
        model.eval([model.sample(temp=0.0)])
    rates.append(64 / (time.perf_counter() - start))
print(json.dumps({"losses": losses, "decode": max(rates)}))
"""


def main() -> None:
    """Print a line a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, help="an interpreter that has llama_cpp")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--types", nargs="+", default=list(GRID), choices=list(GRID))
    parser.add_argument("--windows", type=int, default=16)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home, source = Path(folder), load(asked.model)
        ids = windows("wiki", source.tokenizer, part="heldout", count=asked.windows)
        np.save(home / "ids.npy", ids.numpy())
        export(source, "gguf", home / "f32.gguf", dtype="f32")

        def judged(file: Path) -> tuple[np.ndarray, float, int]:
            done = subprocess.run(
                [asked.llama, "-c", RUN, str(file), str(home / "ids.npy")], check=True, capture_output=True, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            return np.array(found["losses"]), found["decode"], file.stat().st_size

        plain, rate, size = judged(home / "f32.gguf")
        print(f"{'float32':22} {size / 1e6:6.1f} MB  perplexity {np.exp(plain.mean()):.3f}, {rate:.1f} tokens a second")
        for name in asked.types:
            apply(source, Recipe.parse(RECIPE.format(grid=GRID[name])), out=home / name)
            export(load(home / name), "gguf", home / f"ours-{name}.gguf")
            theirs = home / f"theirs-{name}.gguf"
            subprocess.run(
                [asked.llama, "-c", QUANTIZE, str(home / "f32.gguf"), str(theirs), name],
                check=True, capture_output=True,
            )  # fmt: skip
            for who, file in (("ours", home / f"ours-{name}.gguf"), ("llama.cpp's", theirs)):
                losses, rate, size = judged(file)
                found = stats.paired_difference(torch.tensor(losses), torch.tensor(plain))
                low, middle, high = (float(np.exp(one)) for one in (found.low, found.value, found.high))
                ratio = f"x {middle:.4f} [{low:.4f}, {high:.4f}]"
                print(f"{name} {who:17} {size / 1e6:6.1f} MB  {ratio}, {rate:.1f} tokens a second", flush=True)


if __name__ == "__main__":
    main()
