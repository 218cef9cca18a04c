"""The published laws, row by row, against values computed from their formulae and tables by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis.strategies import floats

from pennyweight import laws
from pennyweight.errors import BudgetError, DataError, OptionError
from pennyweight.laws import (
    datastore,
    dcpt,
    density,
    flops,
    henighan,
    hparams,
    infinite,
    minicpm,
    optimal,
    trajectory,
    vocab,
)

TABLES = Path(__file__).parent / "data" / "laws"
FITTED = laws.law("chinchilla", E=1.817218, A=477.83, alpha=0.347311, B=2143.42, beta=0.367172)


def rows(name):
    with (TABLES / name).open(newline="") as file:
        return list(csv.DictReader(file))


# optimum of a budget


def test_chinchilla_optimum_of_the_sheet():
    best = optimal.allocate(FITTED, 1e20)
    assert best.N == pytest.approx(8.55e8, rel=1e-3)
    assert best.D == pytest.approx(1.949e10, rel=1e-3)
    assert best.ratio == pytest.approx(22.80, abs=0.01)
    assert best.loss == pytest.approx(2.5521, abs=1e-4)
    assert optimal.allocate(FITTED, 5.76e23).N == pytest.approx(7.319e10, rel=1e-3)
    rounded = laws.law("chinchilla", E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
    assert optimal.allocate(rounded, 1e20).ratio == pytest.approx(40.08, abs=0.01)


@given(log_flops=floats(17, 26), a=floats(0.1, 0.8), b=floats(0.1, 0.8))
def test_closed_optimum_is_the_least_loss_on_its_own_contour(log_flops, a, b):
    law = laws.law("chinchilla", E=1.7, A=400.0, alpha=a, B=900.0, beta=b)
    best = optimal.allocate(law, 10**log_flops)
    assert best.train_flops == pytest.approx(10**log_flops, rel=1e-9)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert law(N=best.N * factor, D=best.D / factor) >= best.loss


def test_optimum_without_closed_form_agrees_with_it():
    twin = laws.law("minicpm", L0=FITTED.E, C_N=FITTED.A, alpha=FITTED.alpha, C_D=FITTED.B, beta=FITTED.beta)
    assert optimal.allocate(twin, 1e21).N == pytest.approx(optimal.allocate(FITTED, 1e21).N, rel=1e-5)


def test_limits_bind_and_are_named():
    free = optimal.allocate(FITTED, 1e21)
    small = optimal.allocate(FITTED, 1e21, max_params=free.N / 2)
    assert (small.N, small.binding) == (free.N / 2, "max_params")
    assert small.train_flops == pytest.approx(1e21)
    stored = optimal.allocate(FITTED, 1e21, max_bytes=free.N / 4, bits=4)
    assert stored.N == pytest.approx(free.N / 2)
    scarce = optimal.allocate(FITTED, 1e21, max_tokens=free.D / 10)
    assert (scarce.D, scarce.binding) == (free.D / 10, "max_tokens")
    both = optimal.allocate(FITTED, 1e21, max_tokens=free.D / 10, max_params=free.N)
    assert (both.N, both.D) == (free.N, free.D / 10)
    assert both.binding == "max_tokens and max_params"
    assert optimal.allocate(FITTED, 1e21, max_params=2 * free.N, max_tokens=2 * free.D).binding is None


def test_inference_makes_the_best_model_smaller():
    plain, served = optimal.allocate(FITTED, 1e21), optimal.allocate(FITTED, 1e21, inference_tokens=1e12)
    assert served.N < plain.N
    assert served.total_flops == pytest.approx(1e21, rel=1e-9)
    for factor in (0.97, 1.03):
        size = served.N * factor
        assert FITTED(N=size, D=(1e21 - 2 * size * 1e12) / (6 * size)) >= served.loss
    back = optimal.cheapest(FITTED, served.loss, inference_tokens=1e12)
    assert back.total_flops == pytest.approx(1e21, rel=1e-6)
    with pytest.raises(BudgetError, match=r"does not reach a loss of 1\.5"):
        optimal.cheapest(FITTED, 1.5)


def test_optimum_carries_intervals():
    truth = optimal.allocate(FITTED, 1e20)
    covered = dict.fromkeys(("N", "D", "ratio", "loss"), 0)
    for seed in range(10):
        g = np.random.default_rng(seed)
        n, d = 10 ** g.uniform(7, 10, 100), 10 ** g.uniform(8, 12, 100)
        loss = FITTED(N=n, D=d) * np.exp(0.003 * g.standard_normal(100))
        table = {"N": n, "D": d, "loss": loss}
        law = laws.fit(table, "chinchilla", bootstrap=100, starts=512, survivors=4, holdout=False)
        best = optimal.allocate(law, 1e20)
        for name in covered:
            covered[name] += best.intervals[name].low <= getattr(truth, name) <= best.intervals[name].high
    assert all(count >= 7 for count in covered.values()), covered  # 9.5 expected at 95 %
    with pytest.raises(OptionError, match="is a law of x"):
        optimal.allocate(laws.law("power", x0=1, alpha=0.1), 1e20)


# row 34: accounting


def test_palm_totals_are_exact():
    sizes = {(4096, 32, 16): 8_631_877_632, (18432, 118, 48): 540_354_281_472}
    for shape, params in sizes.items():
        assert flops.transformer(flops.palm(*shape)).params == params
    largest = flops.transformer(flops.palm(18432, 118, 48))
    assert largest.mfu(238.3e3, peak=6144 * 275e12, context=2048) == pytest.approx(0.4623, abs=5e-5)
    assert largest.training(780e9) == pytest.approx(2.5288e24, rel=5e-5)
    by_hand = 238.3e3 * (6 * 540_354_281_472 + 12 * 118 * 48 * 256 * 2048) / (6144 * 275e12)
    again = flops.mfu(238.3e3, 540_354_281_472, peak=6144 * 275e12, layers=118, heads=48, head_dim=256, context=2048)
    assert again == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("cfg", "params"),
    [
        ({"d_model": 1536, "layers": 52, "heads": 24, "kv_heads": 8, "d_ff": 3840}, 1_247_442_432),
        ({"d_model": 2304, "layers": 40, "heads": 36, "d_ff": 5760}, 2_442_057_984),
        ({"d_model": 256, "layers": 8, "heads": 4, "kv_heads": 1, "d_ff": 640}, 5_247_232),
        ({"d_model": 512, "layers": 12, "heads": 8, "kv_heads": 2, "d_ff": 1280}, 31_470_080),
    ],
)
def test_published_non_embedding_counts(cfg, params):
    # rows 146 (MiniCPM) and 250 (reference family; its second size with two of eight key heads)
    assert flops.transformer(cfg).non_embedding == params


def test_counts_equal_a_real_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        config = LlamaConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
            vocab_size=97, tie_word_embeddings=tied,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        assert flops.transformer(config).params == sum(p.numel() for p in model.parameters())


def test_matmul_flops_agree_with_a_counter():
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160,
        vocab_size=101, attn_implementation="eager",
    )  # fmt: skip
    model, length = LlamaForCausalLM(config).eval(), 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    counted = flops.transformer(config).forward_matmul_flops(length) * length
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.01)


def test_experts_count_once_stored_and_twice_active():
    dense = flops.transformer({"d_model": 64, "layers": 2, "heads": 4, "d_ff": 128})
    sparse = flops.transformer({"d_model": 64, "layers": 2, "heads": 4, "d_ff": 128, "experts": 8, "active_experts": 2})
    expert, router = 3 * 64 * 128, 64 * 8
    assert sparse.params - dense.params == 2 * (7 * expert + router)
    assert sparse.active - dense.params == 2 * (expert + router)


def test_units_and_vision():
    assert flops.datastore(177e6, 1.4e12) == pytest.approx(4.956e20)
    assert flops.pf_days(flops.from_pf_days(3.5)) == 3.5
    assert flops.PF_DAY == 8.64e19
    assert flops.device_hours(1e15 * 3600, peak=1e15, utilization=0.5) == pytest.approx(2.0)
    assert (flops.vit(224, 16, 768, 12).tokens, flops.vit(224, 1, 768, 12).tokens) == (196, 50_176)
    base = flops.vit(224, 16, 768, 12, classes=1000, class_token=True)
    assert base.params == 86_567_656  # ViT-B/16
    assert base.forward_flops == pytest.approx(2 * 17.56e9, rel=0.01)  # published as 17.6 G multiply-adds
    assert flops.vit(224, 1, 192, 12).attention_share > 0.95
    assert flops.vit(224, 1, 192, 12, mixer="linear").attention_share == 0
    with pytest.raises(OptionError, match="patches of 15 do not tile an image of 224"):
        flops.vit(224, 15, 192, 12)
    with pytest.raises(OptionError, match="unknown depth"):
        flops.transformer({"d_model": 64, "depth": 2, "layers": 2, "heads": 4})


def test_discontinuity_is_the_surprise_of_the_largest():
    assert laws.discontinuity([8e9, 64e9, 512e9], [10.0, 20.0, 30.0]) == pytest.approx(0.0, abs=1e-9)
    assert laws.discontinuity([512e9, 8e9, 64e9], [45.0, 10.0, 20.0]) == pytest.approx(15.0)
    with pytest.raises(DataError, match="at least three"):
        laws.discontinuity([1, 2], [1, 2])


# row 21


def test_asymptote_from_four_points():
    sizes = [0.15, 0.3, 0.6, 1.4]
    found = laws.asymptote([(n, 0.05 / n**1.02 + 3.43) for n in sizes], form="power_const")
    assert (found.A, found.alpha, found.E) == pytest.approx((0.05, 1.02, 3.43), rel=1e-3)
    assert found(0.3) == pytest.approx(3.60, abs=5e-3)
    with pytest.raises(OptionError, match="no fitted floor"):
        laws.asymptote([(1, 2), (2, 1.5), (3, 1.2)], form="power")


def test_joint_limit_takes_members_first():
    points = {n: [(k, 3.17 + 0.04 / n**0.9 + 0.2 / k) for k in (1, 2, 3, 5, 8)] for n in (0.15, 0.3, 0.6, 1.4)}
    outer, inner = infinite.joint_limit(points)
    assert outer.E == pytest.approx(3.17, abs=1e-3)
    assert inner[0.3].E == pytest.approx(3.17 + 0.04 / 0.3**0.9, abs=1e-3)


def test_data_efficiency_and_retained_gain():
    standard = laws.law("power_const", L_inf=1.9, x0=1e6, alpha=0.24)
    assert laws.data_efficiency(standard(5e8), 1e8, standard) == pytest.approx(5.0)
    assert math.isinf(laws.data_efficiency(1.8, 1e8, standard))
    assert infinite.retained(3.6, 3.36, 3.32) == pytest.approx(0.24 / 0.28)


# row 42


def test_time_series_laws_of_the_table():
    by_hand = {("encoder", "ID"): (2.474, 2.025, 1.772), ("decoder", "ID"): (2.948, 2.658, 2.480)}
    for row in rows("tsfm_fits.csv"):
        key = (row["arch"], row["test_set"])
        if row["axis"] != "N" or key not in by_hand:
            continue
        law = laws.law("power", x0=float(row["x0"]), alpha=float(row["exponent"]), axis="N")
        assert [law(N=n) for n in (1e3, 1e6, 1e8)] == pytest.approx(by_hand[key], abs=1e-3)
        again = laws.fit([(n, law(N=n)) for n in (1e3, 1e6, 1e8)], form="power", axis="N")
        assert again.alpha == pytest.approx(law.alpha, rel=1e-6)
        assert math.log(again.x0) == pytest.approx(math.log(law.x0), rel=1e-6)


def test_slopes_are_compared_with_intervals():
    g = np.random.default_rng(0)
    x = np.geomspace(1e3, 1e9, 60)
    steep = (1e16 / x) ** 0.05 * np.exp(0.01 * g.standard_normal(60))
    flat = (1e16 / x) ** 0.02 * np.exp(0.01 * g.standard_normal(60))
    found = laws.compare_slopes((x, steep), (x, flat), bootstrap=1000)
    line = scipy.stats.linregress(np.log10(x), np.log10(steep))
    assert found.a.slope == pytest.approx(line.slope, rel=1e-9)
    assert found.a.decade_ratio == pytest.approx(10**line.slope)
    assert found.distinct
    assert found.interval.low < -0.03 < found.interval.high
    assert not laws.compare_slopes((x, steep), (x, steep)).distinct
    with pytest.raises(DataError, match="at or below 0"):
        laws.compare_slopes((x, steep - 2.5), (x, flat))


# row 50


def test_henighan_table_and_its_readings():
    for row in rows("henighan_table1.csv"):
        printed = [float(value) if value else None for name, value in row.items() if name != "domain"]
        assert list(henighan.DOMAINS[row["domain"]]) == printed
    assert henighan.curve("image_8x8")(1e7) == pytest.approx(3.1798, abs=5e-5)
    assert henighan.curve("language")(1e9) == pytest.approx(2.2999, abs=5e-5)
    assert henighan.curve("video_vq_16x16x16")(1e9) == pytest.approx(1.0964, abs=5e-5)
    assert laws.nopt("language", 1.0) == pytest.approx(1.293e9, rel=5e-4)
    assert laws.nopt("image_32x32", 1.0) == pytest.approx(2.076e8, rel=5e-4)
    assert laws.size_for_kl(henighan.curve("image_16x16", "C"), 1, 768) == pytest.approx(1.6e-8 * 768 ** (1 / 0.16))
    assert 2.64 * 768 == pytest.approx(2028, abs=1)
    with pytest.raises(OptionError, match="no domain is called 'music'"):
        laws.nopt("music", 1.0)


def test_henighan_fit_and_entropy():
    x = np.geomspace(1e4, 1e9, 12)
    truth = henighan.curve("image_16x16")
    law = laws.fit((x, truth(x)), "power_const")
    assert (law.L_inf, law.x0, law.alpha) == pytest.approx((2.64, 280, 0.22), rel=0.01)
    noisy = truth(x) * np.exp(0.002 * np.random.default_rng(1).standard_normal(12))
    found = laws.entropy_estimate((x, noisy))
    assert found.value == pytest.approx(2.64, abs=0.03)
    assert found.interval.low < 2.64 < found.interval.high
    assert found.law.report.held_out_error < found.without.report.held_out_error


# row 52


def test_power_learning_rate():
    assert laws.lr.power(10e12, 1024, a=4.6) == pytest.approx(0.00110, abs=5e-6)
    assert laws.lr.switch(512) == pytest.approx(6.670e9, rel=1e-4)
    assert laws.lr.power(laws.lr.switch(512), 512, a=4.0) == pytest.approx(0.02)
    assert laws.lr.power(1.0, 512, eta_max=0.02) == 0.02


# row 55


def test_qat_share():
    for s, share in ((10, 0.0538), (100, 0.2319), (5000, 0.4538)):
        assert laws.qat_fraction(8, s, 1) == pytest.approx(share, abs=5e-5)
    assert laws.qat_fraction(1e6, 1e7, 4) == pytest.approx(math.exp(math.log(20) - 6.7297 / math.log(20)) / 20)
    assert laws.qat_fraction(1e9, 1e8, 8) == 0.0


@given(log_s=floats(0.01, 80), more=floats(0.01, 20))
def test_qat_share_rises_toward_one(log_s, more):
    low, high = laws.qat_fraction(8, math.exp(log_s), 1), laws.qat_fraction(8, math.exp(log_s + more), 1)
    assert 0 <= low <= high < 1
    assert laws.qat_fraction(8, 1e300, 1) > 0.98


PLANTED = {
    "E": 1.8, "beta": 2000.0, "gamma": 0.36, "zeta": 400.0, "eta": 0.34, "theta": 0.5, "kappa": 1.0, "phi": 60.0,
    "chi": 0.9, "psi": 0.15, "omega": 0.4, "lambda": 3.0, "mu": 0.5, "nu": 0.1, "xi": 0.3, "rho": 0.2,
}  # fmt: skip


def test_qat_law_recovers_a_planted_optimum():
    form = laws.forms.find("qat")
    truth = laws.qat.QATLaw(laws.Law(form, PLANTED), laws.Law(form, PLANTED))
    g = np.random.default_rng(0)
    runs = []
    for n in (1e7, 3e7, 1e8, 3e8):
        for ratio in (10, 40, 160):
            for bits in (1, 2, 4, 6):
                for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.9):
                    d = n * ratio
                    loss = float(truth.loss(n, (1 - share) * d, share * d, bits)) * math.exp(3e-4 * g.standard_normal())
                    runs.append({"N": n, "D_fp": (1 - share) * d, "D_qat": share * d, "bits": bits, "loss": loss})
    found = laws.fit_qat(runs)
    assert found.law.report.held_out_error < found.plain.report.held_out_error
    for n, d, bits in ((1e8, 1e10, 4), (2e8, 1e10, 2), (5e7, 5e9, 4)):
        assert found.best_split(n, d, bits).fraction == pytest.approx(truth.best_split(n, d, bits).fraction, rel=0.05)
    width, params, split = found.bits_for_memory(5e7, 1e10)
    assert params == 5e7 * 8 / width
    losses = {b: truth.best_split(5e7 * 8 / b, 1e10, b).loss for b in (1, 2, 3, 4, 6, 8)}
    assert width == min(losses, key=losses.get)
    assert split.loss == pytest.approx(losses[width], rel=2e-3)
    with pytest.raises(DataError, match="needs both phases"):
        laws.fit_qat([{**runs[0], "D_fp": 0.0}])


# row 59


def test_rectified_law_explains_the_table():
    table = rows("synthllm_table1.csv")
    tokens = np.array([float(r["synthetic_tokens"]) for r in table])
    error = 100 - np.array([float(r["predicted_math_accuracy_pct"]) for r in table])
    law = laws.fit({"D": tokens, "error": error}, form="rectified")
    assert np.abs(law(tokens) - error).max() < 0.05
    plain = laws.fit((tokens, error), form="power_const")
    assert np.abs(plain(tokens) - error).max() > 0.15
    early = laws.fit({"D": tokens[:4], "error": error[:4]}, form="rectified")
    assert np.abs(early(tokens[4:]) - error[4:]).max() < 0.5
    near = laws.tokens_to_plateau(law, 1.0)
    assert law(near) - law.E == pytest.approx(1.0)
    assert laws.tokens_to_plateau(law, 100.0) == 0.0
    with pytest.raises(OptionError, match="eps = 0"):
        laws.tokens_to_plateau(law, 0)


# row 63


def test_step_law_of_the_sheet():
    found = hparams.step(7e9, 1.4e12, 2048)
    assert found.lr == pytest.approx(9.347e-4, rel=1e-4)
    assert found.batch_tokens == pytest.approx(4_996_961, rel=1e-5)
    assert found.batch_seqs == pytest.approx(2439.9, abs=0.1)
    lr, batch, _, plateau = hparams.step(1e9, 1e11)
    assert (lr, batch) == pytest.approx((1.662e-3, 1_107_467), rel=1e-3)
    assert plateau.lr.low < lr < plateau.lr.high
    assert plateau.batch_tokens.low < batch < plateau.batch_tokens.high
    with pytest.raises(OptionError, match="seq_len = 0"):
        hparams.step(1e9, 1e11, seq_len=0)


def planted_grid(noise=0.0):
    g = np.random.default_rng(0)
    grid = []
    for n, d in ((1e8, 2e9), (1e8, 2e10), (4e8, 8e9), (4e8, 4e10), (1e9, 2e10), (1e9, 1e11)):
        best_lr, best_batch = 2.0 * n**-0.7 * d**0.3, 0.5 * d**0.57
        for x in np.linspace(-1.5, 1.5, 13):
            for y in np.linspace(-1.5, 1.5, 13):
                bowl = 0.5 * (0.013 * x * x - 2 * 0.005 * x * y + 0.012 * y * y)
                loss = 2.5 * (1 + bowl) * math.exp(noise * g.standard_normal())
                lr, batch = best_lr * math.exp(x), best_batch * math.exp(y)
                grid.append({"N": n, "D": d, "lr": lr, "batch_tokens": batch, "loss": loss})
    return grid


def test_step_law_is_recovered_from_a_planted_grid():
    grid = planted_grid()
    found = hparams.fit(grid, bootstrap=200)
    assert (found.lr_params, found.lr_tokens, found.batch_tokens) == pytest.approx((-0.7, 0.3, 0.57), abs=1e-6)
    assert math.exp(found.lr_constant) == pytest.approx(2.0, rel=1e-6)
    noisy = hparams.fit(planted_grid(0.0005), bootstrap=500)
    lr, batch = noisy.intervals(2e9, 2e11)
    assert lr.low < 2.0 * 2e9**-0.7 * 2e11**0.3 < lr.high
    assert batch.low < 0.5 * 2e11**0.57 < batch.high
    one = [row for row in grid if row["N"] == 4e8 and row["D"] == 8e9]
    bowl = hparams.landscape(*([row[k] for row in one] for k in ("lr", "batch_tokens", "loss")))
    assert bowl.lr == pytest.approx(2.0 * 4e8**-0.7 * 8e9**0.3, rel=1e-6)
    np.testing.assert_allclose(bowl.curvature, [[0.013, -0.005], [-0.005, 0.012]], atol=1e-9)
    with pytest.raises(DataError, match="two sizes and two token counts"):
        hparams.fit(one)


# row 67


def test_datastore_survival():
    assert datastore.failure(100, 0.1) == pytest.approx(0.00194, abs=5e-6)
    assert datastore.failure(1000, 0.001) == pytest.approx(0.920, abs=5e-4)
    with pytest.raises(DataError, match=r"retrieve 8\d\d\d or more"):
        datastore.check(1000, 0.001)
    depth = datastore.depth(0.1)
    assert datastore.failure(depth, 0.1) <= datastore.TOLERATED < datastore.failure(depth - 1, 0.1)


# row 74


def test_vocabulary_sizes_of_the_sheet():
    printed = {3e9: (39367, 42538, 36648), 7e9: (62280, 67450, 59547), 70e9: (211860, 230861, 217961)}
    for size, expected in printed.items():
        found = [vocab.optimal(size, method=m) for m in ("isoflops", "derivative", "parametric")]
        assert found == pytest.approx(expected, abs=2)
    for size, width, root in ((33e6, 512, 10322.85), (302e6, 1024, 32776.6), (2.87e9, 3200, 65928.3)):
        found = vocab.derivative_root(size, width)
        assert found == pytest.approx(root, rel=2e-6)
        cost = [vocab.flops(size, found * f, 1.0, embed_dim=width) for f in (0.99, 1.0, 1.01)]
        assert cost[1] < min(cost[0], cost[2])
    assert vocab.optimal(7e9, method="parametric", flops=1e21) < vocab.optimal(7e9, method="parametric", flops=1e23)
    with pytest.raises(OptionError, match="flops has no effect on the derivative method"):
        vocab.optimal(7e9, flops=1e22, method="derivative")
    with pytest.raises(OptionError, match="give isoflops, derivative or parametric"):
        vocab.optimal(7e9, method="guess")


def test_unigram_normalized_loss():
    model, unigram = np.log([0.5, 0.25, 0.1]), np.log([0.1, 0.25, 0.2])
    expected = -(math.log(5) + 0 + math.log(0.5)) / 3
    assert vocab.unigram_normalized(model, unigram) == pytest.approx(expected)


# row 85


DOMAIN = {"E": 1.2, "A": 0.4, "alpha": 0.5, "B": 0.05, "beta": 0.4, "eta": 1.5, "C": 0.2, "gamma": 0.6, "epsilon": 0.1}
GENERAL = {
    "E": 2.0,
    "A": 0.5,
    "alpha": 0.4,
    "B": 0.04,
    "beta": 0.35,
    "eta": 1.4,
    "C": 0.15,
    "gamma": 0.5,
    "epsilon": 0.05,
}


def test_mixture_law_of_the_sheet():
    found = dcpt.given(DOMAIN, GENERAL)
    r = np.array([0, 0.25, 0.5, 1])
    np.testing.assert_allclose(found.loss(1.8, 10, r), [2.294357, 1.876113, 1.776911, 1.706931], atol=5e-7)
    general = found.general(N=1.8, D=10, r=r)
    np.testing.assert_allclose(general, [3.066060, 2.671667, 2.604271, 2.559492], atol=5e-7)
    assert found.optimal_ratio(1.8, 10, general_drop=0.01).ratio == pytest.approx(0.357287, abs=1e-6)
    assert found.optimal_ratio(1.8, 10, general_drop=0.05).ratio == pytest.approx(0.782680, abs=1e-6)
    limited = dcpt.given({**DOMAIN, "B": 0.6}).optimal_ratio(1.8, domain_tokens=1.0)
    assert (limited.ratio, limited.domain_loss) == pytest.approx((0.345320, 1.902674), abs=1e-6)
    assert limited.violations  # this law rises with r: the optimum is there to be doubted
    assert found.optimal_ratio(1.8, 10, general_drop=9.0).ratio == 1.0
    with pytest.raises(OptionError, match="one of them"):
        found.optimal_ratio(1.8)
    with pytest.raises(BudgetError, match="even without domain data"):
        found.optimal_ratio(1.8, 10, general_base=2.0)


def mixture_runs(noise=0.0):
    truth, g = dcpt.given(DOMAIN, GENERAL), np.random.default_rng(0)
    runs = []
    for n in (0.5, 1.8, 4.0):
        for d in (1, 2, 5, 10):
            for r in (0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0):
                losses = float(truth.loss(n, d, r)), float(truth.general_loss(n, d, r))
                a, b = (value * math.exp(noise * g.standard_normal()) for value in losses)
                runs.append({"N": n, "D": d, "r": r, "domain_loss": a, "general_loss": b})
    return runs


def test_mixture_fit_holds_on_an_unseen_ratio():
    runs = mixture_runs(noise=0.002)
    found = dcpt.fit([row for row in runs if row["r"] != 0.33])
    unseen = [row for row in runs if row["r"] == 0.33]
    predicted = np.array([found.loss(row["N"], row["D"], 0.33) for row in unseen])
    measured = np.array([row["domain_loss"] for row in unseen])
    assert 1 - ((predicted - measured) ** 2).sum() / ((measured - measured.mean()) ** 2).sum() > 0.99
    best = found.optimal_ratio(1.8, 10, general_drop=0.03)
    assert best.ratio == pytest.approx(dcpt.given(DOMAIN, GENERAL).optimal_ratio(1.8, 10).ratio, abs=0.03)
    assert best.violations == ()


def test_mixture_fit_is_kept_monotone():
    # losses that rise at the end by noise alone: free, the form would follow them and put the best ratio inside
    runs = [{**row, "loss": row["domain_loss"] * (1.004 if row["r"] == 1.0 else 1.0)} for row in mixture_runs()]
    runs = [{k: v for k, v in row.items() if not k.endswith("_loss")} for row in runs]
    found = dcpt.fit(runs)
    assert dcpt.violations(found.domain, 1.8, 1.0) == ()


def test_law_across_domains():
    runs, weight = [], 1.5
    for k1, k2 in ((2.0, 0.1), (3.0, 0.3), (2.5, 0.05), (4.0, 0.2)):
        for row in mixture_runs()[::3]:
            extra = 0.3 / (1 / k1 + weight * k2) ** 0.8
            runs.append(
                {"N": row["N"], "D": row["D"], "r": row["r"], "k1": k1, "k2": k2, "loss": row["domain_loss"] + extra}
            )
    found = dcpt.fit(runs, holdout=False).cross_domain(3.5, 0.15)
    truth = dcpt.given(DOMAIN).loss(1.8, 10, 0.5) + 0.3 / (1 / 3.5 + weight * 0.15) ** 0.8
    assert found(N=1.8, D=10, r=0.5) == pytest.approx(truth, rel=2e-3)
    with pytest.raises(DataError, match="3 domains"):
        dcpt.fit([row for row in runs if row["k1"] != 4.0])


# row 90


@pytest.mark.parametrize(
    ("point", "loss"), [((1e8, 1e4, 5e5), 3.374581), ((1e8, 1e5, 5e5), 2.939551), ((1e9, 1e5, 5e5), 2.550898)]
)
def test_trajectory_of_the_sheet(point, loss):
    n, steps, batch = point
    found = trajectory.loss(n, steps, batch)
    assert found == pytest.approx(loss, abs=1e-6)
    assert trajectory.steps_for(found, n, batch) == pytest.approx(steps, rel=1e-9)
    least = trajectory.KAPLAN.min_steps(steps, batch, found)
    again = (6.5e13 / n) ** 0.077 + (2.1e3 / least) ** 0.76
    assert again == pytest.approx(found, rel=1e-12)  # L stands on both sides
    if steps == 1e4:
        assert trajectory.critical_batch(found) == pytest.approx(641_042, abs=1)
        assert least == pytest.approx(4381.96, abs=0.01)


def test_trajectory_invariants():
    law = trajectory.KAPLAN
    infinite_batch = laws.law("kaplan_LNS", N_c=6.5e13, alpha_N=0.077, S_c=2.1e3, alpha_S=0.76)
    assert law.loss(1e8, 1e4, 1e30) == pytest.approx(infinite_batch(N=1e8, S=1e4), rel=1e-12)
    target = 3.2
    critical = law.critical_batch(target)
    steps = law.steps_for(target, 1e8, critical)
    assert steps == pytest.approx(2 * law.min_steps(steps, critical, target))
    assert law.tokens_for(target, 1e8, critical) == pytest.approx(2 * law.min_tokens(steps, critical, target))
    with pytest.raises(DataError, match="do not reach a loss of 1"):
        law.steps_for(1.0, 1e8, 1e6)


def test_trajectory_is_recovered_from_small_runs():
    runs = [
        {"N": n, "S": s, "B": b, "loss": float(trajectory.C4.loss(n, s, b)) if s > 100 else 9.0}
        for n in (1e6, 4e6) for b in (3e4, 2e5, 2e6) for s in (50, *np.geomspace(500, 2e4, 12))
    ]  # fmt: skip
    found = trajectory.fit(runs, warmup_steps=100)
    for n, s, b in ((2e7, 2e4, 1e5), (2e7, 2e3, 1e6)):
        assert found.loss(n, s, b) == pytest.approx(float(trajectory.C4.loss(n, s, b)), rel=1e-3)


# row 146


def test_minicpm_law():
    assert laws.batch_by_loss(3.0) == pytest.approx(1.275e6, rel=1e-3)
    assert laws.batch_by_loss(4.0) == pytest.approx(2.118e5, rel=1e-3)
    for row in rows("minicpm_fits.csv"):
        law = laws.law("minicpm", **{name: float(row[name]) for name in ("C_N", "alpha", "C_D", "beta", "L0")})
        found = minicpm.optimum(law, 6 * 240)
        assert found.eta == pytest.approx(float(row["eta_printed"]), abs=0.06)
        assert law(N=found.N, D=found.D) <= min(law(N=found.N * f, D=found.D / f) for f in (0.9, 1.1))
        if row["corpus"] == "average":
            assert found.tokens_per_param == pytest.approx(191.8, abs=0.1)
        if row["corpus"] == "ultratext":
            assert found.tokens_per_param == pytest.approx(91.2, abs=0.1)
            assert law(N=2, D=120) == pytest.approx(0.3807, abs=5e-5)


def test_law_from_branches_of_stable_runs():
    truth = laws.law("minicpm", C_N=0.0715, alpha=0.29, C_D=0.3, beta=0.23, L0=0.31)
    runs = [{"N": n, "tokens": 54 * n} for n in (0.04, 0.1, 0.3, 1.0)]
    branches = []
    for run in runs:
        for k in (10, 20, 30, 40, 50, 60):
            d = k * run["N"]
            branches.append({"N": run["N"], "D": d, "decay_tokens": 0.1 * d, "loss": truth(N=run["N"], D=d)})
    found = laws.fit_from_wsd(runs, branches)
    assert found.law(N=2, D=120) == pytest.approx(truth(N=2, D=120), rel=1e-4)
    assert found.saving > 2.5
    one = laws.fit_from_wsd(runs[0], [b for b in branches if b["N"] == 0.04])
    assert one.law(branches[5]["D"]) == pytest.approx(branches[5]["loss"], rel=1e-4)
    with pytest.raises(DataError, match="branch 1 decays from"):
        laws.fit_from_wsd(runs[0], [{"D": 10.0, "decay_tokens": 0.1, "loss": 1.0}])


# row 154


def adjusted_rand(a, b):
    table = np.array([[((a == i) & (b == j)).sum() for j in np.unique(b)] for i in np.unique(a)])
    pairs = lambda count: (count * (count - 1) / 2).sum()  # noqa: E731
    both, left, right, total = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), len(a) * (len(a) - 1) / 2
    return (both - left * right / total) / ((left + right) / 2 - left * right / total)


FAMILIES = ((1.5, 0.5, 0.02), (3, 0.45, 0.05), (6, 0.4, 0.05), (12, 0.45, 0.1), (30, 0.6, 0.05))


def benchmark(seed):
    g = np.random.default_rng(seed)
    compute = np.geomspace(1, 300, 8)
    item, family, target = [], [], []
    for label, (a, b, c) in enumerate(FAMILIES):
        for _ in range(90):
            scale = a * math.exp(0.06 * g.standard_normal())
            item.append(0.25 + 0.75 * np.exp(-scale * compute**-b - c))
            target.append(0.25 + 0.75 * np.exp(-scale * 3000**-b - c))
            family.append(label)
    for label, level in ((5, 0.25), (6, 0.6)):  # items that no size solves, and items no size gets better at
        for _ in range(75):
            item.append(np.full(8, level))
            target.append(level)
            family.append(label)
    rates = g.binomial(100, np.array(item)) / 100
    return rates, compute, np.array(family), float(np.mean(target))


def test_difficulty_clusters_are_found():
    law = laws.law("acc_exp", a=5, b=0.3, c=0.1, g=0.25)
    assert [law(c) for c in (1, 10, 100, 1e4)] == pytest.approx([0.254573, 0.305375, 0.443278, 0.745018], abs=5e-7)
    for seed in range(3):
        rates, compute, family, truth = benchmark(seed)
        found = laws.cod.fit(rates, compute)
        assert adjusted_rand(found.labels, family) > 0.8
        kept = family[found.predictable_items]
        assert (kept == 6).mean() < 0.02  # the flat family is dropped
        assert abs(found.predict(3000) - truth) < 0.06
        assert "extrapolated" in found.explain()
        assert "flat" in found.explain()
    with pytest.raises(DataError, match="at least 5 models"):
        laws.cod.fit(rates[:, :4], compute[:4])


def test_mapping_is_monotone_and_calibrated():
    subset = np.linspace(0.2, 0.8, 9)
    mapping = laws.cod.fit_mapping(subset, 0.7 * subset + 0.05, share=0.7)
    assert mapping.rmse < 0.005
    assert (np.diff(mapping(np.linspace(0, 1, 200))) >= -1e-12).all()
    assert mapping(0.0) == 0.0
    assert mapping(0.9) == pytest.approx(0.7 * 0.9 + 0.05, abs=0.01)  # beyond: only the kept items gain


# row 250


PAPER = density.Reference(a=0.25, alpha=0.30, b=1.0, beta=0.28, c=0.65, gamma=-18, l=0.30, d=0.25, D0=1000)


def test_density_of_the_sheet():
    assert PAPER.score(7, 1000) == pytest.approx(0.621504, abs=5e-7)
    assert PAPER.density(params=7, score=PAPER.score(7, 1000)) == pytest.approx(1.0)
    longer = PAPER.score(7, 2000)
    assert longer == pytest.approx(0.691060, abs=5e-7)
    assert PAPER.effective_params(longer) == pytest.approx(13.7226, abs=5e-5)
    assert PAPER.density({"params": 7, "score": longer}) == pytest.approx(1.96037, abs=5e-6)
    assert PAPER.effective_params(0.60) == pytest.approx(5.885797, abs=5e-7)
    assert PAPER.effective_params(loss=PAPER.loss(3, 1000)) == pytest.approx(3.0)
    assert PAPER.per_byte(7 * 2, score=PAPER.score(7, 1000)) == pytest.approx(0.5)


def test_density_returns_bounds_where_it_has_no_number():
    far = PAPER.effective_params(PAPER.score(70, 15000))
    assert (far.bound, math.isinf(far)) == ("at least", True)
    assert "better than a reference model of any size" in far.reason
    assert PAPER.effective_params(0.95).bound == "at least"
    chance = PAPER.density(params=7, score=0.25)
    assert (chance, chance.bound) == (0.0, "at most")
    assert PAPER.effective_params(0.6).bound is None
    with pytest.raises(OptionError, match="one of them"):
        PAPER.effective_params()


def test_density_reference_is_fitted_and_trend_found():
    family = [
        {"N": n, "D": n * k, "loss": PAPER.loss(n, n * k), "score": PAPER.score(n, n * k)}
        for n in (0.005, 0.031, 0.106, 0.245, 0.477, 0.828) for k in (10, 15, 20, 30, 40, 60)
    ]  # fmt: skip
    found = density.reference(family, D0=1000)
    assert found.effective_params(0.60) == pytest.approx(5.885797, rel=1e-3)
    assert found.largest == 0.828
    trend = density.trend([(t, math.exp(0.0073 * t)) for t in range(0, 1000, 100)])
    assert trend.doubling_days == pytest.approx(94.95, abs=0.01)
    beaten = [(t, math.exp(0.0073 * t) * (0.4 if t % 200 else 1.0)) for t in range(0, 1000, 100)]
    assert density.trend(beaten).A == pytest.approx(0.0073)  # models below the record do not count
    assert density.effective_doubling(99, 766) == pytest.approx(88, abs=0.5)
