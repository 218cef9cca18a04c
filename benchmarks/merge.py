"""Merging on disk beside a plain loop and mergekit: `python benchmarks/merge.py [--peers FOLDER] [--dtype bfloat16]`.

FOLDER is where an environment with mergekit is made, or lies from an earlier run.

Makes a base and two models of SmolLM2-135M's shapes (or as large as --gigabytes says, in shards), merges them by each
method in a process of its own, and prints seconds, GB/s of everything read and written once (inputs, the base where one
is read, the result), and peak resident memory, also beyond the largest tensor. Files are read before, so that all start
from the same page cache.

It fails (exit code 1) where the result differs from mergekit's by more than rounding, where it depends on how inputs
or outputs are cut into shards, or where it takes 600 MB more than the largest tensor. Rounding: half a unit in the last
place (ulp) of the largest number involved for each operation that is rounded: of the checkpoints' dtype, in which
mergekit computes unless it is told otherwise; it is then run once more in float32. Where a difference to the base is,
up to that rounding, the one that TIES trims at, or two of them cancel, rounding decides (and a sort keeps any of those
that are equal, ours all): there mergekit must have what one of the choices gives. The angle of SLERP is known to fewer
digits than float32 has: there ours must be no further from float64's result than mergekit's is. DARE is not compared:
its draws are random, and mergekit scales what is left by norms instead of chances.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import torch
from peers import interpreter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DENSITY = 0.5
RECIPES = {
    "linear": "merge: linear\nmodels: [a, b]",
    "slerp": "merge: slerp\nmodels: [a, b]",
    "task_arithmetic": "merge: task_arithmetic\nbase: base\nmodels: [a, b]",
    "ties": f"merge: ties\noptions: {{density: {DENSITY}}}\nbase: base\nmodels: [a, b]",
    "dare_ties": f"merge: dare\noptions: {{density: {DENSITY}, sign: ties}}\nbase: base\nmodels: [a, b]",
}
#: How many operations on a result are rounded to the dtype of the files, mergekit's and ours together.
ROUNDINGS = {"linear": 2, "slerp": 2, "task_arithmetic": 5, "ties": 6}
MOST_MEGABYTES = 600
BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
PEAK = """
def peak():
    with open("/proc/self/status") as file:  # of this program alone; getrusage counts what its parent had, too
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
"""
OURS = """
import sys, time
from pennyweight.merge import merge
begin = peak()
start = time.perf_counter()
merge(sys.argv[1], out=sys.argv[2])
print(time.perf_counter() - start, begin, peak())
"""
PLAIN = """
import sys, time, torch
from safetensors import safe_open
from safetensors.torch import save_file
home, method = sys.argv[1].rsplit("/", 1)
begin = peak()
start = time.perf_counter()
base, a, b = (safe_open(f"{home}/{n}/model.safetensors", "pt") for n in ("base", "a", "b"))
out = {}
for name in a.keys():
    x, y = a.get_tensor(name), b.get_tensor(name)
    if method == "linear":
        out[name] = (x + y) / 2
        continue
    z = base.get_tensor(name)
    deltas = torch.stack([x - z, y - z])
    for delta in deltas:
        size = delta.abs()
        delta *= size >= size.flatten().kthvalue(size.numel() - int(0.5 * size.numel()) + 1).values
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = (deltas * sign) > 0
    out[name] = (z + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)).to(x.dtype)
import os
os.makedirs(sys.argv[2])
save_file(out, sys.argv[2] + "/model.safetensors")
print(time.perf_counter() - start, begin, peak())
"""
MERGEKIT = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run([sys.argv[3], sys.argv[1], sys.argv[2], "--lazy-unpickle", "--copy-tokenizer"], check=True,
               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(time.perf_counter() - start, 0, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def make(home: Path, layers: int, shard_layers: int, dtype: torch.dtype) -> tuple[int, int]:
    """Write base, a and b, ``shard_layers`` layers a file; the bytes of one, and of its largest tensor."""
    g = torch.Generator().manual_seed(0)
    block = {f"self_attn.{p}_proj": (r, 576) for p, r in (("q", 576), ("k", 192), ("v", 192), ("o", 576))}
    block |= {"mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536)}
    block |= {"input_layernorm": (576,), "post_attention_layernorm": (576,)}
    outside = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    # past 30 layers they repeat, in other files: drawing gigabytes of numbers would take longer than merging them
    drawn = min(layers, 30)
    shapes = outside | {f"model.layers.{n}.{key}.weight": shape for n in range(drawn) for key, shape in block.items()}
    base = {name: 0.02 * torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "vocab_size": 49152},
        **{"num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536},
        **{"tie_word_embeddings": True, "torch_dtype": str(dtype)[6:]},
    }
    size = 0
    for name in ("base", "a", "b"):
        noise = 0.0 if name == "base" else 0.001  # enough for two models not to count as parallel in slerp
        tensors = {key: (one + noise * torch.randn(one.shape, generator=g)).to(dtype) for key, one in base.items()}
        shards = [{key: tensors[key] for key in outside}]
        for first in range(0, layers, shard_layers):
            shards.append({})
            for n in range(first, min(first + shard_layers, layers)):
                shards[-1] |= {
                    f"model.layers.{n}.{k}.weight": tensors[f"model.layers.{n % drawn}.{k}.weight"] for k in block
                }
        if layers <= shard_layers:
            shards = [shards[0] | shards[1]]
        write(home / name, shards, config)
        size = sum(file.stat().st_size for file in (home / name).glob("*.safetensors"))
    return size, max(one.numel() for one in base.values()) * dtype.itemsize


def write(directory: Path, shards: list[dict[str, Tensor]], config: Mapping[str, object]) -> None:
    """A checkpoint as `transformers` lays it out."""
    directory.mkdir(parents=True)
    where = {}
    for n, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
        # copies: save_file refuses what shares memory
        save_file({key: one.clone() for key, one in shard.items()}, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps(config))


def tensors_of(directory: Path) -> dict[str, Path]:
    """The file of every tensor."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def read(files: Mapping[str, Path], name: str) -> Tensor:
    """One tensor."""
    with safe_open(files[name], "pt") as opened:
        found: Tensor = opened.get_tensor(name)
    return found


def ulp(size: Tensor, bits: int) -> Tensor:
    """The distance of neighboring numbers of ``bits`` bits behind the point at ``size`` (n,) float64."""
    return torch.exp2(size.clamp_min(1e-30).log2().floor() - bits)


def ties_of(base: Tensor, deltas: Tensor, kept: Tensor, slack: Tensor, lean: float) -> Tensor:
    """TIES of deltas (E, n) of which ``kept`` (E, n) are not trimmed; sums up to ``slack`` (n,) have sign ``lean``."""
    left = deltas * kept
    total = left.sum(0)
    sign = torch.where(total.abs() <= slack, lean, total.sign())
    agree = left.sign() == sign
    return base + (left * agree).sum(0) / agree.sum(0).clamp(min=1)


def difference(method: str, home: Path, ours: Path, theirs: Path, computed: torch.dtype) -> tuple[float, float, float]:
    """How far two results are apart.

    Returns:
        In ulps of ``computed``, in which mergekit computed; in those of bfloat16; and the share of elements at which
        rounding decides in TIES.
    """
    sources = {name: tensors_of(home / name) for name in ("base", "a", "b")}
    one, two = tensors_of(ours), tensors_of(theirs)
    assert one.keys() == two.keys() == sources["a"].keys(), "the results have other tensors"
    worst, coarse, open_, count = 0.0, 0.0, 0, 0
    for name in one:
        x, y = read(one, name), read(two, name)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{name}: {x.dtype} {tuple(x.shape)}, {y.dtype}"
        bits = min(BITS[x.dtype], BITS[computed])
        x, y = x.double().flatten(), y.double().flatten()
        base, a, b = (read(sources[source], name).double().flatten() for source in ("base", "a", "b"))
        away = (x - y).abs()
        if method == "ties":
            deltas = torch.stack([a - base, b - base])
            keep = max(1, int(DENSITY * x.numel()))
            least = deltas.abs().kthvalue(x.numel() - keep + 1, dim=1, keepdim=True).values
            # coarse arithmetic rounds differences to either side of the threshold, and sums to nothing
            eps = 2.0 ** -(BITS[computed] - 1 if computed != torch.float32 else 20)
            either = (deltas.abs() - least).abs() <= eps * least
            slack = eps * deltas.abs().amax(0)
            at = either.any(0) | (deltas.sum(0).abs() <= slack)
            open_ += int(at.sum())
            some, surely = deltas[:, at], (deltas.abs() >= least)[:, at]
            for *choice, lean in product((False, True), (False, True), (-1.0, 1.0)):
                kept = torch.where(either[:, at], torch.tensor(choice)[:, None], surely)
                away[at] = torch.minimum(away[at], (ties_of(base[at], some, kept, slack[at], lean) - y[at]).abs())
        size = torch.stack([x, y, base, a, b]).abs().amax(0)
        worst = max(worst, float((away / ulp(size, bits)).max()))
        coarse = max(coarse, float((away / ulp(size, 7)).max()))
        count += x.numel()
    return worst, coarse, open_ / count


def from_exact(home: Path, *results: Path) -> list[float]:
    """How far SLERPs are from what float64 gives, at most, in ulps of their dtype."""
    sources = [tensors_of(home / name) for name in ("a", "b")]
    files = [tensors_of(result) for result in results]
    worst = [0.0] * len(results)
    for name in sources[0]:
        a, b = (read(source, name).double().flatten() for source in sources)
        angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
        exact = (a + b) * torch.sin(angle / 2) / torch.sin(angle)
        size = torch.stack([exact, a, b]).abs().amax(0)
        for n, one in enumerate(files):
            found = read(one, name)
            away = (found.double().flatten() - exact).abs() / ulp(size, BITS[found.dtype])
            worst[n] = max(worst[n], float(away.max()))
    return worst


def same(one: Path, two: Path) -> bool:
    """Whether two results have the same tensors, bit for bit."""
    left, right = tensors_of(one), tensors_of(two)
    return left.keys() == right.keys() and all(torch.equal(read(left, name), read(right, name)) for name in left)


def reshard(home: Path, pieces: int) -> None:
    """The three models again below ``home``/cut, their tensors dealt to ``pieces`` files."""
    for name in ("base", "a", "b"):
        files = tensors_of(home / name)
        shards = [{key: read(files, key) for key in sorted(files)[n::pieces]} for n in range(pieces)]
        write(home / "cut" / name, shards, json.loads((home / name / "config.json").read_text()))


def timed(code: str, what: str, more: list[str], outs: Iterator[Path], repeats: int) -> tuple[list[list[float]], Path]:
    """Seconds, memory before and peak memory of each run, and where the last one wrote."""
    runs, last = [], None
    for _ in range(repeats):
        if last is not None:
            subprocess.run(["rm", "-r", last], check=True)
        last = next(outs)
        command = [sys.executable, "-c", PEAK + code, what, str(last), *more]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append([float(word) for word in done.stdout.split()[-3:]])
    assert last is not None
    return sorted(runs), last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="make mergekit's environment there, or find it")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--gigabytes", type=float, help="of one model; else SmolLM2-135M's 30 layers, in one file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--only-ours", action="store_true", help="no plain loop beside it")
    parser.add_argument("--folder", help="where the files go for the time of the run")
    given = parser.parse_args()
    mergekit = None if given.peers is None else Path(interpreter("mergekit", given.peers)).with_name("mergekit-yaml")
    dtype = getattr(torch, given.dtype)
    layers = 30 if given.gigabytes is None else max(1, round((given.gigabytes * 1e9 / dtype.itemsize - 28e6) / 3.5e6))
    failed = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        home = Path(folder)
        size, largest = make(home, layers, 30 if given.gigabytes is None else 200, dtype)
        threads = torch.get_num_threads()
        print(f"one model: {size / 1e6:.1f} MB in {given.dtype}, largest tensor {largest / 1e6:.1f}; {threads} threads")
        if given.gigabytes is None:
            reshard(home, 3)
        outs = (home / f"out-{n}" for n in range(10**6))
        for method in given.methods.split(","):
            files = 3 if method in ("linear", "slerp") else 4
            recipe = home / f"{method}.yaml"
            recipe.write_text(f"pennyweight: 1\n{RECIPES[method]}\n")
            rivals = {"pennyweight": (OURS, str(recipe), [])}
            if method in ("linear", "ties") and given.gigabytes is None and not given.only_ours:
                rivals["plain loop"] = (PLAIN, f"{home}/{method}", [])
            if mergekit:
                theirs = home / f"{method}-mergekit.yaml"
                theirs.write_text(mergekit_recipe(method, home, f"dtype: {given.dtype}"))
                rivals["mergekit"] = (MERGEKIT, str(theirs), [str(mergekit)])
            wrote = {}
            for name, (code, what, more) in rivals.items():
                runs, wrote[name] = timed(code, what, more, outs, given.repeats)
                seconds, before, peak = runs[len(runs) // 2]
                over = peak * 2**20 / 1e6 - largest / 1e6
                print(
                    f"{method:16s} {name:12s} {seconds:6.2f} s (best {runs[0][0]:.2f})"
                    f"  {files * size / seconds / 1e9:5.2f} GB/s"
                    f"  peak {peak:6.0f} MiB, {before:.0f} before; {over:.0f} MB over the largest tensor",
                    flush=True,
                )
                if name == "pennyweight" and over > MOST_MEGABYTES:
                    failed.append(f"{method}: {over:.0f} MB over the largest tensor, {MOST_MEGABYTES} allowed")
            if given.gigabytes is None:
                cut = home / "cut" / f"{method}.yaml"
                cut.write_text(f"pennyweight: 1\n{RECIPES[method]}\nshard: 100MB\n")
                _, other = timed(OURS, str(cut), [], outs, 1)
                equal = same(wrote["pennyweight"], other)
                print(f"{'':16s} inputs in 3 shards, outputs of 100 MB: {'the same bits' if equal else 'OTHER BITS'}")
                failed += [] if equal else [f"{method}: depends on shards"]
                wrote["cut"] = other
            if mergekit and method in ROUNDINGS:
                if dtype != torch.float32:
                    finer = home / f"{method}-float32.yaml"
                    finer.write_text(mergekit_recipe(method, home, f"dtype: float32\nout_dtype: {given.dtype}"))
                    _, wrote["float32"] = timed(MERGEKIT, str(finer), rivals["mergekit"][2], outs, 1)
                for name, computed in (("mergekit", dtype), ("float32", torch.float32)):
                    if name in wrote:
                        found, coarse, either = difference(method, home, wrote["pennyweight"], wrote[name], computed)
                        # the last rounding of each, where everything before it is finer than the result
                        most = 1.0 if computed != dtype else ROUNDINGS[method] / 2
                        choice = f", {either:.2%} of the elements where rounding decides" if method == "ties" else ""
                        print(
                            f"{'':16s} against mergekit in {str(computed)[6:]}: {found:.3g} ulps of {given.dtype} "
                            f"({coarse:.3g} of bfloat16) at most, {most:.3g} allowed{choice}",
                            flush=True,
                        )
                        if found > most and not (method == "slerp" and computed == dtype == torch.float32):
                            failed.append(f"{method}: {found:.3g} ulps from mergekit's, {most:.3g} allowed")
            if mergekit and method == "slerp":
                mine, other = from_exact(home, wrote["pennyweight"], wrote["mergekit"])
                print(f"{'':16s} from float64's result: {mine:.3g} ulps, mergekit's {other:.3g}", flush=True)
                failed += [f"slerp: {mine:.3g} ulps from float64's, mergekit's {other:.3g}"] if mine > other else []
            for directory in wrote.values():
                subprocess.run(["rm", "-r", directory], check=True)
    for line in failed:
        print(f"FAILED {line}")
    return int(bool(failed))


def mergekit_recipe(method: str, home: Path, dtype: str) -> str:
    """The same merge as mergekit writes it."""
    if method == "slerp":
        head = f"merge_method: slerp\nbase_model: {home}/a\nparameters: {{t: 0.5}}\n"
        return f"{head}{dtype}\nmodels: [{{model: {home}/a}}, {{model: {home}/b}}]\n"
    base = "" if method == "linear" else f"base_model: {home}/base\n"
    options = f"{{weight: 1.0, density: {DENSITY}}}" if "ties" in method else "{weight: 1.0}"
    models = "".join(f"- model: {home}/{name}\n  parameters: {options}\n" for name in ("a", "b"))
    return textwrap.dedent(f"merge_method: {method}\n{base}{dtype}\nmodels:\n{models}")


if __name__ == "__main__":
    sys.exit(main())
