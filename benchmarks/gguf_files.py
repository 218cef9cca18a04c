"""Our GGUF files beside llama.cpp's own quantizer, both run by llama.cpp: size, perplexity and speed.

    python benchmarks/gguf_files.py [--llama PYTHON] [--peers FOLDER] [--model smollm2-135m-permuted]
        [--types Q4_0 Q4_K_M Q3_K_M Q2_K] [--windows 16] [--out FILE] [--rates]

PYTHON is the interpreter of a virtual environment that has `llama-cpp-python`; without it one is made in FOLDER, or
found. Theirs is made from the float32 file at the library's defaults for the type, with the importance matrix of the
calibration windows (mean squared inputs, as its own tool computes it). Ours is planned for no more bytes than theirs
has (`fit --target gguf`): types by an integer program, each matrix solved on its grid with the statistics of the same
windows, written as they are. Both are judged on the same held-out tokens in llama.cpp's own arithmetic: ratios with 95
% intervals, paired over windows.

`--rates` compares decoding, ours and theirs in turn, at one and the same type for every tensor: the blocks of a type
take the same time whoever filled them. The default model is SmolLM2-135M with its channels permuted: the original
lies on a Q4_1 grid already, which a Q4_1 block would find again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peers import interpreter

from pennyweight.data import windows
from pennyweight.export import export
from pennyweight.export.targets import target
from pennyweight.fit import plan_and_solve
from pennyweight.job import Job, Settings, installed, quiet
from pennyweight.journal import Journal
from pennyweight.lever import find, make
from pennyweight.measure import stats
from pennyweight.model import anatomy, load
from pennyweight.model.model import Model
from pennyweight.statistics import Statistics
from pennyweight.task import task_of
from pennyweight.units import Budget
from pennyweight.weights import Dense

TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
QUANTIZE = """
import ctypes, sys
import llama_cpp, numpy as np
source, made, kind, matrix = sys.argv[1:]
held = {name: np.ascontiguousarray(found, dtype=np.float32) for name, found in np.load(matrix).items()}
entry = llama_cpp.llama_model_imatrix_data
listed = (entry * (len(held) + 1))()  # the last has no name
for index, (name, found) in enumerate(held.items()):
    listed[index] = entry(name.encode(), found.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), found.size)
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.imatrix = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind), listed
assert llama_cpp.llama_model_quantize(source.encode(), made.encode(), options) == 0
"""
JUDGE = """
import json, sys
import numpy as np, llama_cpp
ids = np.load(sys.argv[2])
model = llama_cpp.Llama(sys.argv[1], n_ctx=ids.shape[1], n_threads=int(sys.argv[3]), n_threads_batch=int(sys.argv[3]),
                        logits_all=True, verbose=False)
losses = []
for row in ids:
    model.reset()
    model.eval(row.tolist())
    logits = model.scores[: len(row) - 1].astype(np.float64)
    top = logits.max(1, keepdims=True)
    whole = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    losses.append(float((whole - logits[np.arange(len(row) - 1), row[1:]]).mean()))
print(json.dumps(losses))
"""
RATES = """
import json, sys, time
import numpy as np, llama_cpp
ids, threads = np.load(sys.argv[1])[0, :32].tolist(), int(sys.argv[2])
models = [llama_cpp.Llama(path, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
          for path in sys.argv[3:]]
rates = [[] for _ in models]
for _ in range(9):
    for model, found in zip(models, rates):
        model.reset()
        model.eval(ids)
        start = time.perf_counter()
        for _ in range(48):
            model.eval([model.sample(temp=0.0)])
        found.append(48 / (time.perf_counter() - start))
print(json.dumps(rates))
"""


def main() -> None:
    """Print a line a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="an interpreter that has llama_cpp")
    parser.add_argument("--peers", type=Path, help="make the environment of llama-cpp-python there, or find it")
    parser.add_argument("--model", default="smollm2-135m-permuted")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--statistics", type=int, default=32, help="calibration windows, of both")
    parser.add_argument("--out", type=Path, help="where the files go; kept")
    parser.add_argument("--rates", action="store_true", help="compare decoding instead, a type each for all tensors")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = asked.out or Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        job = _job(asked.model, asked.statistics, asked.windows, home)
        _calibrated(job, home)
        python = asked.llama or interpreter("llama", asked.peers or home)
        (_rates if asked.rates else _sizes)(job, python, asked.types, home)


def _job(name: str, statistics: int, heldout: int, home: Path) -> Job:
    model = load(name)
    return Job(
        model=model, task=task_of(model), data="wiki", budgets=(), floor=None, cards=(find("quantize.blocks"),),
        settings=Settings(statistics=statistics, heldout=heldout), journal=Journal.beside(home / "run"),
        progress=quiet, target=target("gguf"),
    )  # fmt: skip


def _calibrated(job: Job, home: Path) -> None:
    """The float32 file, the held-out tokens, and the importance matrix of the calibration windows."""
    if not (home / "f32.gguf").exists():
        export(job.model, "gguf", home / "f32.gguf", dtype="f32")
    np.save(home / "ids.npy", windows("wiki", job.model.tokenizer, part="heldout", count=job.settings.heldout).numpy())
    names = _names(job.model)
    moments = {names[key]: _diagonal(found) for key, found in job.statistics().items() if key in names}
    np.savez(home / "imatrix.npz", **moments)


def _names(model: Model) -> dict[str, str]:
    """The name in the file of each matrix of the blocks."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    return {
        layer.name: f"{table.get_name(layer.path)}.weight"
        for layer in model.anatomy.layers() if layer.block is not None
    }  # fmt: skip


def _diagonal(found: Statistics) -> np.ndarray:
    return found.need("second_moment", "gguf_files").diagonal().numpy()


def _made(python: str, home: Path, name: str) -> Path:
    """llama.cpp's own file of type ``name``."""
    made = home / f"theirs-{name}.gguf"
    subprocess.run(
        [python, "-c", QUANTIZE, str(home / "f32.gguf"), str(made), name, str(home / "imatrix.npz")], check=True,
        capture_output=True,
    )  # fmt: skip
    return made


def _sizes(job: Job, python: str, types: list[str], home: Path) -> None:
    def judged(file: Path) -> np.ndarray:
        done = subprocess.run(
            [python, "-c", JUDGE, str(file), str(home / "ids.npy"), str(torch.get_num_threads())], check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        return np.array(json.loads(done.stdout.splitlines()[-1]))

    plain = judged(home / "f32.gguf")
    print(f"float32: {(home / 'f32.gguf').stat().st_size / 1e6:.2f} MB, perplexity {np.exp(plain.mean()):.3f}\n")
    print("| class | file | MB | perplexity | ratio to float32 | ours / llama.cpp's |")
    print("|---|---|---|---|---|---|")
    for name in types:
        theirs = _made(python, home, name)
        ours = home / f"ours-{name}.gguf"
        size = theirs.stat().st_size
        solved = plan_and_solve(replace(job, budgets=(Budget.parse(f"{size}B"),)))
        with installed(job.model.module, solved.slots, solved.weights):
            export(job.model, "gguf", ours, overwrite=True)
        assert ours.stat().st_size <= size
        first, second = judged(ours), judged(theirs)
        for who, file, losses in (("llama.cpp", theirs, second), ("ours", ours, first)):
            between = _ratio(first, second) if who == "ours" else ""
            megabytes, perplexity = f"{file.stat().st_size / 1e6:.2f}", f"{np.exp(losses.mean()):.3f}"
            line = (name, who, megabytes, perplexity, _ratio(losses, plain))
            print(f"| {' | '.join((*line, between))} |", flush=True)


def _ratio(one: np.ndarray, other: np.ndarray) -> str:
    """Perplexity of ``one`` over that of ``other``, with its interval."""
    found = stats.paired_ratio(torch.tensor(other), torch.tensor(one))
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _rates(job: Job, python: str, types: list[str], home: Path) -> None:
    """Tokens a second of ours over theirs: every tensor of its type there; as planned, where that file is."""
    import gguf

    statistics, names = job.statistics(), _names(job.model)
    for name in types:
        theirs = _made(python, home, name)
        kinds = {found.name: found.tensor_type.name for found in gguf.GGUFReader(theirs).tensors}
        model, solved = load(job.model.name), {}
        for layer in model.anatomy.layers():
            kind = kinds[names.get(layer.name, "token_embd.weight")]
            lever = make("quantize.blocks", {"type": kind, "passes": 1, "search": 4})
            matrix, moment = Dense(anatomy.matrix(model.module, layer).detach()), statistics[layer.name]
            if layer.block is None:
                lever = make("quantize.rtn", {"bits": 8, "group_size": 32, "zero": "none"})
                assert kind == "Q8_0", kind
            solved[layer.path] = lever.solve(matrix, moment)
        anatomy.replace_all(model.module, solved)
        export(model, "gguf", home / f"same-{name}.gguf", overwrite=True)
        for made in (home / f"same-{name}.gguf", home / f"ours-{name}.gguf"):
            if made.exists():  # what was planned for the size of theirs mixes types, each with its own pace
                print(_compared(python, home, made, theirs), flush=True)


def _compared(python: str, home: Path, made: Path, theirs: Path) -> str:
    command = [python, "-c", RATES, str(home / "ids.npy"), "2", str(made), str(theirs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    first, second = (np.array(rates) for rates in json.loads(done.stdout.splitlines()[-1]))
    share = stats.paired_difference(torch.tensor(np.log(second)), torch.tensor(np.log(first)))
    low, middle, high = (float(np.exp(value)) for value in (share.low, share.value, share.high))
    rates = f"{np.median(first):.1f}, theirs {np.median(second):.1f} tokens a second"
    return f"{made.name}: {rates}, x {middle:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
