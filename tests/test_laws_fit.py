"""The forms and the fitter, against finite differences, SciPy, closed forms and a published replication."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from pennyweight import laws
from pennyweight.errors import DataError, OptionError, UnitError
from pennyweight.laws.forms import all_forms, find
from pennyweight.laws.table import read_csv

TABLES = Path(__file__).parent / "data" / "laws"
FORMS = {form.name: form for form in all_forms()}


def draw(form, count, points, seed=0):
    g = np.random.default_rng(seed)
    low, high = np.array([p.start for p in form.parameters]).T
    x = np.stack([g.uniform(0.2, 1.0, points) for _ in form.variables])
    return low + (high - low) * g.random((count, len(low))), x


def chinchilla_points(drop=5):
    table = {name: np.array(column, float) for name, column in read_csv(TABLES / "chinchilla_points.csv").items()}
    kept = np.argsort(table["loss"])[: len(table["loss"]) - drop]
    return {name: column[kept] for name, column in table.items()}


def huber_sum(constants, points):
    """The objective written out once more, without the package's forms."""
    n, d = points["params"], points["train_flop"] / (6 * points["params"])
    loss = constants["E"] + constants["A"] / n ** constants["alpha"] + constants["B"] / d ** constants["beta"]
    return scipy.special.huber(1e-3, np.log(loss) - np.log(points["loss"])).sum()


@pytest.mark.parametrize("name", FORMS)
def test_gradient_is_that_of_finite_differences(name):
    form = FORMS[name]
    theta, x = draw(form, 5, 9)
    value, slope = form.evaluate(theta, x)
    np.testing.assert_allclose(form.value(theta, x), value, rtol=1e-12)
    for p, step in enumerate(1e-6 * np.eye(theta.shape[1])):
        numeric = (form.value(theta + step, x) - form.value(theta - step, x)) / 2e-6
        np.testing.assert_allclose(slope[..., p], numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FORMS)
def test_natural_and_internal_parameters_are_inverse(name):
    theta, _ = draw(FORMS[name], 5, 3)
    np.testing.assert_allclose(FORMS[name].internal(FORMS[name].natural(theta)), theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_rescaling_units_keeps_the_law(name):
    form = FORMS[name]
    theta, x = draw(form, 5, 9)
    scale = np.array([0.7 if v.grows else 0.0 for v in form.variables])
    target = 0.3 if form.space == "log" else 0.0
    moved = form.value(form.rescaled(theta, scale, target), x / np.exp(scale)[:, None])
    np.testing.assert_allclose(moved, form.value(theta, x) - target, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_inverse_undoes_the_law(name):
    form = FORMS[name]
    theta, x = draw(form, 1, 7)
    law = laws.Law(form, dict(zip(form.names, form.natural(theta)[0].tolist(), strict=True)))
    point = {v.name: values for v, values in zip(form.variables, x, strict=True)}
    target = law(**point)
    tried = 0
    for variable in form.variables:
        if not variable.grows and form.name.startswith("dcpt"):
            continue  # no closed form in the ratio
        others = {k: v for k, v in point.items() if k != variable.name}
        try:
            form.inverse(law.parameters, variable.name, np.asarray(target), others)
        except OptionError:
            continue
        np.testing.assert_allclose(law.inverse(variable.name, target, **others), point[variable.name], rtol=1e-6)
        tried += 1
    assert tried or form.name.startswith(("qat", "bit_level"))  # every variable in several terms


def test_chinchilla_fit_meets_the_published_replication():
    law = laws.fit(chinchilla_points(), "chinchilla")
    assert law.report.objective <= 0.0010183
    assert law.report.points == 240
    assert law.E == pytest.approx(1.81724, abs=0.003)
    assert law.alpha == pytest.approx(0.347313, abs=0.003)
    assert law.beta == pytest.approx(0.367183, abs=0.003)
    assert law.report.objective == pytest.approx(huber_sum(law.constants, chinchilla_points()), rel=1e-9)


def test_chinchilla_fit_beats_the_published_constants():
    points = chinchilla_points()
    exact = {"E": math.exp(0.5267228), "A": math.exp(6.0073404), "B": math.exp(6.0179186)}
    exact |= {"alpha": 0.33917084, "beta": 0.2849083}
    rounded = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    assert huber_sum(exact, points) == pytest.approx(0.00123116, rel=1e-4)
    assert huber_sum(rounded, points) == pytest.approx(0.00412101, rel=1e-4)
    assert laws.fit(points, "chinchilla").report.objective < huber_sum(exact, points)


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_fit_is_the_optimum_of_scipy_from_many_starts(noise):
    g = np.random.default_rng(7)
    n, d = 10 ** g.uniform(7, 10, 245), 10 ** g.uniform(8.5, 11.5, 245)
    loss = (1.69 + 406.4 / n**0.34 + 410.7 / d**0.28) * np.exp(noise * g.standard_normal(245))
    law = laws.fit({"N": n, "D": d, "loss": loss}, "chinchilla", holdout=False)
    log_n, log_d, log_l = np.log(n), np.log(d), np.log(loss)

    def objective(theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([np.broadcast_to(e, log_n.shape), a - alpha * log_n, b - beta * log_d])
        value = scipy.special.logsumexp(terms, axis=0)
        gap = value - log_l
        pull, share = np.clip(gap, -1e-3, 1e-3), np.exp(terms - value)
        slope = [share[1], share[2], share[0], -share[1] * log_n, -share[2] * log_d]
        # times 1000: at its own size the objective lies under the optimizer's default tolerances
        return 1e3 * scipy.special.huber(1e-3, gap).sum(), 1e3 * np.array([(pull * s).sum() for s in slope])

    starts = [
        (a, b, e, p, q) for a in (3, 8) for b in (3, 8) for e in (0.2, 0.7) for p in (0.2, 0.5) for q in (0.2, 0.5)
    ]
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-12}
    found = min(scipy.optimize.minimize(objective, s, jac=True, method="L-BFGS-B", options=options).fun for s in starts)
    assert law.report.objective <= found / 1e3 + 1e-8
    assert law.report.objective >= found / 1e3 - 1e-6  # the same valley, not another objective


def test_given_starts_are_used():
    points = chinchilla_points()
    starts = [
        [e, a, p, b, q]
        for e in (1.0, 2.0)
        for a in (50, 900)
        for p in (0.2, 0.6)
        for b in (50, 900)
        for q in (0.2, 0.6)
    ]
    law = laws.fit(points, "chinchilla", starts=starts, holdout=False)
    assert law.report.starts == len(starts)
    assert law.report.objective <= 0.0010183


@pytest.mark.parametrize(
    "name", ["power", "power_const", "chinchilla", "reference", "kaplan_LNS", "rectified", "exp_decay"]
)
def test_noiseless_points_give_back_their_law(name):
    form = FORMS[name]
    low, high = np.array([p.start for p in form.parameters]).T
    theta = (low + 0.6 * (high - low))[None]
    g = np.random.default_rng(3)
    x = np.stack([10 ** g.uniform(-1.5, 1.5, 60) for _ in form.variables])
    law = laws.fit(
        dict(zip([v.name for v in form.variables], x, strict=True)) | {form.target: np.exp(form.value(theta, x))[0]},
        form,
    )
    np.testing.assert_allclose(law.parameters, form.natural(theta)[0], rtol=1e-4)


def test_units_of_the_points_do_not_matter():
    points = chinchilla_points()
    tokens = points["train_flop"] / (6 * points["params"])
    raw = laws.fit({"N": points["params"], "D": tokens, "loss": points["loss"]}, "chinchilla", holdout=False)
    billions = {"N": points["params"] / 1e9, "D": tokens / 1e9, "loss": points["loss"]}
    small = laws.fit(billions, "chinchilla", holdout=False)
    assert small.report.objective == pytest.approx(raw.report.objective, rel=1e-8)
    assert small(N=1.0, D=20.0) == pytest.approx(raw(N=1e9, D=2e10), rel=1e-6)
    said = laws.fit(billions, "chinchilla", units={"N": 1e9, "D": 1e9}, holdout=False)
    assert said.A == pytest.approx(raw.A, rel=1e-4)


def test_least_squares_when_asked():
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    y = np.exp([0.3, 0.1, 0.05, -0.4])
    law = laws.fit((x, y), "power", delta=math.inf)
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    assert -law.alpha == pytest.approx(slope, rel=1e-9)
    assert law.alpha * math.log(law.x0) == pytest.approx(intercept, rel=1e-9)


def test_outliers_hardly_move_the_fit():
    x = np.geomspace(1, 1e4, 30)
    y = 2.0 + (50 / x) ** 0.4
    spoilt = y.copy()
    spoilt[[-2, -5]] *= 1.3
    assert laws.fit((x, spoilt), "power_const").L_inf == pytest.approx(2.0, abs=0.005)
    assert abs(laws.fit((x, spoilt), "power_const", delta=math.inf).L_inf - 2.0) > 0.05


def test_bootstrap_intervals_cover():
    covered = {"L_inf": 0, "alpha": 0, "prediction": 0}
    for seed in range(30):
        g = np.random.default_rng(seed)
        x = np.geomspace(1, 1e4, 40)
        y = (2.0 + (50 / x) ** 0.4) * np.exp(0.01 * g.standard_normal(40))
        law = laws.fit((x, y), "power_const", bootstrap=100, starts=128, survivors=2, holdout=False, seed=seed)
        for name, truth in (("L_inf", 2.0), ("alpha", 0.4)):
            low, high = law.report.intervals[name]
            covered[name] += low <= truth <= high
        predicted = law.predict(1e3)
        covered["prediction"] += predicted.interval.low <= 2.0 + (50 / 1e3) ** 0.4 <= predicted.interval.high
    assert all(24 <= count for count in covered.values()), covered  # 28.5 expected at 95 %
    assert min(covered.values()) < 30  # and they are not all the numbers there are


def test_a_thousand_bootstraps_are_quick_and_repeatable():
    points = chinchilla_points()
    law = laws.fit(points, "chinchilla", bootstrap=1000, holdout=False)
    assert law.report.seconds < 60
    assert law.samples.shape == (1000, 5)
    few = [laws.fit(points, "chinchilla", bootstrap=20, starts=256, holdout=False).report.intervals for _ in range(2)]
    assert few[0] == few[1]
    low, high = law.report.intervals["alpha"]
    assert low < law.alpha < high
    assert 0.3 < low < high < 0.4  # the replication's own standard errors are near 0.02


def test_largest_runs_are_held_out():
    x = np.geomspace(1e3, 1e8, 20)
    y = 2.64 + (280 / x) ** 0.22
    y[-2:] *= 1.10
    law = laws.fit((x, y), "power_const")
    assert law.report.held_out_points == 2
    assert law.report.held_out_error == pytest.approx(1 - 1 / 1.10, abs=0.01)


def test_receipt_marks_extrapolation_and_refuses_when_asked():
    law = laws.fit(chinchilla_points(), "chinchilla", holdout=False)
    inside = law.predict(N=1e9, D=2e10)
    assert inside.receipt.warning is None
    assert inside.receipt.extrapolation.factor == 1
    beyond = law.predict(N=1e12, D=2e10)
    assert beyond.receipt.extrapolation.factor == pytest.approx(1e12 / law.fit_range["N"][1])
    assert "N lies 61.8 times outside" in beyond.receipt.warning
    with pytest.raises(
        DataError, match=r"refused: N lies 61\.8 times outside the fitted range, more than the declared 10"
    ):
        law.predict(N=1e12, D=2e10, beyond="refuse")
    assert law.predict(N=1e12, D=2e10, max_factor=100, beyond="refuse").value == beyond.value
    text = json.dumps(beyond.receipt.to_json())
    assert json.loads(text)["fit"]["points"] == 240
    assert "not known" in laws.law("power", x0=1.0, alpha=0.1).receipt().warning


def test_out_of_distribution_points_get_their_own_law():
    x = np.geomspace(1e3, 1e8, 8)
    law = laws.fit((x, (1e9 / x) ** 0.05), form="power", axis="N", ood=(x, (1e9 / x) ** 0.02))
    assert law.alpha == pytest.approx(0.05, rel=1e-6)
    assert law.ood.alpha == pytest.approx(0.02, rel=1e-6)
    assert law(N=1e6) == pytest.approx(1000**0.05)


@pytest.mark.parametrize(
    ("points", "form", "error", "words"),
    [
        ({"N": [1, 2], "D": [3, 5], "loss": [3, 2]}, "chinchilla", DataError, "2 distinct points for 5 parameters"),
        ({"x": [1, 2, 3], "loss": [2.0, 2.0, 2.0]}, "power", DataError, "the target is 2 in every point"),
        ({"x": [5, 5, 5], "loss": [2.0, 2.1, 2.2]}, "power", DataError, "x is 5 in every point"),
        ({"x": [1, 2, 3], "loss": [2.0, -0.1, 1.0]}, "power", DataError, "-0.1 in point 2.*CRPS"),
        ({"x": [1, -2, 3], "loss": [2.0, 1.5, 1.0]}, "power", DataError, "x .*is -2 in point 2 of 3"),
        ({"x": [1, math.nan, 3], "loss": [2.0, 1.5, 1.0]}, "power", DataError, "x .*is nan in point 2 of 3"),
        ({"x": [1, 2, 3], "loss": [2.0, math.inf, 1.0]}, "power", DataError, "not a finite number"),
        ({"x": [1, 2, 3], "score": [2.0, 1.5, 1.0], "z": [1, 2, 3]}, "power", DataError, "no column 'loss' to predict"),
        ({"x": [1, 2, "1.4T"], "loss": [2.0, 1.5, 1.0]}, "power", DataError, "column x.*plain numbers"),
        (
            [[1, 2, 3, 4], [4, 5, 6, 7], [7, 8, 9, 1]],
            "power",
            DataError,
            r"shape \(3, 4\): power takes rows of 2 numbers",
        ),
        ({"x": [1, 2, 3], "loss": [3, 2, 1]}, "powr", OptionError, "did you mean power"),
    ],
)
def test_bad_points_are_named(points, form, error, words):
    with pytest.raises(error, match=words):
        laws.fit(points, form)


def test_mixed_units_and_a_fixed_ratio_are_refused():
    g = np.random.default_rng(0)
    n, d = 10 ** g.uniform(7, 9, 20), 10 ** g.uniform(0, 2, 20)
    loss = 2 + 100 / n**0.3 + 1 / d**0.3
    with pytest.raises(UnitError, match="D looks like billions"):
        laws.fit({"N": n, "D": d, "loss": loss}, "chinchilla")
    with pytest.raises(DataError, match="N and D only vary together"):
        laws.fit({"N": n, "D": 20 * n, "loss": loss}, "chinchilla")


def test_a_vanished_floor_is_said():
    x = np.geomspace(1, 1e6, 20)
    law = laws.fit((x, (3 / x) ** 0.1), "power_const")
    assert any("L_inf" in note for note in law.report.notes)


def test_as_many_points_as_parameters_is_said():
    law = laws.fit(([1.0, 10.0, 100.0], [3.0, 2.5, 2.3]), "power_const")
    assert any("nothing checks the law" in note for note in law.report.notes)


def test_csv_in_and_errors(tmp_path):
    good = tmp_path / "runs.csv"
    good.write_text("N,loss\n1e3,2.474\n1e6,2.025\n1e8,1.772\n")
    law = laws.fit_csv(good, "power", axis="N")
    assert law.alpha == pytest.approx(0.029, rel=2e-3)
    assert law.axis == "N"
    bad = tmp_path / "bad.csv"
    bad.write_text("N,loss\n1e3,2.4\n1e6\n")
    with pytest.raises(DataError, match=r"bad\.csv line 3: 1 fields where the header names 2"):
        laws.fit_csv(bad, "power")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        laws.fit_csv(tmp_path / "none.csv", "power")
    (tmp_path / "empty.csv").write_text("N,loss\n")
    with pytest.raises(DataError, match="0 rows below the header"):
        laws.fit_csv(tmp_path / "empty.csv", "power")


def test_rows_by_name_and_axis():
    rows = [{"N": x, "loss": (1e9 / x) ** 0.1, "seed": 1} for x in (1e3, 1e5, 1e7)]
    assert laws.fit(rows, form="power", axis="N").alpha == pytest.approx(0.1, rel=1e-6)
    with pytest.raises(OptionError, match="axis = 'N' has no effect"):
        laws.fit(rows, form="chinchilla", axis="N")


def test_registry_and_receipts_for_the_command_line():
    cards = {card.name: card for card in laws.registry()}
    assert {"chinchilla", "power_const", "rectified", "dcpt", "vocab", "acc_exp", "kaplan_LNSB", "qat"} <= set(cards)
    assert all(card.formula and card.summary and card.parameters for card in cards.values())
    assert laws.show("power").row == 42
    found = laws.predict_receipt("power", {"x0": 100.0, "alpha": 0.5}, {"x": 4.0})
    assert found.value == pytest.approx(5.0)
    with pytest.raises(UnitError, match="x = '4T' is no plain number"):
        laws.predict_receipt("power", {"x0": 100.0, "alpha": 0.5}, {"x": "4T"})
    with pytest.raises(OptionError, match="no alpha"):
        laws.predict_receipt("power", {"x0": 100.0}, {"x": 4.0})


def test_law_says_what_it_depends_on():
    law = laws.law("chinchilla", E=1.8, A=400, alpha=0.34, B=2000, beta=0.36)
    with pytest.raises(OptionError, match="a law of N, D"):
        law(N=1e9)
    with pytest.raises(OptionError, match="unknown gamma"):
        laws.law("power", x0=1.0, alpha=0.1, gamma=2.0)
    assert law(1e9, 2e10) == law(N=1e9, D=2e10)
    assert law(N=np.array([1e8, 1e9]), D=2e10).shape == (2,)
    assert find("chinchilla") is law.form
