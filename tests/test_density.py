"""Density of a fitted model beside its original, and of a model beside a family, on the command line."""

import csv
import math

import pytest
import toys
from scipy.optimize import brentq

from pennyweight import laws
from pennyweight.cli import main
from pennyweight.errors import OptionError
from pennyweight.fit import fit
from pennyweight.laws import density
from pennyweight.laws.published import refit
from pennyweight.model.saving import saved_bytes


@pytest.mark.parametrize("added", [-0.05, 0.0, 0.047, 1.0])
def test_what_a_loss_is_worth_inverts_the_law(added):
    law, params, tokens = refit(), 1.3e8, 2e12
    wanted = law(N=params, D=tokens) + added
    size = brentq(lambda n: law(N=n, D=tokens) - wanted, 1e4, 1e13, xtol=1, rtol=1e-13)
    assert density.worth(params, added) == pytest.approx(size, rel=1e-6)


def test_worth_takes_another_law_and_knows_its_bounds():
    law = laws.law("reference", a=400.0, alpha=0.5, b=1.0, beta=0.3)
    # 400 / sqrt(N): 0.04 at 1e8, so 0.08 is worth 2.5e7
    assert density.worth(1e8, 0.04, law=law) == pytest.approx(2.5e7)
    best = density.worth(1e8, -0.04, law=law)
    assert (float(best), best.bound) == (math.inf, "at least")
    assert density.worth(1e8, math.inf) == 0
    with pytest.raises(OptionError, match="params = 0"):
        density.worth(0, 0.1)


def test_a_receipt_states_density_a_parameter_and_a_byte(tmp_path):
    text = toys.text_file(tmp_path)
    found = fit(toys.llama(tmp_path / "llama"), data=text, budgets=["45%"], out=tmp_path / "out", settings=toys.QUICK)
    receipt = found.receipt
    quality, _, each, byte = receipt.figures
    size = density.worth(receipt.model.params, math.log(quality.ratio.value))
    assert each.after.value == pytest.approx(size / receipt.model.params)
    kept = saved_bytes(found.directory) / receipt.model.bf16_bytes
    assert byte.after.value == pytest.approx(each.after.value / kept)
    assert each.after.low <= each.after.value <= each.after.high
    assert each.before.value == byte.before.value == 1
    assert "Density a byte" in found.report.read_text()


def test_density_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "family.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("N", "D", "loss"))
        for n in (1e7, 3e7, 1e8, 3e8):
            for d in (1e9, 4e9, 16e9):
                writer.writerow((n, d, 30 * n**-0.2 + 200 * d**-0.3))
    loss = 30 * 6e7**-0.2 + 200 * 16e9**-0.3
    assert main(["laws", "density", str(path), "--params", "4e7", "--loss", str(loss)]) == 0
    shown = capsys.readouterr().out
    assert "density 1.5" in shown
    assert "D = 1.6e+10" in shown
    assert main(["laws", "density", str(path), "--params", "4e7", "--loss", "0.01"]) == 0
    assert "effective parameters at least 3e+08" in capsys.readouterr().out
    path.write_text("N,loss\n1,2\n3,4\n")
    assert main(["laws", "density", str(path), "--params", "4e7", "--loss", "3"]) == 2
    assert "has no column D" in capsys.readouterr().err
