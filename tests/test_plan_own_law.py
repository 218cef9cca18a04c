"""`pennyweight plan --law`: a law of one's own is followed, and stands beside the built-in ones."""

import json
import math

import numpy as np
import pytest

import pennyweight as pw
from pennyweight import laws
from pennyweight.cli import main
from pennyweight.errors import OptionError
from pennyweight.laws import published

#: What the points below are made of.
TRUTH = {"E": 1.55, "A": 260.0, "alpha": 0.31, "B": 1900.0, "beta": 0.36}


def loss(n, d):
    return TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]


def split(compute):
    """N and D of least loss, by a fine grid."""
    n = np.exp(np.linspace(math.log(1e5), math.log(1e13), 400_001))
    best = n[int(np.argmin(loss(n, compute / (6 * n))))]
    return best, compute / (6 * best)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A law file of those points, as the command line writes it."""
    folder = tmp_path_factory.mktemp("law")
    g = np.random.default_rng(3)
    lines = ["N,D,loss"]
    for n in (2e7, 1e8, 5e8, 2e9):
        for d in (1e9, 6e9, 3e10, 1e11):
            lines.append(f"{n},{d},{loss(n, d) * math.exp(0.001 * g.standard_normal())!r}")
    (folder / "runs.csv").write_text("\n".join(lines) + "\n")
    law = folder / "mine.json"
    words = ["laws", "fit", str(folder / "runs.csv"), "--form", "chinchilla", "--bootstrap", "80", "--json", str(law)]
    assert main(words) == 0
    return law


def planned(kept, capsys, tmp_path, *words):
    facts, page = tmp_path / "plan.json", tmp_path / "plan.html"
    assert main(["plan", "--law", str(kept), "--json", str(facts), "--out", str(page), *words]) == 0
    return json.loads(facts.read_text()), capsys.readouterr().out, page.read_text()


def test_the_plan_follows_it_and_shows_it_beside_the_others(kept, capsys, tmp_path):
    found, said, page = planned(kept, capsys, tmp_path, "--compute", "4e20")
    n, d = split(4e20)
    first = found["answers"][0]
    assert first["law"] == found["law"] == "mine.json (fitted here to 16 points)"
    assert (first["N"], first["D"]) == pytest.approx((n, d), rel=0.2)
    assert first["loss"] == pytest.approx(loss(n, d), rel=2e-3)
    for name in ("N", "D", "ratio", "loss"):
        low, high = first["intervals"][name]
        assert low < first[name] < high
    others = published.answers(4e20)
    assert [answer["law"] for answer in found["answers"][1:]] == [answer.law for answer in others]
    sizes = [first["N"], *(answer.N for answer in others)]
    assert found["spread"]["N"] == pytest.approx([min(sizes), max(sizes)])
    line = next(line for line in said.splitlines() if line.strip().startswith("mine.json"))
    assert line.count("[") == 3  # parameters, tokens, loss
    assert f"a factor of {max(sizes) / min(sizes):.2f}" in said
    assert "mine.json" in page
    assert "chinchilla (Hoffmann et al.)" in page
    assert found["alternatives"][0]["params"] == pytest.approx(first["N"])
    assert "fitted range" not in said  # 4e20 asks for nothing outside


def test_the_spread_reaches_out_to_it():
    tilted = laws.law("chinchilla", E=1.5, A=10.0, alpha=0.2, B=40000.0, beta=0.5, source="tilted")
    without, own = pw.plan.training(4e20).spread["N"], pw.plan.training(4e20, law=tilted)
    assert own.spread["N"] == (own.answers[0].N, without[1])
    assert own.answers[0].N < 0.5 * without[0]
    assert any("the laws disagree on size by a factor of 14" in note for note in own.warnings)


def test_compute_beyond_the_fitted_runs_is_said(kept, capsys, tmp_path):
    far = planned(kept, capsys, tmp_path, "--compute", "1e24")
    assert "times outside the fitted range, more than the declared 10" in far[1]
    assert "times outside the fitted range, more than the declared 10" in far[2]
    assert "outside the fitted range, more than" in far[0]["answers"][0]["warning"]
    near = planned(kept, capsys, tmp_path, "--compute", "2e22")[1]
    assert "times outside the fitted range" in near
    assert "more than the declared" not in near
    unknown = pw.plan.training(1e20, law=laws.law("chinchilla", **TRUTH))
    assert unknown.answers[0].warning == "warning: the fitted range of these constants is not known"


@pytest.mark.parametrize(
    ("form", "constants"),
    [
        ("minicpm", {"L0": 1.55, "C_N": 260.0, "alpha": 0.31, "C_D": 1900.0, "beta": 0.36}),
        ("reference", {"a": 260.0, "alpha": 0.31, "b": 1900.0, "beta": 0.36}),
    ],
)
def test_other_laws_of_size_and_tokens_split_too(form, constants):
    floor = 0 if form == "minicpm" else TRUTH["E"]
    rows = [(n, d, loss(n, d) - floor) for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)]
    fitted = laws.fit(rows, form, bootstrap=20)
    plan = pw.plan.training(4e20, law=fitted)
    assert plan.answers[0].N == pytest.approx(split(4e20)[0], rel=0.02)
    assert set(plan.answers[0].intervals) == {"N", "D", "ratio", "loss"}
    exact = pw.plan.training(4e20, law=laws.law(form, **constants)).answers[0]
    assert exact.N == pytest.approx(split(4e20)[0], rel=1e-4)
    assert exact.loss == pytest.approx(loss(*split(4e20)) - floor, rel=1e-9)


def test_built_in_laws_go_by_their_names(capsys):
    assert main(["plan", "--compute", "1e20", "--law", "C4 (Muennighoff et al.)"]) == 0
    assert "(law: C4 (Muennighoff et al.))" in capsys.readouterr().out


def test_what_is_no_law_of_size_and_tokens_is_refused_in_one_line(kept, capsys, tmp_path):
    def refused(*words):
        assert main(["plan", *words]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        return said.err

    other, broken, page, lost = (tmp_path / name for name in ("power.json", "broken.json", "page.html", "lost.json"))
    points = tmp_path / "points.csv"
    points.write_text("N,loss\n" + "".join(f"{n},{1.6 + (40 / n) ** 0.4}\n" for n in (1e2, 1e3, 1e4, 1e5, 1e6)))
    assert main(["laws", "fit", str(points), "--bootstrap", "0", "--json", str(other)]) == 0
    capsys.readouterr()
    compute = ("--compute", "1e20")
    assert "power_const is a law of N, which does not split compute into size and tokens" in refused(
        *compute, "--law", str(other)
    )
    assert "there is no such file; give one that `laws fit --json` wrote, or a built-in law" in refused(
        *compute, "--law", str(lost)
    )
    assert "cannot be read" in refused(*compute, "--law", str(tmp_path))
    assert "not a law" in refused(*compute, "--law", str(points))
    page.write_bytes(b"\xff\xfe\x00")
    assert "not a law" in refused(*compute, "--law", str(page))
    plain = json.loads(kept.read_text())
    for change, said in (
        ({"constants": plain["constants"] | {"alpha": math.nan}}, "alpha not a number"),
        ({"constants": plain["constants"] | {"alpha": -0.1}}, "has no best split of compute"),
        ({"constants": plain["constants"] | {"B": 0.0}}, "has no best split of compute"),
        ({"constants": {"E": 1.0}}, "no A, no alpha, no B, no beta"),
        ({"form": "chinchila"}, "no law form is called 'chinchila'; did you mean chinchilla"),
        ({"samples": [[1.0, 2.0]]}, "samples of shape (1, 2)"),
    ):
        broken.write_text(json.dumps(plain | change))
        assert said in refused(*compute, "--law", str(broken))
    assert "--law: of a training run; leave MODEL out" in refused("smollm2", "--law", str(kept))
    assert "--compute, --utilization: of a training run" in refused("smollm2", *compute, "--utilization", "0.5")
    assert "give one of flops, gpu_hours or money" in refused("--law", str(kept))


def test_a_law_of_one_variable_is_refused_in_python_too():
    with pytest.raises(OptionError, match="does not split compute"):
        pw.plan.training(1e20, law=laws.law("power", x0=10.0, alpha=0.2))
