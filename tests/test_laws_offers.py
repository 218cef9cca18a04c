"""What the room of laws offers, called as the fact sheets write it, with numbers that no sheet has.

Every expected value is worked out here from the published formula, in plain arithmetic or by brute force.
"""

import functools
import inspect
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

import pennyweight as pw
from pennyweight import laws
from pennyweight.errors import DataError, OptionError
from pennyweight.measure import kernel_theory
from pennyweight.zoo.gpt import GPT, GPTConfig

NEEDED = inspect.Parameter.empty

#: name -> arguments in order, with their defaults
OFFERED = {
    "laws.asymptote": {"points": NEEDED, "form": "power_const"},
    "train.data_constrained": {"model": NEEDED, "data": NEEDED, "tune": ("lr", "epochs", "weight_decay")},
    "merge.ensemble": {"models": NEEDED, "how": "logit_avg"},
    "distil.from_ensemble": {},
    "laws.flops.transformer": {"cfg": NEEDED},
    "laws.discontinuity": {"sizes": NEEDED, "scores": NEEDED},
    "eval.memorisation": {"model": NEEDED, "data": NEEDED, "prompt": 50, "gen": 50},
    "laws.fit": {"points": NEEDED, "form": "power_const", "axis": None},
    "laws.compare_slopes": {"a": NEEDED, "b": NEEDED, "bootstrap": 1000},
    "laws.entropy_estimate": {"points": NEEDED},
    "laws.size_for_kl": {"law": NEEDED, "nats_per_item": NEEDED, "tokens_per_item": NEEDED},
    "laws.nopt": {"domain": NEEDED, "C": NEEDED},
    "train.schedules.power": {
        "batch": NEEDED, "a": 4.0, "b": -0.51, "eta_max": 0.02, "warmup_tokens": 1e9, "decay_frac": 0.1,
    },
    "laws.lr.power": {"T": NEEDED, "batch": NEEDED},
    "measure.kernel_theory.krr": {"n": NEEDED, "eigvals": NEEDED, "coeffs2": NEEDED, "ridge": 0.0, "noise": 0.0},
    "measure.kernel_theory.rf": {"n": NEEDED, "k": NEEDED, "eigvals": NEEDED, "coeffs2": NEEDED},
    "measure.kernel_theory.optimal_ridge": {"n": NEEDED, "eigvals": NEEDED, "coeffs2": NEEDED},
    "laws.width_is_free": {"model_features": NEEDED, "data": NEEDED},
    "laws.qat_fraction": {"N": NEEDED, "D": NEEDED, "bits": NEEDED},
    "laws.fit_qat": {"runs": NEEDED},
    "train.qat": {"phases": "auto", "fuse_cooldown": True},
    "plan.bits_for_memory": {"bytes": NEEDED, "tokens": NEEDED},
    "measure.flatness": {"model": NEEDED, "data": NEEDED, "samples": 64, "params": None},
    "select.by_flatness": {"models": NEEDED, "loss_tol": 0.01},
    "data.synthesise": {"level": NEEDED, "concept_graph": NEEDED},
    "laws.tokens_to_plateau": {"law": NEEDED, "eps": NEEDED},
    "train.optim.AdamP": {"params": NEEDED, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "delta": 0.1},
    "train.optim.SGDP": {"params": NEEDED, "momentum": 0.0, "delta": 0.1, "wd_ratio": 0.1},
    "train.effective_step": {"model": NEEDED},
    "laws.hparams.step": {"N": NEEDED, "D": NEEDED, "seq_len": 2048},
    "laws.hparams.fit": {"grid": NEEDED},
    "plan.test_time": {"stages": NEEDED, "budget": NEEDED, "iters": 5, "batch": 10, "proposer": "insight"},
    "plan.Stage": {"models": NEEDED, "prompt_len": NEEDED, "gen_len": NEEDED, "scorer": None},
    "data.projektor": {"sources": NEEDED, "valid": NEEDED, "pilot_sizes": NEEDED, "ratios": None},
    "retrieval.datastore": {"text": NEEDED, "chunk_words": 256},
    "retrieval.scaling_curve": {"ds": NEEDED, "ps": NEEDED, "seeds": 1, "K": 1000, "k": 3},
    "laws.flops.datastore": {"n_retriever": NEEDED, "tokens": NEEDED},
    "laws.vocab.optimal": {"nonvocab_params": NEEDED, "flops": None, "method": "isoflops", "width": None},
    "measure.unigram_normalised_loss": {"model": NEEDED, "text": NEEDED},
    "laws.dcpt.fit": {"rows": NEEDED},
    "laws.dcpt.DCPT.optimal_ratio": {"N": NEEDED, "D": None, "domain_tokens": None, "general_drop": 0.03},
    "laws.dcpt.DCPT.cross_domain": {"k1": NEEDED, "k2": NEEDED},
    "arch.vit": {"patch": 16},
    "adapt.repatch": {"model": NEEDED, "new_patch": NEEDED},
    "laws.flops.vit": {"image": NEEDED, "patch": NEEDED, "d": NEEDED, "layers": NEEDED},
    "data.augment": {"strategy": NEEDED, "teacher": NEEDED, "seeds": NEEDED, "budget": NEEDED},
    "plan.augmentation": {"seeds": NEEDED, "budget": NEEDED, "costs": None},
    "laws.trajectory.fit": {"runs": NEEDED},
    "laws.trajectory.loss": {"N": NEEDED, "steps": NEEDED, "batch": NEEDED},
    "laws.trajectory.critical_batch": {"L": NEEDED},
    "laws.trajectory.steps_for": {"L": NEEDED, "N": NEEDED, "batch": NEEDED},
    "laws.trajectory.tokens_for": {"L": NEEDED, "N": NEEDED, "batch": NEEDED},
    "laws.trajectory.Trajectory.loss": {"N": NEEDED, "steps": NEEDED, "batch": NEEDED},
    "laws.trajectory.Trajectory.critical_batch": {"L": NEEDED},
    "train.schedules.wsd": {"total": NEEDED, "warmup": NEEDED, "decay_frac": 0.1, "shape": "exp"},
    "laws.fit_from_wsd": {"run": NEEDED, "branches": NEEDED},
    "laws.batch_by_loss": {"L": NEEDED},
    "train.two_stage": {"stable_data": NEEDED, "decay_data": NEEDED},
    "laws.cod.fit": {"passrates": NEEDED, "compute": NEEDED},
    "laws.cod.COD.predict": {"C": NEEDED},
    "laws.cod.COD.explain": {},
    "laws.density.reference": {"family_runs": NEEDED},
    "laws.density.Reference.effective_params": {"score": None, "loss": None},
    "laws.density.Reference.density": {"model": None},
    "laws.density.Reference.trend": {"models": NEEDED},
}  # fmt: skip
#: These have more that must be given by name; every other offer is called with what its sheet lists and nothing else.
MORE = {"train.qat", "distil.from_ensemble", "data.synthesise"}


def offered(name):
    return functools.reduce(getattr, name.split("."), pw)


@pytest.mark.parametrize("name", OFFERED)
def test_every_offer_has_its_name_and_arguments(name):
    found = {key: one for key, one in inspect.signature(offered(name)).parameters.items() if key != "self"}
    for argument, default in OFFERED[name].items():
        assert found[argument].default is default or found[argument].default == default
    positional = [key for key, one in found.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    wanted = [key for key in OFFERED[name] if key in positional]
    assert wanted == sorted(wanted, key=positional.index)
    if name not in MORE:
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        needed = [key for key, one in found.items() if one.default is NEEDED and one.kind not in kinds]
        assert set(needed) <= set(OFFERED[name])


def close(found, expected, rel=1e-9):
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), rtol=rel)


def each_kind(function, values, expected):
    """The same from a float, an int where it is one, NumPy's and torch's scalars, arrays, lists and tensors."""
    for value, wanted in zip(values, expected, strict=True):
        found = function(value)
        assert type(found) in (int, float)
        assert found == pytest.approx(wanted, rel=1e-9)
        for other in (np.float64(value), torch.tensor(value, dtype=torch.float64), np.array(value)):
            assert function(other) == pytest.approx(wanted, rel=1e-9)
        if float(value).is_integer():
            assert function(int(value)) == pytest.approx(wanted, rel=1e-9)
    for many in (list(values), np.array(values), torch.tensor(values, dtype=torch.float64)):
        assert isinstance(function(many), np.ndarray)
        close(function(many), expected)
    column = function(np.array(values)[:, None])
    assert column.shape == (len(values), 1)


def test_scalar_laws_take_numbers_arrays_and_tensors():
    each_kind(lambda t: laws.lr.power(t, 96), [3e9, 7e11], [96 * 4.6 * 3e9**-0.51, 96 * 4.6 * 7e11**-0.51])
    each_kind(lambda b: laws.lr.power(T=5e10, batch=b), [16, 640], [b * 4.6 * 5e10**-0.51 for b in (16, 640)])
    each_kind(laws.batch_by_loss, [2.5, 3.0], [1.21e9 / 2.5**6.24, 1.21e9 / 3**6.24])
    share = [math.exp(-6.7297 / math.log(d / (2e8 * 3 / 8))) for d in (3e9, 4e11)]
    each_kind(lambda d: laws.qat_fraction(2e8, d, 3), [3e9, 4e11], share)
    # the sheet's own way to write it: exp(ln S - a / ln S) / S
    s = 4e11 / (2e8 * 3 / 8)
    assert share[1] == pytest.approx(math.exp(math.log(s) - 6.7297 / math.log(s)) / s)
    assert laws.qat_fraction(1e9, 1e8, 8) == 0.0  # a tenth of a token a byte
    each_kind(lambda c: laws.nopt("math_extrapolate", c), [0.5, 20.0], [(c / 2.3e-12) ** 0.69 for c in (0.5, 20.0)])
    assert laws.nopt("Image 32x32", 3) == laws.nopt("image_32x32", 3.0) == pytest.approx((3 / 1.6e-13) ** 0.65)
    known = laws.law("power_const", L_inf=2.1, x0=55.0, alpha=0.3)
    each_kind(lambda k: laws.size_for_kl(known, k, 300), [0.5, 4.0], [55 * (k / 300) ** (-1 / 0.3) for k in (0.5, 4.0)])
    rectified = laws.law("rectified", B=900.0, D_l=12.0, beta=0.4, E=7.0)
    each_kind(lambda e: laws.tokens_to_plateau(rectified, e), [1.5, 3.0], [(900 / e - 12) ** 2.5 for e in (1.5, 3.0)])
    assert laws.tokens_to_plateau(rectified, 80.0) == 0.0
    each_kind(laws.trajectory.critical_batch, [2.2, 5.0], [2.1e8 / v ** (1 / 0.21) for v in (2.2, 5.0)])
    sizes = [5e8, 2e10]
    budgets = [(n / math.exp(-2.4846510161625193)) ** 2 for n in sizes]
    expected = [
        int(math.exp(-1.589031299255507) * f**0.4163622634135234 / d)
        for f, d in zip(budgets, (1024, 5120), strict=True)
    ]
    each_kind(laws.vocab.optimal, sizes, expected)


def test_schedules_take_steps_of_any_kind():
    rate = pw.train.schedules.wsd(8000, 400, 0.25, "1-sqrt", peak=6e-3)
    expected = [6e-3 * 100 / 400, 6e-3, 6e-3 * (1 - math.sqrt(500 / 2000))]
    each_kind(rate, [100, 3000, 6500], expected)
    linear = pw.train.schedules.wsd(total=8000, warmup=400, decay_frac=0.25, shape="linear")
    close(linear([7000, 8000, 9000]), [0.5, 0.0, 0.0])
    halved = pw.train.schedules.wsd(9000, 90, shape="exp", half_life=150, peak=0.02)
    assert halved(8100 + 300) == pytest.approx(0.02 / 4)
    power = pw.train.schedules.power(batch=640, a=3.5, b=-0.49, eta_max=0.015, warmup_tokens=2e9, decay_frac=0.1)
    top = lambda n: min(0.015, 640 * 3.5 * n**-0.49)  # noqa: E731  a formula
    each_kind(power, [5e8, 4e9, 3e12], [0.25 * top(2e9), top(4e9), top(3e12)])
    with pytest.raises(OptionError, match="give 0 or more"):
        rate(np.array([5, -1]))


def test_step_law_is_its_formula_at_any_shape():
    sizes, tokens = np.array([3e8, 3e9]), np.array([2e10, 6e11])
    lr = np.exp(0.5863078) * sizes**-0.7129223 * tokens**0.3074910
    batch = np.exp(-0.5435422) * tokens**0.5709444
    found = laws.hparams.step(sizes, tokens, seq_len=4096)
    close(found.lr, lr)
    close(found.batch_tokens, batch)
    close(found.batch_seqs, batch / 4096)
    one = laws.hparams.step(N=300_000_000, D=20_000_000_000)
    assert all(type(value) is float for value in one[:3])
    assert one.lr == pytest.approx(lr[0])
    assert one.lr == pytest.approx(1.79 * 3e8**-0.713 * 2e10**0.307, rel=0.02)  # as printed, rounded
    assert one.batch_tokens == pytest.approx(0.58 * 2e10**0.571, rel=0.02)
    # twice as wide a tolerance, a plateau sqrt(2) wider in the logarithm
    wider = laws.hparams.step(3e8, 2e10, tolerance=0.005).plateau
    assert math.log(wider.lr.high / one.lr) == pytest.approx(math.sqrt(2) * math.log(one.plateau.lr.high / one.lr))
    with pytest.raises(OptionError, match="give a positive number"):
        laws.hparams.step(np.array([1e9, 0.0]), 1e11)


def test_step_law_is_found_again_from_its_own_grid(tmp_path):
    lines = ["N,D,lr,batch_seqs,loss"]
    for n in (1e8, 4e8, 2e9):
        for d in (5e9, 4e10, 2e11):
            lr, batch = 3.0 * n**-0.6 * d**0.25, 0.9 * d**0.5
            for i in np.linspace(-1, 1, 9):
                for j in np.linspace(-1, 1, 9):
                    loss = 2 + 0.05 * (i * i + j * j)
                    lines.append(f"{n},{d},{lr * math.exp(i)},{batch * math.exp(j) / 2048},{loss}")
    path = tmp_path / "grid.csv"
    path.write_text("\n".join(lines) + "\n")
    found = laws.hparams.fit(path, bootstrap=0)
    close([found.lr_params, found.lr_tokens, found.batch_tokens], [-0.6, 0.25, 0.5], rel=1e-6)
    close([math.exp(found.lr_constant), math.exp(found.batch_constant)], [3.0, 0.9], rel=1e-6)


def kaplan(n, s, b, loss):
    critical = 2.1e8 / loss ** (1 / 0.21)
    return (6.5e13 / n) ** 0.077 + (2.1e3 * (1 + critical / b) / s) ** 0.76 - loss


def test_trajectory_solves_its_implicit_loss():
    for n, s, b in ((3e7, 2e4, 2e5), (5e9, 8e4, 3e6)):
        truth = brentq(lambda loss, n=n, s=s, b=b: kaplan(n, s, b, loss), 1.0, 60.0, xtol=1e-13)
        assert laws.trajectory.loss(n, s, b) == pytest.approx(truth, rel=1e-9)
        assert laws.trajectory.steps_for(truth, n, b) == pytest.approx(s, rel=1e-7)
        assert laws.trajectory.tokens_for(L=truth, N=n, batch=b) == pytest.approx(s * b, rel=1e-7)
    close(laws.trajectory.steps_for(2.9, np.array([3e8, 3e9]), 5e5),
          [laws.trajectory.steps_for(2.9, n, 5e5) for n in (3e8, 3e9)])  # fmt: skip
    batch = laws.trajectory.critical_batch(2.7)
    least = laws.trajectory.steps_for(2.7, 1e9, 1e15)
    assert laws.trajectory.steps_for(2.7, 1e9, batch) == pytest.approx(2 * least, rel=1e-6)
    with pytest.raises(DataError, match="do not reach a loss"):
        laws.trajectory.steps_for(1.0, 1e6, 1e5)


def test_kernel_theory_satisfies_its_own_equations():
    values, squares = np.arange(1, 3001) ** -1.3, np.arange(1, 3001) ** -1.7
    found = kernel_theory.krr(n=100, eigvals=torch.tensor(values), coeffs2=list(squares), ridge=0.3, noise=0.2)
    learned = values / (values + found.kappa)
    assert learned.sum() + 0.3 / found.kappa == pytest.approx(100, rel=1e-9)
    e0 = 100 / (100 - (learned**2).sum())
    test = e0 * (((1 - learned) ** 2 * squares).sum() + 0.2)
    close([found.e0, found.test, found.train], [e0, test, (0.3 / (100 * found.kappa)) ** 2 * test])
    wide = kernel_theory.rf(n=100, k=80, eigvals=values, coeffs2=squares, ridge=0.3, noise=0.2)
    learned = values / (values + wide.gamma)
    z, q = learned.sum(), (learned**2).sum()
    assert z + 0.3 / wide.kappa == pytest.approx(100, rel=1e-8)
    assert z + 80 * wide.kappa / wide.gamma == pytest.approx(80, rel=1e-8)
    bias = (((1 - learned) - wide.kappa * values / (values + wide.gamma) ** 2 * 80 / (80 - q)) * squares).sum()
    test = (bias + 0.2) / (1 - (q * (80 - 2 * z) + z * z) / (100 * (80 - q)))
    close([wide.test, wide.train], [test, (0.3 / (100 * wide.kappa)) ** 2 * test], rel=1e-7)
    for k in (40, 80, math.inf):
        best = kernel_theory.optimal_ridge(n=100, eigvals=values, coeffs2=squares, noise=0.2, k=k)
        around = [kernel_theory.rf(100, k, values, squares, best.ridge * f, 0.2).test for f in (0.5, 0.9, 1.1, 2.0)]
        assert best.test < min(around)
        assert best.test == pytest.approx(kernel_theory.rf(100, k, values, squares, best.ridge, 0.2).test)


def test_vocabulary_by_parametric_loss_is_the_least_of_a_fine_grid():
    size, flops, width = 1.7e9, 3e21, 2048
    grid = np.exp(np.linspace(math.log(2e3), math.log(2e6), 20001))
    tokens = flops / 1e15 / (6 * (size / 1e6 + grid / 1e3 * width / 1e3))
    loss = 0.19584238398665638 / (grid / 1e3 * width / 1e3) ** 0.6707374679896795
    loss += 2.1241123120064955 / tokens**0.44660634152009615
    best = grid[int(np.argmin(loss))]
    assert laws.vocab.optimal(size, flops=flops, method="parametric", width=width) == pytest.approx(best, rel=1e-3)
    slope = 3_145_728 * (size / 33e6) ** 0.8353974035228025
    assert laws.vocab.optimal(size, method="derivative", width=width) == int(slope / width)


def mixture(n, d, r, E, A, alpha, B, beta, eta, C, gamma, epsilon):
    return E + A / n**alpha + B * r**eta / d**beta + C / (r + epsilon) ** gamma


def test_mixture_ratios_are_the_best_of_a_fine_grid():
    names = ("E", "A", "alpha", "B", "beta", "eta", "C", "gamma", "epsilon")
    domain = dict(zip(names, (1.1, 0.3, 0.45, 0.06, 0.35, 1.6, 0.25, 0.5, 0.12), strict=True))
    general = dict(zip(names, (1.9, 0.4, 0.5, 0.05, 0.3, 1.3, 0.2, 0.45, 0.07), strict=True))
    found = laws.dcpt.given(domain, general)
    r = np.linspace(0, 1, 400_001)
    losses = mixture(2.5, 20, 1 - r, **general)
    for drop in (0.02, 0.08):
        allowed = r[losses <= (1 + drop) * mixture(2.5, 20, 1.0, **general)].max()
        answer = found.optimal_ratio(2.5, D=20, general_drop=drop)
        assert float(answer) == answer.ratio == pytest.approx(allowed, abs=5e-6)
        assert answer.domain_loss == pytest.approx(mixture(2.5, 20, answer.ratio, **domain))
    scarce = {**domain, "B": 0.7}
    r = r[1:]
    best = r[int(np.argmin(mixture(2.5, 1.5 / r, r, **scarce)))]
    assert laws.dcpt.given(scarce).optimal_ratio(N=2.5, domain_tokens=1.5).ratio == pytest.approx(best, abs=1e-4)
    close(found.loss(np.array([1.0, 2.0]), 10, 0.5), [mixture(n, 10, 0.5, **domain) for n in (1.0, 2.0)])


def test_density_inverts_score_and_loss():
    a, alpha, b, beta, c, gamma, middle, d = 0.3, 0.25, 0.9, 0.3, 0.7, -12.0, 0.35, 0.2
    family = laws.density.given(
        laws.law("reference", a=a, alpha=alpha, b=b, beta=beta),
        laws.law("sigmoid_of_loss", c=c, gamma=gamma, l=middle, d=d), D0=500.0,
    )  # fmt: skip
    loss = a * 3.0**-alpha + b * 900.0**-beta
    score = c / (1 + math.exp(-gamma * (loss - middle))) + d
    effective = ((loss - b * 500.0**-beta) / a) ** (-1 / alpha)
    assert family.score(3, 900) == pytest.approx(score)
    assert family.effective_params(score) == pytest.approx(effective, rel=1e-9)
    assert family.effective_params(loss=loss) == pytest.approx(effective, rel=1e-9)
    assert family.density({"params": 3, "score": score}) == pytest.approx(effective / 3)
    assert family.density({"N": 3, "loss": loss}) == pytest.approx(effective / 3)
    assert family.density({"params": 3, "score": 0.1}).bound == "at most"
    models = [{"t": t, "params": 2.0, "score": family.score(2.0 * math.exp(0.004 * t), 500)} for t in (0, 90, 200)]
    assert family.trend(models).A == pytest.approx(0.004)
    assert family.trend(models).doubling_days == pytest.approx(math.log(2) / 0.004)


def test_reference_families_are_found_again():
    runs = [
        {"N": n, "D": d, "loss": 0.4 * n**-0.2 + 1.3 * d**-0.35} for n in (0.05, 0.2, 0.8) for d in (1.0, 5.0, 25.0)
    ]
    family = laws.density.reference(runs, D0=10.0)
    close([family.a, family.alpha, family.b, family.beta], [0.4, 0.2, 1.3, 0.35], rel=1e-4)
    assert family.density({"params": 0.2, "loss": 0.4 * 0.2**-0.2 + 1.3 * 10**-0.35}) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("form", "constants", "x"),
    [
        ("power", {"x0": 700.0, "alpha": 0.2}, np.geomspace(1e3, 1e7, 8)),
        ("power_const", {"L_inf": 1.4, "x0": 90.0, "alpha": 0.35}, np.geomspace(1e3, 1e8, 10)),
        ("rectified", {"B": 300.0, "D_l": 20.0, "beta": 0.45, "E": 9.0}, np.geomspace(1e2, 1e8, 16)),
        ("exp_decay", {"floor": 0.8, "height": 2.2, "rate": 0.07}, np.linspace(0, 90, 16)),
        ("acc_exp", {"a": 4.0, "b": 0.4, "c": 0.2, "g": 0.2}, np.geomspace(1, 1e4, 16)),
        ("logn_projection", {"intercept": 0.2, "slope": 0.05}, np.geomspace(10, 1e5, 6)),
    ],
)
def test_forms_of_one_variable_are_found_again(form, constants, x):
    formulas = {
        "power": lambda x0, alpha: (x0 / x) ** alpha,
        "power_const": lambda L_inf, x0, alpha: L_inf + (x0 / x) ** alpha,
        "rectified": lambda B, D_l, beta, E: B / (D_l + x**beta) + E,
        "exp_decay": lambda floor, height, rate: floor + height * np.exp(-rate * x),
        "acc_exp": lambda a, b, c, g: g + (1 - g) * np.exp(-a * x**-b - c),
        "logn_projection": lambda intercept, slope: intercept + slope * np.log(x),
    }
    y = formulas[form](**constants)
    close(laws.law(form, **constants)(x), y)
    found = laws.fit((x, y), form=form)
    assert found.params == found.constants
    close([found.params[name] for name in constants], list(constants.values()), rel=1e-2)
    close(found(x), y, rel=1e-4)
    wanted = float(y[3])
    assert found.inverse("x", wanted) == pytest.approx(x[3], rel=1e-2) if form in ("power", "power_const") else True


def test_points_come_from_a_file_a_table_or_tensors(tmp_path):
    rows = [(n, 1.6 + (40 / n) ** 0.4) for n in (1e2, 1e3, 1e4, 1e5, 1e6)]
    path = tmp_path / "runs.csv"
    path.write_text("N,loss\n" + "".join(f"{n},{loss!r}\n" for n, loss in rows))
    for points in (path, str(path), rows, np.array(rows), torch.tensor(rows, dtype=torch.float64),
                   {"N": [n for n, _ in rows], "loss": [y for _, y in rows]}):  # fmt: skip
        law = laws.fit(points, form="power_const", axis="N")
        assert law.L_inf == pytest.approx(1.6, rel=1e-4)
        assert law(N=100) == pytest.approx(rows[0][1])
    assert float(laws.asymptote(rows)) == laws.asymptote(rows).E == pytest.approx(1.6, rel=1e-4)
    assert float(laws.entropy_estimate(rows, bootstrap=20)) == pytest.approx(1.6, rel=1e-4)


def test_slopes_and_jumps():
    x = np.geomspace(1e3, 1e7, 9)
    g = np.random.default_rng(4)
    one, two = (np.stack([x, 5 * x**-k * np.exp(0.002 * g.standard_normal(9))], 1) for k in (0.11, 0.07))
    found = laws.compare_slopes(one, two, bootstrap=400)
    for slope, points in ((found.a, one), (found.b, two)):
        assert slope.slope == pytest.approx(np.polyfit(np.log10(x), np.log10(points[:, 1]), 1)[0])
        assert slope.interval.low < slope.slope < slope.interval.high
    assert found.difference == pytest.approx(found.a.slope - found.b.slope)
    assert found.distinct
    # a line in log size through (2e8, 31) and (5e9, 38), at 4e11
    expected = 38 + 7 * math.log(80) / math.log(25)
    assert laws.discontinuity(torch.tensor([2e8, 5e9, 4e11]), [31, 38, 61]) == pytest.approx(61 - expected, rel=1e-6)
    assert laws.discontinuity([4e11, 2e8, 5e9], np.array([61, 31, 38])) == pytest.approx(61 - expected)


def test_accounting_counts_modules():
    config = {"d": 40, "layers": 3, "heads": 5, "kv": 1, "ff": 96, "vocab": 77}
    cost = laws.flops.transformer(config)
    block = 40 * 40 + 2 * 40 * 8 + 40 * 40 + 3 * 40 * 96 + 2 * 40
    assert cost.params == 3 * block + 40 + 77 * 40
    assert laws.flops.transformer({"n_embd": 40, "n_layer": 3, "n_head": 5, "num_key_value_heads": 1,
                                   "intermediate_size": 96, "vocab_size": 77}) == cost  # fmt: skip
    assert cost.flops_per_token(128) == 6 * cost.params + 12 * 3 * 5 * 8 * 128
    assert cost.mfu(1e6, peak=1e13, context=128) == pytest.approx(1e6 * cost.flops_per_token(128) / 1e13)
    model = pw.arch.vit(patch=3, image=12, channels=2, width=20, depth=2, num_heads=2, classes=5)
    counted = laws.flops.vit(image=12, patch=3, d=20, layers=2, channels=2, classes=5)
    assert counted.tokens == model.config.tokens == 16
    assert counted.params == sum(p.numel() for p in model.parameters())
    assert laws.flops.datastore(n_retriever=3e8, tokens=2e11) == 2 * 3e8 * 2e11


def tiny(seed=0):
    config = GPTConfig(width=8, depth=1, num_heads=2, vocabulary=16, context=16)
    return GPT(config, generator=torch.Generator().manual_seed(seed))


def test_offers_that_train_are_called_as_their_sheets_write_them():
    ids = torch.randint(0, 16, (24, 9), generator=torch.Generator().manual_seed(1))
    source = tiny()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    tuned = pw.train.data_constrained(source, (ids[:16], ids[16:]), tune=("lr",), epochs=1, batch=8, most=3)
    assert len(tuned.history) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())  # it is copied
    stable, late = pw.train.Samples(torch.zeros(6, 1)), pw.train.Samples(torch.ones(4, 1))
    mixed = pw.train.two_stage(stable, late)
    assert mixed.take(0, 6)[0].sum() == 0
    assert mixed.take(6, 8)[0].sum() == 4  # half of what follows
    with pytest.raises(OptionError, match="have no length"):
        pw.train.two_stage(mixed, late)
    trace, error = pw.measure.flatness(torch.nn.Linear(2, 1, bias=False), (torch.eye(2), torch.zeros(2, 1)), samples=50)
    assert abs(trace - 1.0) <= 4 * error + 1e-6  # the Hessian of half a mean square over eye(2) is eye(2) / 2
    assert pw.train.effective_step(model=source).norms
    choice = pw.plan.bits_for_memory(bytes=5e8, tokens=4e10)
    assert choice.params * choice.bits == pytest.approx(8 * 5e8)


def test_a_datastore_is_studied_without_a_model_or_questions():
    g = np.random.default_rng(0)
    topics = [[f"t{topic}w{word}" for word in range(12)] for topic in range(10)]
    texts = [" ".join(g.choice(topics[at % 10], 20)) for at in range(200)]
    store = pw.retrieval.datastore(texts, chunk_words=20)
    curve = pw.retrieval.scaling_curve(store, [0.0, 0.05, 1.0], [0, 1], K=1000, k=3)
    nothing, few, all_of_them = (point.loss for point in curve)
    assert all_of_them < min(nothing, few) - 0.1
    # nobody reads the passage that is asked about: of a lone one nothing is found
    alone = pw.retrieval.datastore(["alpha beta gamma delta"])
    assert pw.retrieval.scaling_curve(alone, [1.0])[0].failures == 1


def test_budgets_of_samples_by_their_formula():
    stage = pw.plan.Stage(models=[1e9, 7e9], prompt_len=300, gen_len=40, scorer=lambda size, samples: samples)
    assert stage.cost(7e9, 5) == pytest.approx((7 / 3 * (300 + 5 * 40) - 128) / 64)
    found = pw.plan.test_time(stages=[stage], budget=20, iters=5, batch=10, proposer="insight")
    most = math.floor(((64 * 20 + 128) / (1 / 3) - 300) / 40)
    assert found.choice == ((1e9, min(60, most)),)


def test_clusters_extrapolate_what_made_them():
    compute = np.array([1, 3, 9, 27, 81, 243.0])
    g = np.random.default_rng(2)
    curve = lambda a, b, c: lambda x: 0.25 + 0.75 * np.exp(-a * np.asarray(x) ** -b - c)  # noqa: E731  a formula
    truths = [curve(1.8, 0.4, 0.05), curve(7.0, 0.5, 0.1)]
    rates = np.concatenate([t(compute) + 0.01 * g.standard_normal((40, 6)) for t in truths]).clip(0, 1)
    found = laws.cod.fit(passrates=torch.tensor(rates), compute=list(compute))
    assert sorted(found.predictable_items) == list(range(80))
    assert found.predict(C=2430) == pytest.approx(np.mean([t(2430) for t in truths]), abs=0.02)
    assert "cluster 1" in found.explain()


def test_lines_in_the_logarithm_go_through_both_pilots():
    from pennyweight.data.transport import project

    assert project(700, 700, 5000, 0.41, 0.58) == pytest.approx(0.41)
    assert project(5000, 700, 5000, 0.41, 0.58) == pytest.approx(0.58)
    slope = (0.58 - 0.41) / math.log(5000 / 700)
    assert project(20_000, 700, 5000, 0.41, 0.58) == pytest.approx(0.41 + slope * math.log(20_000 / 700))


def test_branches_of_a_stable_run_cost_what_they_add():
    branches = [
        {"N": n, "D": d, "decay_tokens": 0.1 * d, "loss": 0.9 + 0.5 * n**-0.3 + 0.8 * d**-0.25}
        for n in (0.1, 0.4, 1.6) for d in (5, 10, 20, 40)
    ]  # fmt: skip
    found = laws.fit_from_wsd([{"N": n, "tokens": 40} for n in (0.1, 0.4, 1.6)], branches)
    law = found.law
    close([law.C_N, law.alpha, law.C_D, law.beta, law.L0], [0.5, 0.3, 0.8, 0.25, 0.9], rel=1e-3)
    assert found.tokens_spent == pytest.approx(3 * (40 + 7.5))
    assert found.tokens_separate == pytest.approx(3 * 75)
