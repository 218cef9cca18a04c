"""How long a Chinchilla fit takes beside SciPy and the `chinchilla` package: `python benchmarks/law_fit.py [--quick]`.

One data set, one objective (sum over points of Huber at 1e-3 of the residual of log loss), one grid of 4,500 starts
(the one of the Chinchilla paper: 5 x 6 x 6 x 5 x 5 over log E, log A, log B, alpha, beta), three fitters in one run:

* ours, and ours with 1,000 bootstrap resamples;
* SciPy's L-BFGS-B with the analytic gradient from every start, one after another;
* the `chinchilla` package (BFGS with finite differences in a process pool), installed into a venv of its own in the
  folder `--venv` (default: a temporary one); `--quick` leaves it out.

`--sample K` runs the peers from every K-th start only and states their seconds times K beside what was measured: their
starts are independent and one after another, so that time is proportional.

Prints seconds, the objective reached (recomputed here from the constants, so that nobody grades himself) and constants.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.special

from pennyweight import laws

TABLE = Path(__file__).parent.parent / "tests" / "data" / "laws" / "chinchilla_points.csv"
DELTA = 1e-3
GRID = {
    "e": np.linspace(-1, 1, 5), "a": np.linspace(0, 25, 6), "b": np.linspace(0, 25, 6),
    "alpha": np.linspace(0, 2, 5), "beta": np.linspace(0, 2, 5),
}  # fmt: skip

PEER = """
import json, os, sys, tempfile, time
import numpy as np, pandas as pd
from chinchilla import Chinchilla
task = json.load(sys.stdin)
count = len(task["N"])
def loss_fn(true, predicted):  # the package takes the mean: times the count it is the sum
    gap = np.abs(np.log(predicted) - np.log(true))
    d = task["delta"]
    return count * np.where(gap < d, gap**2 / 2, d * (gap - d / 2))
with tempfile.TemporaryDirectory() as folder:
    grid = {k: tuple(v) for k, v in task["grid"].items()}
    fitter = Chinchilla(folder, param_grid=grid, loss_fn=loss_fn, log_level=50)
    fitter.database.df = pd.DataFrame({"C": task["C"], "N": task["N"], "D": task["D"], "loss": task["loss"]})
    began = time.perf_counter()
    fitter.fit()
    seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, **{k: float(v) for k, v in fitter.params.items()}}))
"""


def synthetic(count: int = 245) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the published Chinchilla constants with 0.5 % noise."""
    g = np.random.default_rng(0)
    n, d = 10 ** g.uniform(7.5, 10.2, count), 10 ** g.uniform(9, 11.5, count)
    return n, d, (1.69 + 406.4 / n**0.34 + 410.7 / d**0.28) * np.exp(0.005 * g.standard_normal(count))


def published() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 240 digitized points of the paper that its replication fits."""
    with TABLE.open(newline="") as file:
        rows = [(float(r["params"]), float(r["train_flop"]), float(r["loss"])) for r in csv.DictReader(file)]
    n, c, loss = np.array(sorted(rows, key=lambda row: row[2])[:-5]).T
    return n, c / (6 * n), loss


def objective(constants: dict[str, float], n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> float:
    """The objective of anybody's constants."""
    predicted = constants["E"] + constants["A"] / n ** constants["alpha"] + constants["B"] / d ** constants["beta"]
    return float(scipy.special.huber(DELTA, np.log(predicted) - np.log(loss)).sum())


def ours(n: np.ndarray, d: np.ndarray, loss: np.ndarray, bootstrap: int) -> tuple[float, dict[str, float]]:
    starts = [(np.exp(e), np.exp(a), p, np.exp(b), q) for e, a, b, p, q in itertools.product(*GRID.values())]
    began = time.perf_counter()
    table = {"N": n, "D": d, "loss": loss}
    law = laws.fit(table, "chinchilla", starts=starts, holdout=False, bootstrap=bootstrap)
    return time.perf_counter() - began, dict(law.constants)


def scipy_start_by_start(
    n: np.ndarray, d: np.ndarray, loss: np.ndarray, sample: int = 1
) -> tuple[float, dict[str, float]]:
    log_n, log_d, log_l = np.log(n), np.log(d), np.log(loss)

    def value_and_slope(theta: np.ndarray) -> tuple[float, np.ndarray]:
        e, a, b, alpha, beta = theta
        terms = np.stack([np.full(n.size, e), a - alpha * log_n, b - beta * log_d])
        top = terms.max(0)
        weights = np.exp(terms - top)
        total = weights.sum(0)
        gap = top + np.log(total) - log_l
        size = np.abs(gap)
        value = np.where(size < DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum()
        pull = np.clip(gap, -DELTA, DELTA) * weights / total
        slope = [pull[0].sum(), pull[1].sum(), pull[2].sum(), -pull[1] @ log_n, -pull[2] @ log_d]
        return 1e3 * value, 1e3 * np.array(slope)  # times 1000, or the default tolerances stop it early

    began = time.perf_counter()
    results = [
        scipy.optimize.minimize(value_and_slope, start, jac=True, method="L-BFGS-B")
        for start in list(itertools.product(*GRID.values()))[::sample]
    ]
    best = min(results, key=lambda r: r.fun).x
    found = dict(zip(("E", "A", "B", "alpha", "beta"), (*np.exp(best[:3]), *best[3:]), strict=True))
    return time.perf_counter() - began, found


def package(n: np.ndarray, d: np.ndarray, loss: np.ndarray, folder: Path) -> tuple[float, dict[str, float]]:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "chinchilla==0.2.0"], check=True)
    task = {
        "N": n.tolist(), "D": d.tolist(), "C": (6 * n * d).tolist(), "loss": loss.tolist(), "delta": DELTA,
        "grid": {name: values.tolist() for name, values in GRID.items()},
    }  # fmt: skip
    done = subprocess.run([python, "-c", PEER], input=json.dumps(task), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found.pop("seconds"), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave the chinchilla package out")
    parser.add_argument("--venv", type=Path, help="folder of the package's own venv, kept")
    parser.add_argument("--sample", type=int, default=1, metavar="K", help="run SciPy from every K-th start only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name, points in (("synthetic, 245 points", synthetic()), ("published, 240 points", published())):
            print(f"{name}, {np.prod([v.size for v in GRID.values()])} starts")
            runs = [
                ("ours", lambda points=points: ours(*points, bootstrap=0)),
                ("ours, 1,000 bootstraps", lambda points=points: ours(*points, bootstrap=1000)),
                ("scipy, start by start", lambda points=points: scipy_start_by_start(*points, sample=options.sample)),
            ]
            if not options.quick:
                folder = options.venv or Path(temporary) / "venv"
                runs.append(("chinchilla 0.2.0", lambda points=points, folder=folder: package(*points, folder)))
            for fitter, run in runs:
                seconds, found = run()
                constants = ", ".join(f"{k} {found[k]:.6g}" for k in ("E", "A", "alpha", "B", "beta"))
                if fitter.startswith("scipy") and options.sample > 1:
                    print(f"  {fitter:24}{seconds * options.sample:8.2f} s extrapolated from {seconds:.2f} s on 1 of "
                          f"{options.sample} starts")  # fmt: skip
                print(f"  {fitter:24}{seconds:8.2f} s  objective {objective(found, *points):.12f}  {constants}")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
