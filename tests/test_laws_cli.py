"""Laws fitted on the command line, kept in a file, and asked for points and optima with their intervals."""

import math

import numpy as np
import pytest

from pennyweight.cli import main


def test_a_law_kept_in_a_file_predicts_with_intervals(tmp_path, capsys):
    g = np.random.default_rng(0)
    lines = ["N,D,loss"]
    for n in (1e7, 4e7, 2e8, 8e8):
        for d in (0.5, 2.0, 8.0, 30.0):
            loss = 1.7 + 400 * n**-0.34 + 900 * (d * 1e9) ** -0.33
            lines.append(f"{n},{d},{loss * math.exp(0.002 * g.standard_normal())}")
    runs, law = tmp_path / "runs.csv", tmp_path / "law.json"
    runs.write_text("\n".join(lines) + "\n")
    assert main(["laws", "fit", str(runs), "--form", "chinchilla"]) == 2
    assert "D looks like billions; give single units, or say so: units={'D': 1e9}, or --unit D=1e9" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    words = ["laws", "fit", str(runs), "--form", "chinchilla", "--unit", "D=1e9", "--bootstrap", "60"]
    assert main([*words, "--json", str(law)]) == 0
    capsys.readouterr()
    assert main(["laws", "predict", str(law), "N=5e8", "D=1e10"]) == 0
    said = capsys.readouterr().out
    truth = 1.7 + 400 * 5e8**-0.34 + 900 * 1e10**-0.33
    value, low, high = (float(part.strip(" [],\n")) for part in said.splitlines()[0].partition("=")[2].split())
    assert low < value < high
    assert value == pytest.approx(truth, rel=0.01)
    assert main(["laws", "optimum", str(law), "1e20"]) == 0
    found = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines() if " = " in line)
    scale = (0.34 * 400 / (0.33 * 900)) ** (1 / 0.67)
    assert float(found["N"].split()[0]) == pytest.approx(scale * (1e20 / 6) ** (0.33 / 0.67), rel=0.5)
    assert "[" in found["N"]
    assert "[" in found["loss"]
    assert main(["laws", "fit", str(runs), "--form", "chinchilla", "--unit", "D"]) == 2
    assert "'D' is not NAME=VALUE; write D=1e9" in capsys.readouterr().err
