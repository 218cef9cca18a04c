"""Speed of whole engines on one model, each in a process of its own: plain `transformers`, ours, torchao, llama.cpp.

    python benchmarks/engines.py [--fitted DIRECTORY] [--peers FOLDER] [--torchao PYTHON] [--llama PYTHON]
                                 [--rounds 3] [--only WORD ...]

FOLDER is where environments with torchao and llama-cpp-python are made, or lie from an earlier run; PYTHON is the
interpreter of one that has the rival. Rivals without either are left out. A prompt of 128 tokens (and one of 512, but
for the compiled model, which would be compiled once more) and 64 tokens after it, greedy, batch 1; all but llama.cpp
through `generate`. Rounds go through all rivals in turn; the median is shown, with the extremes. "share" is of what
memory allows: bytes of weights read a token over the bandwidth measured here. Load is from the call to the model in
memory, files in the page cache, and once more in the same process; peak is of the process. Weights are rounded to
nearest: this is about speed alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peers import interpreter

from pennyweight.export import export
from pennyweight.measure import roofline
from pennyweight.model import Model, anatomy, load, save
from pennyweight.weights import LowRank, Quantized, Sum, Weight

PEAK = """
import json, sys, time
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
"""
GENERATE = """
import torch
short, long = torch.arange(1000, 1128)[None], torch.arange(1000, 1512)[None]
def opened(dtype):
    taken = []
    for _ in range(2):
        model = None
        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()
        taken.append(time.perf_counter() - start)
    return *taken, model
def run(count, ids=short, **options):
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    return time.perf_counter() - start
def measure(both=True, **options):
    start = time.perf_counter()
    run(4, **options), run(4, **options)
    warm = time.perf_counter() - start
    first = min(run(1, **options) for _ in range(5))
    longer = min(run(1, long, **options) for _ in range(4)) if both else float("nan")
    decode = (min(run(65, **options) for _ in range(2)) - first) / 64
    print(json.dumps({"load": loaded, "again": again, "warm": warm, "prefill": 128 / first, "longer": 512 / longer,
                      "decode": 1 / decode, "peak": peak()}))
"""
PLAIN = """
import transformers
loaded, again, model = opened(torch.bfloat16)
measure()
"""
OURS = """
import transformers, pennyweight
loaded, again, model = opened(torch.float32)
measure()
"""
TORCHAO = """
import transformers
from torchao.quantization import quantize_
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # tied, it would be skipped
quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=64))
loaded, again = time.perf_counter() - start, float("nan")
if sys.argv[2] == "compile":
    model.forward = torch.compile(model.forward)
    measure(both=False, cache_implementation="static")
else:
    measure()
"""
LLAMA = """
import llama_cpp
start = time.perf_counter()
model = llama_cpp.Llama(sys.argv[1], n_ctx=640, n_threads=2, n_threads_batch=2, verbose=False)
loaded = time.perf_counter() - start
def run(count, prompt=128):
    model.reset()
    start = time.perf_counter()
    model.eval(list(range(1000, 1000 + prompt)))
    first = time.perf_counter() - start
    for _ in range(count):
        model.eval([model.sample(temp=0.0)])
    return first, (time.perf_counter() - start - first) / count
start = time.perf_counter()
run(2)
warm = time.perf_counter() - start
runs = [run(64) for _ in range(3)]
longer = min(run(1, 512)[0] for _ in range(3))
print(json.dumps({"load": loaded, "again": float("nan"), "warm": warm, "longer": 512 / longer,
                  "prefill": 128 / min(a for a, _ in runs),
                  "decode": 1 / min(b for _, b in runs), "peak": peak()}))
"""


def grid(bits: int, group: int = 64, **options: str) -> Callable[[torch.Tensor], Weight]:
    """Rounds to nearest."""
    return lambda matrix: Quantized.nearest(matrix, bits=bits, group_size=group, **options)  # type: ignore[arg-type]


def corrected(matrix: torch.Tensor) -> Weight:
    """Four bits and a correction of rank 16."""
    first = grid(4)(matrix)
    return Sum(first, LowRank.nearest((matrix - first.dense()), 16).to(torch.bfloat16))


FORMS = {
    "8 bits g64": grid(8), "4 bits g64": grid(4), "4 bits g64 + rank 16": corrected, "3 bits g64": grid(3),
    "2 bits g64": grid(2),
}  # fmt: skip


def rounded(source: Model, form: Callable[[torch.Tensor], Weight], head: Callable[[torch.Tensor], Weight]) -> Model:
    """``source`` with its blocks' maps in ``form`` and its embedding in ``head``."""
    made = copy.deepcopy(source)
    embedding = source.module.get_submodule("model.embed_tokens").weight.detach()
    weights = {"model.embed_tokens": head(embedding)}
    for one in anatomy.of(made.module).maps():
        if one.block is not None:
            weights[one.path] = form(made.module.get_submodule(one.path).weight.detach())
    anatomy.replace_all(made.module, weights)
    return made


def held(directory: Path) -> int:
    """Bytes of the files that hold weights."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.suffix in (".safetensors", ".gguf"))


def main() -> None:
    """Print a line a rival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--fitted", help="a directory that `pennyweight fit` wrote")
    parser.add_argument("--torchao", help="an interpreter that has torchao")
    parser.add_argument("--llama", help="an interpreter that has llama_cpp")
    parser.add_argument("--peers", type=Path, help="make the environments of both there, or find them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rivals whose names have one of these")
    asked = parser.parse_args()
    if asked.peers:
        asked.torchao = asked.torchao or interpreter("torchao", asked.peers)
        asked.llama = asked.llama or interpreter("llama", asked.peers)
    bandwidth = roofline.this_machine(torch.float32).bytes_per_second
    with tempfile.TemporaryDirectory() as folder:
        home, source = Path(folder), load(asked.model)
        export(source, "safetensors", home / "plain", dtype="bf16")
        rivals: dict[str, tuple[list[str], int]] = {}

        def wanted(name: str) -> bool:
            return not asked.only or any(word in name for word in asked.only)

        def add(name: str, python: str, code: str, where: Path, read: int, *more: str) -> None:
            rivals[name] = ([python, "-c", PEAK + code, str(where), *more], read)

        plain = held(home / "plain")
        add("transformers bfloat16", sys.executable, GENERATE + PLAIN, home / "plain", plain)
        if asked.fitted:
            whole = sum(part.numel() for part in source.module.parameters())  # codes are a byte each in memory
            add("fitted", sys.executable, GENERATE + OURS, Path(asked.fitted), whole)
        for name, form in FORMS.items():
            if not wanted(name):
                continue
            where = home / name.replace(" ", "-")
            save(rounded(source, form, grid(8)), where)
            add(name, sys.executable, GENERATE + OURS, where, held(where))
        if wanted("24 of 30 blocks, 4 bits g64"):
            shrunk = rounded(source, grid(4), grid(8))
            del shrunk.module.model.layers[24:]  # type: ignore[union-attr]  # a Llama has them
            shrunk.module.config.num_hidden_layers = 24
            save(shrunk, home / "shrunk")
            add("24 of 30 blocks, 4 bits g64", sys.executable, GENERATE + OURS, home / "shrunk", held(home / "shrunk"))
        if asked.torchao:
            bits = source.module.num_parameters() * 9 // 16  # a scale and a zero in bfloat16 for 64 weights
            add("torchao int4 g64", asked.torchao, GENERATE + TORCHAO, home / "plain", bits, "eager")
            add("torchao int4 g64, compiled", asked.torchao, GENERATE + TORCHAO, home / "plain", bits, "compile")
        if asked.llama:
            for name, code, options in (
                ("llama.cpp Q8_0", 8, {"symmetric": True}),
                ("llama.cpp Q4_0", 4, {"symmetric": True}),
                ("llama.cpp Q4_1", 4, {"zero_kind": "float"}),
            ):
                where = home / name.replace(" ", "-")
                where.mkdir()
                made = rounded(source, grid(code, 32, **options), grid(8, 32, symmetric=True))  # type: ignore[arg-type]
                export(made, "gguf", where / "model.gguf")
                add(f"{name} (our file)", asked.llama, LLAMA, where / "model.gguf", held(where))
        rivals = {name: one for name, one in rivals.items() if name in list(rivals)[:1] or wanted(name)}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in rivals}
        print(f"{torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s read; tokens a second, median (extremes)")
        for _ in range(asked.rounds):
            for name, (command, _read) in rivals.items():
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {found[name][-1]}", file=sys.stderr)
    first = None
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        first = first or middle
        rates = [run["decode"] for run in runs]
        share = middle["decode"] * rivals[name][1] / bandwidth
        print(
            f"{name:28} {rivals[name][1] / 1e6:6.1f} MB  decode {middle['decode']:6.1f} ({min(rates):.1f} to "
            f"{max(rates):.1f}), x {middle['decode'] / first['decode']:.2f}, {share:4.0%} of the limit; prefill "
            f"{middle['prefill']:6.0f}, x {middle['prefill'] / first['prefill']:.2f}, of 512 tokens "
            f"{middle['longer']:6.0f}, x {middle['longer'] / first['longer']:.2f}; "
            f"load {middle['load']:.2f} s, again {middle['again']:.2f} s, "
            f"warm-up {middle['warm']:.1f} s, peak {middle['peak']:.0f} MB"
        )


if __name__ == "__main__":
    main()
