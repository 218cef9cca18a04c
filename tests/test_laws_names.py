"""Every name that the room of laws offers is there under exactly that name, and computes what hand and sheet say."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pennyweight as pw
from pennyweight import adapt, arch, data, distil, laws, merge, plan, retrieval, select, train
from pennyweight.measure import flatness, kernel_theory, unigram_normalised_loss
from pennyweight.zoo.gpt import GPT, GPTConfig

HERE = Path(__file__).parent


def tiny(seed=0, width=8, vocabulary=16):
    config = GPTConfig(width=width, depth=1, num_heads=2, vocabulary=vocabulary, context=16)
    return GPT(config, generator=torch.Generator().manual_seed(seed))


def ids(count, length=9, vocabulary=16, seed=0):
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def test_row_21_infinite_compute():
    found = laws.asymptote([(n, 3.0 + 0.2 / n) for n in (1, 2, 4, 8)], form="power_const")
    assert found.E == pytest.approx(3.0, abs=1e-4)
    one, two = tiny(1), tiny(2)
    both = merge.ensemble([one, two], how="logit_avg")
    windows = ids(3)
    logits = torch.stack([m(windows).log_softmax(-1) for m in (one, two)]).mean(0)
    normalizer = logits.exp().sum(-1)
    assert bool((normalizer <= 1 + 1e-6).all())
    torch.testing.assert_close(both(windows), logits - normalizer.log()[..., None])
    # (.7, .2, .1) and (.2, .5, .3): p = (.43326, .36617, .20056), Z = 0.863599, loss of class 0 = 0.836409

    class Fixed(torch.nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p = torch.tensor(p)

        def forward(self, x):
            return self.p.log().expand(*x.shape, 3)

    pair = merge.ensemble([Fixed([0.7, 0.2, 0.1]), Fixed([0.2, 0.5, 0.3])])(torch.zeros(1, 1, dtype=torch.long))[0, 0]
    torch.testing.assert_close(pair.exp(), torch.tensor([0.43326, 0.36617, 0.20056]), atol=1e-5, rtol=0)
    assert -float(pair[0]) == pytest.approx(0.836409, abs=1e-6)
    losses = distil.from_ensemble([one, two], tiny(3), train.Samples(ids(16)), steps=20, batch=8, warmup=2)
    assert losses[-1] < losses[0]
    tuned = train.data_constrained(
        lambda: tiny(0), (ids(16), ids(4, seed=1)), tune=("lr", "weight_decay"), epochs=2, batch=8, most=5
    )
    assert tuned.loss == min(loss for _, loss in tuned.history)
    assert len(tuned.history) <= 5


def test_row_34_palm():
    cost = laws.flops.transformer(laws.flops.palm(4096, 32, 16))
    assert cost.params == 8_631_877_632
    sizes = {"d_model": 18432, "layers": 118, "heads": 48, "kv_heads": 1, "head_dim": 256, "d_ff": 4 * 18432}
    big = laws.flops.transformer({**sizes, "vocab_size": 256_000, "norms": 0, "final_norm": False})
    assert big.params == 540_354_281_472
    assert big.mfu(238.3e3, peak=6144 * 275e12, context=2048) == pytest.approx(0.4623, abs=1e-4)
    # 20 at 1e9 and 30 at 1e10 make 40 at 1e11; 55 is a surprise of 15
    assert laws.discontinuity([1e9, 1e10, 1e11], [20.0, 30.0, 55.0]) == pytest.approx(15.0)


def test_row_42_time_series():
    points = [(n, (1e12 / n) ** 0.05) for n in (1e3, 1e5, 1e7)]
    law = laws.fit(points, form="power", axis="N", ood=[(n, 1.2 * y) for n, y in points])
    assert (law.alpha, law.ood.alpha) == pytest.approx((0.05, 0.05))
    assert law.ood(N=1e4) == pytest.approx(1.2 * law(N=1e4))
    assert laws.compare_slopes(points, points, bootstrap=1000).difference == pytest.approx(0, abs=1e-12)


def test_row_50_henighan():
    x = np.geomspace(1e4, 1e9, 12)
    assert laws.fit((x, 2.0 + (1e3 / x) ** 0.3), form="power_const").L_inf == pytest.approx(2.0, rel=1e-3)
    assert laws.entropy_estimate((x, 2.0 + (1e3 / x) ** 0.3)).value == pytest.approx(2.0, rel=1e-3)
    law = laws.law("power_const", L_inf=1.0, x0=10.0, alpha=0.5)
    assert laws.size_for_kl(law, 2.0, 200.0) == pytest.approx(10.0 * 100**2)
    assert laws.nopt("language", 1.0) == pytest.approx(1.293e9, rel=1e-3)
    assert laws.henighan.curve("language")(1e9) == pytest.approx(2.2999, abs=1e-4)


def test_row_52_power():
    assert laws.lr.power(10e12, 1024) == pytest.approx(0.0011, abs=5e-6)
    rate = train.schedules.power(512, total_tokens=64e9, warmup_tokens=1e9, decay_frac=0.1)
    assert [rate(n) for n in (5e8, 5e9, 1e10, 3e10, 57.6e9, 64e9)] == pytest.approx(
        [0.0100, 0.0200, 0.016268, 0.0092896, 0.0066606, 0.0], abs=5e-7
    )
    open_ended = train.schedules.power(batch=512, a=4.0, b=-0.51, eta_max=0.02, warmup_tokens=1e9, decay_frac=0.1)
    assert open_ended(1e11) == pytest.approx(512 * 4 * 1e11**-0.51)


def test_row_53_kernels():
    spectrum = np.arange(1, 10001) ** -1.5
    plain = kernel_theory.krr(256, spectrum, spectrum, 1.0, 0.5)
    assert (plain.kappa, plain.e0, plain.test, plain.train) == pytest.approx(
        (0.00548327, 1.110267, 0.848583, 0.430661), rel=2e-6
    )
    for k, test in ((256, 0.918011), (64, 1.083920), (1000, 0.866881), (1e7, 0.848585)):
        assert kernel_theory.rf(256, k, spectrum, spectrum, 1.0, 0.5).test == pytest.approx(test, abs=1e-6)
    assert kernel_theory.rf(256, 256, spectrum, spectrum, 1.0, 0.5).gamma == pytest.approx(0.00689726, rel=2e-6)
    best = [kernel_theory.optimal_ridge(256, spectrum, spectrum, 0.5, k).test for k in (64, 128, 256, 512, 2048)]
    assert best == pytest.approx([1.0751, 0.9783, 0.9179, 0.8818, 0.8497], abs=1e-4)
    g = np.random.default_rng(0)
    x = g.standard_normal((200, 30))
    report = laws.width_is_free(np.maximum(x @ g.standard_normal((30, 256)), 0), x[:, 0])
    assert report.widths[-1] == 256
    assert report.test[-1] < report.test[0]


def test_row_55_quantization_aware_training():
    assert laws.qat_fraction(8, 100, 1) == pytest.approx(0.2319, abs=5e-5)  # one byte: S = 100
    assert laws.qat_fraction(1e6, 1e7, 4) == pytest.approx(math.exp(-6.7297 / math.log(20)))
    assert callable(laws.fit_qat)
    run = train.qat(
        tiny(), train.Samples(ids(32)), steps=10, batch=4, bits=4, peak=1e-3, phases="auto", fuse_cooldown=True
    )
    assert run.fp_steps + run.qat_steps == 10
    choice = plan.bits_for_memory(1e9, 1e11)
    assert choice.params == 1e9 * 8 / choice.bits
    assert choice.qat_fraction == laws.qat_fraction(choice.params, 1e11, choice.bits)


def test_row_58_flatness():
    model = torch.nn.Linear(3, 1, bias=False)
    x = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
    found = flatness(model, (x, torch.zeros(2, 1)), samples=400)
    # half the squared error: the Hessian is x^T x / 2, its trace (1 + 4 + 1 + 9) / 2
    assert abs(found.trace - 7.5) < 3 * found.standard_error
    assert (
        select.by_flatness({"sharp": (1.0, 9.0), "flat": (1.005, 4.0), "worse": (1.2, 1.0)}, loss_tol=0.01).name
        == "flat"
    )


def test_row_59_synthetic_data():
    d = np.geomspace(1e3, 1e9, 9)
    law = laws.fit({"D": d, "error": 50 / (3 + d**0.3) + 2}, form="rectified")
    assert law.E == pytest.approx(2.0, rel=1e-2)
    known = laws.law("rectified", B=50.0, D_l=3.0, beta=0.3, E=2.0)
    assert laws.tokens_to_plateau(known, eps=1.0) == pytest.approx(47 ** (1 / 0.3))
    graph = data.ConceptGraph((("a",), ("a", "b"), ("b",)), (("x", "y"), ("y", "z"), ("z", "w")))
    made = data.synthesise(
        level=3, concept_graph=graph, documents=["one", "two", "three"], count=20,
        generate=lambda texts, concepts, rng: f"{' '.join(concepts)} of {' and '.join(texts)}",
    )  # fmt: skip
    assert all(len(one.documents) == 2 for one in made)


def test_row_60_adamp():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    for optimizer in (train.optim.AdamP([weight], lr=0.1), train.optim.SGDP([weight], lr=0.1)):
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert train.effective_step(tiny()) is not None


def test_row_63_step_law():
    lr, batch_tokens, batch_seqs, plateau = laws.hparams.step(7e9, 1.4e12, seq_len=2048)
    assert (lr, batch_tokens, batch_seqs) == pytest.approx((9.347e-4, 4_996_961, 2439.9), rel=1e-4)
    assert plateau.lr.low < lr < plateau.lr.high
    assert callable(laws.hparams.fit)


def test_row_64_test_time():
    scorer = lambda params, samples: 1 - math.exp(-samples / 5)  # noqa: E731
    stages = [plan.Stage(models=(3e9, 8e9), prompt_len=128, gen_len=64, scorer=scorer)]
    found = plan.test_time(stages=stages, budget=10.0, iters=5, batch=10, proposer="insight")
    assert found.choice == ((3e9, 10),)
    assert stages[0].cost(3e9, 7) == pytest.approx(7.0)


def test_row_65_projektor():
    g = np.random.default_rng(0)
    clean = (g.standard_normal((300, 2)) + np.repeat([[0, 0], [3, 3]], 150, 0), np.repeat([0, 1], 150))
    noisy = (clean[0], g.integers(0, 2, 300))
    found = data.projektor([clean, noisy], clean, pilot_sizes=(40, 80), ratios=[[1, 0], [0, 1], [0.5, 0.5], [0.2, 0.8]])
    assert found([1, 0], 80) > found([0, 1], 80) + 0.1
    best = found(found.best_q(80), 80)
    assert best >= max(found(q, 80) for q in found.pilots)
    from pennyweight.data.transport import project

    assert project(10_000, 1000, 1500, 0.80, 0.82) == pytest.approx(0.9135775, abs=1e-7)
    assert project(1e6, 1e3, 1e4, 0.60, 0.70) == pytest.approx(0.9)


def test_row_67_datastore():
    texts = [f"the {animal} eats {food} every day" for animal in ("cat", "dog", "owl") for food in ("fish", "meat")]
    store = retrieval.datastore(texts, chunk_words=256)
    assert store.passages[store.search("owl meat")[0][0]] == "the owl eats meat every day"
    curve = retrieval.scaling_curve(
        store, ps=(0.0, 0.5, 1.0), seeds=2, K=1000, k=3, queries=[("owl", "x"), ("dog", "y")],
        loss=lambda passages, query, answer: 3.0 - len(passages),
    )  # fmt: skip
    assert [point.loss for point in curve][::2] == [3.0, 0.0]
    assert laws.flops.datastore(177e6, 1.4e12) == pytest.approx(4.956e20)


def test_row_74_vocabulary():
    assert [
        laws.vocab.optimal(7e9, flops=None, method=m) for m in ("isoflops", "derivative", "parametric")
    ] == pytest.approx([62280, 67450, 59547], abs=2)
    assert laws.vocab.optimal(7e9, method="isoflops", width=8192) == pytest.approx(31140, abs=2)
    model, windows = tiny(), ids(4)
    expected = torch.nn.functional.cross_entropy(model(windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    counts = torch.bincount(windows[:, 1:].flatten()).double()
    unigram = -(counts / counts.sum()).log()[windows[:, 1:].flatten()].mean()
    assert unigram_normalised_loss(model, windows) == pytest.approx(expected.item() - unigram.item(), abs=1e-5)


def test_row_85_mixtures():
    names = ("E", "A", "alpha", "B", "beta", "eta", "C", "gamma", "epsilon")
    domain = dict(zip(names, (1.2, 0.4, 0.5, 0.05, 0.4, 1.5, 0.2, 0.6, 0.1), strict=True))
    general = dict(zip(names, (2.0, 0.5, 0.4, 0.04, 0.35, 1.4, 0.15, 0.5, 0.05), strict=True))
    found = laws.dcpt.given(domain, general)
    assert float(found.loss(1.8, 10, 0.25)) == pytest.approx(1.876113, abs=1e-6)
    assert found.optimal_ratio(1.8, D=10, general_drop=0.01).ratio == pytest.approx(0.357287, abs=1e-6)
    limited = laws.dcpt.given({**domain, "B": 0.6}).optimal_ratio(N=1.8, domain_tokens=1.0)
    assert limited.ratio == pytest.approx(0.345320, abs=1e-6)
    assert callable(laws.dcpt.fit)
    assert callable(found.cross_domain)


def test_row_88_patches():
    assert laws.flops.vit(224, 16, 192, 12).tokens == 196
    assert laws.flops.vit(224, 1, 192, 12).tokens == 50_176
    model = arch.vit(patch=4, image=8, channels=1, width=12, depth=1, num_heads=2, classes=3, seed=0)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    larger = adapt.repatch(model, 8, image=16)
    resized = torch.nn.functional.interpolate(images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(-1, 1, 4, 4), size=(8, 8),
                                              mode="bilinear", align_corners=False)  # fmt: skip
    tiled = resized.view(2, 2, 2, 8, 8).permute(0, 1, 3, 2, 4).reshape(2, 1, 16, 16)  # patch by patch
    torch.testing.assert_close(larger(tiled), model(images), atol=1e-5, rtol=1e-5)
    assert adapt.repatch(model, 2).config.tokens == 16
    law = laws.fit({"tokens": [1, 4, 16, 64], "loss": [2.0, 1.5, 1.25, 1.125]}, axis="tokens")
    assert law.L_inf == pytest.approx(1.0, rel=1e-3)


def test_row_89_augmentation():
    class Echo:
        def answer(self, question, rng):
            return question.upper()

        def rephrase(self, question, rng):
            return f"say {question}"

        def invent(self, question, rng):
            return f"{question} {rng.integers(1000)}"

    made = data.augment(strategy="answer", teacher=Echo(), seeds=["a", "b"], budget=4)
    assert made.examples == [("a", "A"), ("b", "B"), ("a", "A"), ("b", "B")]
    assert len(data.augment("new", Echo(), ["a"], 4).examples) == 2
    assert data.augment("auto", Echo(), ["a"], 100).strategy == plan.augmentation(1, 100).strategy == "new"
    assert plan.augmentation(seeds=100, budget=100, costs={"answer": 1.0, "new": 2.0}).strategy == "answer"


def test_row_90_trajectory():
    assert laws.trajectory.loss(1e8, 1e4, 5e5) == pytest.approx(3.374581, abs=1e-6)
    assert laws.trajectory.critical_batch(3.374581) == pytest.approx(641_042, rel=1e-4)
    steps = laws.trajectory.steps_for(L=3.0, N=1e8, batch=5e5)
    assert laws.trajectory.loss(1e8, steps, 5e5) == pytest.approx(3.0)
    assert laws.trajectory.tokens_for(3.0, 1e8, 5e5) == pytest.approx(steps * 5e5)
    assert callable(laws.trajectory.fit)


def test_row_146_minicpm():
    rate = train.schedules.wsd(10_000, 100, decay_frac=0.1, shape="exp", peak=0.01, half_life=200)
    assert [rate(s) for s in (50, 5000, 9200, 10_000)] == pytest.approx([0.005, 0.01, 0.005, 3.125e-4])
    assert laws.batch_by_loss(3.0) == pytest.approx(1.275e6, rel=1e-3)
    branches = [{"D": d, "decay_tokens": 0.1 * d, "loss": 2 + 5 / d**0.5} for d in (100, 200, 400, 800)]
    assert laws.fit_from_wsd({"tokens": 800}, branches).law.L_inf == pytest.approx(2.0, rel=1e-2)
    stream = train.two_stage(train.Samples(torch.zeros(4, 1)), train.Samples(torch.ones(4, 1)), switch=4)
    assert stream.take(0, 4)[0].sum() == 0


def test_row_154_clusters():
    compute = np.geomspace(1, 128, 8)
    g = np.random.default_rng(0)
    rates = np.concatenate([
        0.25 + 0.75 * np.exp(-a * compute**-0.5 - 0.1) + 0.01 * g.standard_normal((30, 8)) for a in (2.0, 6.0)
    ]).clip(0, 1)  # fmt: skip
    found = laws.cod.fit(rates, compute)
    truth = np.mean([0.25 + 0.75 * math.exp(-a * 1280**-0.5 - 0.1) for a in (2.0, 6.0)])
    assert found.predict(1280) == pytest.approx(truth, abs=0.03)
    assert len(found.predictable_items) > 30
    assert "cluster" in found.explain()


def test_row_250_density():
    law = laws.law("reference", a=0.25, alpha=0.30, b=1.0, beta=0.28)
    score = laws.law("sigmoid_of_loss", c=0.65, gamma=-18.0, l=0.30, d=0.25)
    family = laws.density.given(law, score, D0=1000.0)
    assert family.score(7, 1000) == pytest.approx(0.621504, abs=1e-6)
    assert family.effective_params(0.60) == pytest.approx(5.885797, abs=1e-5)
    assert family.density(params=7, score=0.691060) == pytest.approx(1.96037, rel=1e-4)
    assert family.density({"params": 70, "score": family.score(70, 15000)}).bound == "at least"
    growing = [{"t": t, "density": math.exp(0.0073 * t)} for t in range(0, 1000, 100)]
    assert laws.density.trend(growing).doubling_days == pytest.approx(94.95, abs=0.01)
    assert callable(laws.density.reference)


def test_shared_machinery():
    names = {form.name for form in laws.forms.all_forms()}
    assert names >= {
        "power", "power_const", "chinchilla", "kaplan_LNS", "kaplan_LNSB", "rectified", "dcpt", "dcpt_cross", "vocab",
        "acc_exp", "sigmoid_of_loss", "logn_projection", "exp_decay",
    }  # fmt: skip
    assert laws.flops.PF_DAY == 8.64e19
    assert laws.bench.Run(width=16, depth=2).params == 12 * 2 * 256 + 2 * 2 * 16 + 16
    assert pw.plan.training(1e20).answers
