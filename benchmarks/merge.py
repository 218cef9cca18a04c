"""Merging on disk beside a plain loop and mergekit: `python benchmarks/merge.py [--mergekit VENV] [--dtype bfloat16]`.

Where VENV is not there yet, it is made, and mergekit installed into it on top of the packages that run this script.

Makes a base and two models of SmolLM2-135M's shapes, merges them by each method in a process of its own, and prints
seconds, GB/s of everything read and written once (inputs, the base where one is read, the result), and peak resident
memory with what the process had before it began. Files are read before, so that all start from the same page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import venv
from pathlib import Path

import torch
from safetensors.torch import save_file

RECIPES = {
    "linear": "merge: linear\nmodels: [a, b]",
    "slerp": "merge: slerp\nmodels: [a, b]",
    "task_arithmetic": "merge: task_arithmetic\nbase: base\nmodels: [a, b]",
    "ties": "merge: ties\noptions: {density: 0.5}\nbase: base\nmodels: [a, b]",
    "dare_ties": "merge: dare\noptions: {density: 0.5, sign: ties}\nbase: base\nmodels: [a, b]",
}
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


def make(home: Path, layers: int, dtype: torch.dtype) -> int:
    """Write base, a and b; the bytes of one."""
    g = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    for n in range(layers):
        at = f"model.layers.{n}"
        shapes |= {
            f"{at}.self_attn.{p}_proj.weight": (r, 576) for p, r in (("q", 576), ("k", 192), ("v", 192), ("o", 576))
        }
        shapes |= {f"{at}.mlp.{p}_proj.weight": (1536, 576) for p in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (576, 1536)}
        shapes |= {f"{at}.{p}layernorm.weight": (576,) for p in ("input_", "post_attention_")}
    base = {name: 0.02 * torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "vocab_size": 49152},
        **{"num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536},
        **{"tie_word_embeddings": True, "torch_dtype": str(dtype)[6:]},
    }
    for name in ("base", "a", "b"):
        noise = 0.0 if name == "base" else 0.0004
        tensors = {key: (one + noise * torch.randn(one.shape, generator=g)).to(dtype) for key, one in base.items()}
        (home / name).mkdir()
        save_file(tensors, home / name / "model.safetensors", metadata={"format": "pt"})
        (home / name / "config.json").write_text(json.dumps(config))
    return (home / "a" / "model.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", metavar="VENV", help="a virtual environment that holds mergekit, or will")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default=",".join(RECIPES))
    given = parser.parse_args()
    if given.mergekit and not Path(given.mergekit).exists():
        install_mergekit(Path(given.mergekit))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        size = make(home, given.layers, getattr(torch, given.dtype))
        print(f"one model: {size / 1e6:.1f} MB in {given.dtype}, {torch.get_num_threads()} threads")
        for method in given.methods.split(","):
            files = 3 if method in ("linear", "slerp") else 4
            recipe = home / f"{method}.yaml"
            recipe.write_text(f"pennyweight: 1\n{RECIPES[method]}\n")
            rivals = {"pennyweight": (OURS, str(recipe), [])}
            if method in ("linear", "ties"):
                rivals["plain loop"] = (PLAIN, f"{home}/{method}", [])
            if given.mergekit:
                theirs = home / f"{method}-mergekit.yaml"
                theirs.write_text(mergekit_recipe(method, home, given.dtype))
                rivals["mergekit"] = (MERGEKIT, str(theirs), [f"{given.mergekit}/bin/mergekit-yaml"])
            for name, (code, what, more) in rivals.items():
                runs = []
                for n in range(given.repeats):
                    out = f"{home}/out-{n}"
                    command = [sys.executable, "-c", PEAK + code, what, out, *more]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs.append([float(word) for word in done.stdout.split()[-3:]])
                    subprocess.run(["rm", "-r", out], check=True)
                seconds, before, peak = sorted(runs)[len(runs) // 2]
                print(
                    f"{method:16s} {name:12s} {seconds:6.2f} s (best {min(runs)[0]:.2f})"
                    f"  {files * size / seconds / 1e9:5.2f} GB/s"
                    f"  peak {peak:6.0f} MB, {before:.0f} before",
                    flush=True,
                )


def install_mergekit(home: Path) -> None:
    """Make a virtual environment that sees the packages of this one (torch is large), and install mergekit there."""
    venv.create(home, with_pip=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([home / "bin" / "python", "-m", "pip", "install", "--quiet", "mergekit"], check=True)


def mergekit_recipe(method: str, home: Path, dtype: str) -> str:
    """The same merge as mergekit writes it."""
    if method == "slerp":
        head = f"merge_method: slerp\nbase_model: {home}/a\nparameters: {{t: 0.5}}\n"
        return f"{head}dtype: {dtype}\nmodels: [{{model: {home}/a}}, {{model: {home}/b}}]\n"
    base = "" if method == "linear" else f"base_model: {home}/base\n"
    options = "{weight: 1.0, density: 0.5}" if "ties" in method else "{weight: 1.0}"
    models = "".join(f"- model: {home}/{name}\n  parameters: {options}\n" for name in ("a", "b"))
    return textwrap.dedent(f"merge_method: {method}\n{base}dtype: {dtype}\nmodels:\n{models}")


if __name__ == "__main__":
    main()
