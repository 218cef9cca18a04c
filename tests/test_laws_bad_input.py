"""What laws, schedules and plans do with numbers that are none: one line that says which, never a wrong answer."""

import json
import math

import numpy as np
import pytest
import torch

import pennyweight as pw
from pennyweight import laws
from pennyweight.cli import main
from pennyweight.errors import DataError, UserError
from pennyweight.measure import kernel_theory

MODES = np.arange(1, 200) ** -1.4
FLOORED = laws.law("power_const", L_inf=2.0, x0=50.0, alpha=0.3)
MIXED = laws.dcpt.given(
    dict(E=1.2, A=0.4, alpha=0.5, B=0.05, beta=0.4, eta=1.5, C=0.2, gamma=0.6, epsilon=0.1),
    dict(E=2.0, A=0.5, alpha=0.4, B=0.04, beta=0.35, eta=1.4, C=0.15, gamma=0.5, epsilon=0.05),
)
FAMILY = laws.density.given(
    laws.law("reference", a=0.25, alpha=0.3, b=1.0, beta=0.28),
    laws.law("sigmoid_of_loss", c=0.65, gamma=-18.0, l=0.3, d=0.25), D0=1000.0,
)  # fmt: skip
NAN, INF = math.nan, math.inf
#: function, arguments that work, and for each the values that must not
CALLS = [
    (laws.nopt, {"domain": "language", "C": 2.0}, {"C": (-1, 0, INF)}),
    (laws.size_for_kl, {"law": FLOORED, "nats_per_item": 2.0, "tokens_per_item": 100.0},
     {"nats_per_item": (-1, 0, INF), "tokens_per_item": (-1, 0, INF)}),
    (laws.lr.power, {"T": 1e12, "batch": 512}, {"T": (-1, 0, INF), "batch": (-1, 0, INF)}),
    (laws.qat_fraction, {"N": 1e9, "D": 1e11, "bits": 4}, {"N": (-1, 0, INF), "D": (-1, 0, INF), "bits": (-1, 0, INF)}),
    (laws.batch_by_loss, {"L": 3.0}, {"L": (-1, 0, INF)}),
    (laws.tokens_to_plateau, {"law": FLOORED, "eps": 0.1}, {"eps": (-1, 0)}),
    (laws.hparams.step, {"N": 1e9, "D": 1e11, "seq_len": 2048},
     {"N": (-1, 0, INF), "D": (-1, 0, INF), "seq_len": (-1, 0, INF)}),
    (laws.vocab.optimal, {"nonvocab_params": 3e9, "flops": 1e21, "method": "parametric", "width": 2048},
     {"nonvocab_params": (-1, 0, INF), "flops": (-1, 0, INF), "width": (-1, 0, INF), "method": ("best", None)}),
    (laws.vocab.optimal, {"nonvocab_params": 3e9, "width": 2048}, {"width": (-1, 0, INF)}),
    (laws.trajectory.loss, {"N": 1e8, "steps": 1e4, "batch": 5e5},
     {"N": (-1, 0, INF), "steps": (-1, 0, INF), "batch": (-1, 0, INF)}),
    (laws.trajectory.critical_batch, {"L": 3.0}, {"L": (-1, 0, INF)}),
    (laws.trajectory.steps_for, {"L": 3.4, "N": 1e8, "batch": 5e5},
     {"L": (-1, 0, INF), "N": (-1, 0, INF), "batch": (-1, 0)}),
    (laws.trajectory.tokens_for, {"L": 3.4, "N": 1e8, "batch": 5e5},
     {"L": (-1, 0, INF), "N": (-1, 0, INF), "batch": (-1, 0)}),
    (MIXED.optimal_ratio, {"N": 1.8, "D": 10.0, "general_drop": 0.03},
     {"N": (-1, 0, INF), "D": (-1, 0, INF), "general_drop": (-0.5,)}),
    (MIXED.optimal_ratio, {"N": 1.8, "domain_tokens": 1.0}, {"domain_tokens": (-1, 0, INF)}),
    (FAMILY.effective_params, {"score": 0.6}, {"score": ()}),
    (FAMILY.effective_params, {"loss": 0.3}, {"loss": ()}),
    (FAMILY.density, {"params": 3.0, "loss": 0.3}, {"params": (-1, 0, INF), "loss": ()}),
    (laws.flops.datastore, {"n_retriever": 1e8, "tokens": 1e12}, {"n_retriever": (-1, 0, INF), "tokens": (-1, 0, INF)}),
    (laws.flops.vit, {"image": 224, "patch": 16, "d": 384, "layers": 12},
     {"image": (-1, 0, INF, 224.5), "patch": (-1, 0, INF, 15), "d": (-1, 0, INF), "layers": (-1, 0, INF, 1.5)}),
    (kernel_theory.krr, {"n": 50, "eigvals": MODES, "coeffs2": MODES, "ridge": 0.3, "noise": 0.1},
     {"n": (-1, 0, INF), "ridge": (-1, INF), "noise": (-1, INF)}),
    (kernel_theory.rf, {"n": 50, "k": 40, "eigvals": MODES, "coeffs2": MODES, "ridge": 0.3},
     {"n": (-1, 0, INF), "k": (-1, 0), "ridge": (-1, INF)}),
    (kernel_theory.optimal_ridge, {"n": 50, "eigvals": MODES, "coeffs2": MODES, "noise": 0.1}, {"noise": (-1, INF)}),
    (pw.train.schedules.power, {"batch": 512, "a": 4.0, "b": -0.51, "eta_max": 0.02, "warmup_tokens": 1e9},
     {"batch": (-1, 0, INF), "a": (-1, 0, INF), "b": (0, 1, -INF), "eta_max": (-1, 0), "warmup_tokens": (-1, INF)}),
    (pw.train.schedules.wsd, {"total": 1000, "warmup": 50, "decay_frac": 0.1, "shape": "exp"},
     {"total": (-1, 0, INF), "warmup": (-1, 1e4, INF), "decay_frac": (-1, 2), "shape": ("sine", None, np.ones(2))}),
    (pw.plan.bits_for_memory, {"bytes": 1e9, "tokens": 1e11}, {"bytes": (-1, 0, INF), "tokens": (-1, 0, INF)}),
    (pw.plan.augmentation, {"seeds": 100, "budget": 1000},
     {"seeds": (-1, 0, INF), "budget": (-1, 0, INF), "costs": (-1.0, {"answer": 0}, {"answer": "two"}, {"poem": 1})}),
    (pw.plan.Stage, {"models": [1e9, 3e9], "prompt_len": 100, "gen_len": 50},
     {"models": (3e9, [], [-1.0], [0], [NAN], ["7B"]), "prompt_len": (-1, 0, INF), "gen_len": (-1, 0, INF)}),
]  # fmt: skip
#: What is no number, whatever the argument.
NONE = ("many", 1 + 2j, NAN, torch.tensor(NAN), np.array([1.0, NAN]))
WORDS = {"method", "shape", "costs", "models"}


@pytest.mark.parametrize(("call", "good", "bad"), CALLS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_each_bad_number_is_refused_in_one_line(call, good, bad):
    call(**good)
    for name, values in bad.items():
        for value in (*values, *(() if name in WORDS else NONE)):
            with pytest.raises(UserError) as caught:
                call(**{**good, name: value})
            assert "\n" not in str(caught.value), (name, value)
            assert len(str(caught.value)) < 250, (name, value)


def test_what_is_infinite_and_still_has_an_answer():
    least = (2.1e3 / (3.4 - (6.5e13 / 1e8) ** 0.077) ** (1 / 0.76), 4138.2)
    assert laws.trajectory.steps_for(3.4, 1e8, INF) == pytest.approx(least[0], rel=1e-9)
    assert least[0] == pytest.approx(least[1], rel=1e-4)
    assert kernel_theory.rf(50, INF, MODES, MODES, 0.3).test == pytest.approx(
        kernel_theory.krr(50, MODES, MODES, 0.3).test
    )
    assert laws.flops.datastore(np.array([1e8, 3e8]), 1e12).tolist() == [2e20, 6e20]
    models = pw.plan.Stage(models=np.array([1e9, 7e9]), prompt_len=100, gen_len=50).models
    assert models == (1e9, 7e9)


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


QAT = [
    {"N": n, "D_fp": f, "D_qat": q, "bits": b, "loss": 1.5 + 300 * (f + q) ** -0.3 + 200 * n**-0.3 + 2.0 ** (-0.8 * b)}
    for n in (1e7, 4e7) for f in (1e9, 4e9) for q in (2e8, 3e9) for b in (2, 3, 4)
]  # fmt: skip
GRID = [
    {"N": n, "D": d, "lr": 3 * n**-0.6 * d**0.25, "batch_seqs": 0.9 * d**0.5 / 2048, "loss": 2.0}
    for n in (1e8, 4e8) for d in (5e9, 4e10)
]  # fmt: skip
CURVES = [
    {"N": n, "steps": s, "batch": b, "loss": float(laws.trajectory.loss(n, s, b))}
    for n in (1e6, 1e7) for s in (300, 1000, 3000) for b in (1e4, 1e6)
]  # fmt: skip
MIX = [
    {"N": n, "D": d, "r": r, "loss": float(MIXED.loss(n, d, r))}
    for n in (0.5, 1.8) for d in (1, 4) for r in (0.1, 0.5, 0.9)
]  # fmt: skip
RUNS = [{"N": n, "D": d, "loss": 0.4 * n**-0.2 + 1.3 * d**-0.35} for n in (0.05, 0.2, 0.8) for d in (1.0, 5.0, 25.0)]
BRANCHES = [
    {"N": n, "D": d, "decay_tokens": 0.1 * d, "loss": 0.9 + 0.5 * n**-0.3 + 0.8 * d**-0.25}
    for n in (0.1, 0.4, 1.6) for d in (5, 10, 20)
]  # fmt: skip
STABLE = [{"N": n, "tokens": 40} for n in (0.1, 0.4, 1.6)]
QUICK = {"starts": 64, "survivors": 2}
TABLES = {
    "fit_qat": (lambda t: laws.fit_qat(t, **QUICK), QAT),
    "hparams.fit": (lambda t: laws.hparams.fit(t, bootstrap=0), GRID),
    "trajectory.fit": (lambda t: laws.trajectory.fit(t, **QUICK), CURVES),
    "dcpt.fit": (lambda t: laws.dcpt.fit(t, **QUICK), MIX),
    "density.reference": (lambda t: laws.density.reference(t, **QUICK), RUNS),
    "fit_from_wsd": (lambda t: laws.fit_from_wsd(STABLE, t, **QUICK), BRANCHES),
    "fit": (lambda t: laws.fit(t, "chinchilla", **QUICK), RUNS),
}


@pytest.mark.parametrize("name", TABLES)
def test_each_bad_table_is_refused_in_one_line(name):
    fit, rows = TABLES[name]
    first = list(rows[0])
    tables = [None, 3.0, [], "no such file.csv", [1, 2], rows[:1], [rows[0]] * 4]
    for column in first:
        for value in (NAN, INF, -1.0, "1.4T", None):
            tables.append([rows[0], {**rows[1], column: value}, *rows[2:]])
        tables.append([*rows[:2], {key: value for key, value in rows[2].items() if key != column}, *rows[3:]])
        tables.append({**columns(rows), column: columns(rows)[column][:-1]})
    for table in tables:
        with pytest.raises(UserError) as caught:
            fit(table)
        assert "\n" not in str(caught.value)
    fit(columns(rows))


def test_files_of_rows_are_read_by_every_fit(tmp_path):
    for name, (fit, rows) in TABLES.items():
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(repr, row.values())) for row in rows)]) + "\n")
        assert repr(fit(path)) == repr(fit(rows))


POINTS = [(n, 1.6 + (40 / n) ** 0.4) for n in (1e2, 1e3, 1e4, 1e5, 1e6, 1e7)]
PLAIN = "N,loss\n" + "".join(f"{n!r},{y!r}\n" for n, y in POINTS)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        "\n\n" + PLAIN.replace("\n", "\n\n"),
        PLAIN.replace("N,loss", " N , loss "),
        PLAIN.replace("\n", ",,\n"),
        PLAIN + PLAIN.partition("\n")[2],
        'N,"the loss, in nats"\n' + PLAIN.partition("\n")[2],
    ],
    ids=[
        "plain",
        "bom",
        "crlf",
        "cr",
        "semicolons",
        "tabs",
        "blank lines",
        "spaces",
        "empty columns",
        "twice",
        "quotes",
    ],
)
def test_awkward_files_are_read(text, tmp_path, capsys):
    path, law = tmp_path / "runs.csv", tmp_path / "law.json"
    path.write_bytes(text.encode())
    target = ["--target", "the loss, in nats"] if "in nats" in text else []
    assert main(["laws", "fit", str(path), "--bootstrap", "0", "--json", str(law), *target]) == 0
    assert json.loads(law.read_text())["constants"]["x0"] == pytest.approx(40, rel=1e-3)
    assert main(["laws", "predict", str(law), "N=3e5"]) == 0
    assert f"loss = {1.6 + (40 / 3e5) ** 0.4:.5f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 rows below the header"),
        ("N,loss\n", "0 rows below the header"),
        (PLAIN.replace("N,loss", "N,accuracy"), "no column 'loss' to predict; there are N, accuracy"),
        (PLAIN.replace("N,loss", "a,loss,b").replace("1,", "1,1,"), "fields where the header names 3"),
        (PLAIN.replace("N,loss", "N,N"), "'N' names more than one column"),
        (PLAIN.partition("\n")[2], "no column 'loss' to predict"),
        (PLAIN + "many,2.0\n", "column N, row 7: 'many' is none; give plain numbers"),
        (PLAIN + ",2.0\n", "column N, row 7: '' is none"),
        (PLAIN + "0.0001M,2.0\n", "column N, row 7: '0.0001M' is none"),
        (PLAIN.replace(",", ";").replace(".", ","), "column N, row 1: '100,0' is none"),
        (PLAIN + "1e9,2,3\n", "line 8: 3 fields where the header names 2"),
        (PLAIN + "1e400,2.0\n", "is inf in point 7 of 7"),
        (PLAIN + "nan,2.0\n", "is nan in point 7 of 7"),
        (PLAIN + "-3,2.0\n", "is -3 in point 7 of 7"),
        (PLAIN + "1e9,nan\n", "loss of point 7 is not a finite number"),
        (PLAIN + "1e9,-2\n", "loss is -2 in point 7"),
        ("N,loss\n100,3\n1000,2\n", "2 distinct points for 3 parameters"),
        ("N,loss\n" + "100,3\n" * 8, "1 distinct points for 3 parameters"),
        ("N,loss\n1,2\n2,2\n3,2\n4,2\n", "the target is 2 in every point"),
        ("N,loss\n5,2\n5,3\n5,4\n5,5\n", "N is 5 in every point"),
        ("PK\x03\x04\udcff", "cannot be read as CSV"),
    ],
)
def test_what_no_law_can_be_fitted_to_is_said_in_one_line(text, words, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert main(["laws", "fit", str(path), "--bootstrap", "0"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_degenerate_fits_are_told(tmp_path, capsys):
    path, law = tmp_path / "runs.csv", tmp_path / "law.json"
    words = ["laws", "fit", str(path), "--bootstrap", "0", "--json", str(law)]
    path.write_text("N,loss\n" + "".join(f"{n},{y}\n" for (n, _), (_, y) in zip(POINTS, POINTS[::-1], strict=True)))
    assert main(words) == 0
    assert "alpha = -0.4 is negative: on these points the loss rises with N" in capsys.readouterr().out
    path.write_text("N,loss\n" + "".join(f"{n},{y}\n" for n, y in POINTS[:3]))
    assert main(words) == 0
    assert "as many points as parameters: nothing checks the law" in capsys.readouterr().out
    path.write_text("N,loss\n" + "".join(f"{n},{1e200 * y}\n" for n, y in POINTS))  # x0 = 1e200^(1/0.4) overflows
    assert main(words) == 0
    capsys.readouterr()
    assert main(["laws", "predict", str(law), "N=1e5"]) == 2
    assert "x0 = inf is beyond what numbers hold" in capsys.readouterr().err
    with pytest.raises(DataError, match="beyond what numbers hold"):
        laws.law("power", x0=INF, alpha=0.1)(10.0)
    with pytest.raises(DataError, match="beyond what numbers hold"):
        laws.law("power", x0=INF, alpha=0.1).inverse("x", 2.0)
    assert main(["laws", "predict", str(law), "N=1", "N=2"]) == 2
    assert "N is given twice" in capsys.readouterr().err
