"""Offers of the fact sheets beside what their formulas give in code written from the sheets alone."""

import datetime
import math

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight import laws
from pennyweight.errors import BudgetError, DataError, OptionError, UserError
from pennyweight.zoo.gpt import GPT, GPTConfig

SHAPES = [(4, 3, 2, 2), (5, 7), (6,), (3, 4)]  # the first two get gradients orthogonal to their rows


def gradients(at):
    """25 gradients as functions of the weight."""
    noise = np.random.default_rng(at).standard_normal((25, *SHAPES[at]))

    def of(drawn):
        def gradient(weight):
            if at > 1:
                return drawn
            rows, slope = weight.reshape(len(weight), -1), drawn.reshape(len(weight), -1)
            radial = (slope * rows).sum(1) / (rows * rows).sum(1)
            return (slope - rows * radial[:, None]).reshape(weight.shape)

        return gradient

    return [of(drawn) for drawn in noise]


def without_radial(step, weight, gradient, delta, eps):
    """The sheet of row 60: by channel, then as a whole; the raw gradient decides, the largest cosine counts."""
    if weight.ndim > 1:
        for rows in (len(weight), 1):
            w, g, p = (x.reshape(rows, -1) for x in (weight, gradient, step))
            norm = np.linalg.norm(w, axis=1)
            if (np.abs((w * g).sum(1)) / (norm * np.linalg.norm(g, axis=1))).max() < delta / math.sqrt(w.shape[1]):
                unit = w / (norm + eps)[:, None]
                return (p - unit * (unit * p).sum(1, keepdims=True)).reshape(weight.shape), True
    return step, False


def adamp(weight, slopes, lr, betas, weight_decay, delta, wd_ratio, nesterov):
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for t, slope in enumerate(slopes, 1):
        g = slope(weight)
        first, second = betas[0] * first + (1 - betas[0]) * g, betas[1] * second + (1 - betas[1]) * g * g
        ahead = betas[0] * first + (1 - betas[0]) * g if nesterov else first
        step = ahead / (np.sqrt(second) / math.sqrt(1 - betas[1] ** t) + 1e-8)
        step, fired = without_radial(step, weight, g, delta, 1e-8)
        weight = weight * (1 - lr * weight_decay * (wd_ratio if fired else 1))
        weight = weight - lr / (1 - betas[0] ** t) * step
    return weight


def sgdp(weight, slopes, lr, momentum, dampening, weight_decay, nesterov):
    summed = np.zeros_like(weight)
    for slope in slopes:
        g = slope(weight)
        summed = momentum * summed + (1 - dampening) * g
        step, fired = without_radial(g + momentum * summed if nesterov else summed, weight, g, 0.1, 1e-8)
        if not nesterov:
            summed = step  # the official code projects the sum where it lies
        weight = weight * (1 - lr * weight_decay * (0.1 if fired else 1) / (1 - momentum)) - lr * step
    return weight


@pytest.mark.parametrize(
    ("kind", "plain", "options"),
    [
        ("AdamP", adamp, {"lr": 0.03, "betas": (0.9, 0.999), "weight_decay": 0.2, "delta": 0.1, "wd_ratio": 0.1,
                          "nesterov": False}),
        ("AdamP", adamp, {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.3, "delta": 0.2, "wd_ratio": 0.4,
                          "nesterov": True}),
        ("SGDP", sgdp, {"lr": 0.05, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False}),
        ("SGDP", sgdp, {"lr": 0.05, "momentum": 0.7, "dampening": 0.0, "weight_decay": 0.2, "nesterov": True}),
    ],
)  # fmt: skip
def test_projected_optimizers_follow_the_sheet(kind, plain, options):
    for at, shape in enumerate(SHAPES):
        start = np.random.default_rng(100 + at).standard_normal(shape)
        weight = nn.Parameter(torch.tensor(start))
        optimizer = getattr(pw.train.optim, kind)([weight], **options)
        for slope in gradients(at):
            weight.grad = torch.tensor(slope(weight.detach().numpy().copy()))
            optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), plain(start, gradients(at), **options), atol=1e-13)


def test_effective_steps_are_how_far_weights_turn():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    watch = pw.train.effective_step(model)
    with torch.no_grad():
        model.weight.add_(0.1)
    watch.step()
    after = model.weight.detach()
    turn = float((after / after.norm() - before / before.norm()).norm())
    assert watch.turns["weight"] == pytest.approx([turn])
    assert watch.norms["weight"] == pytest.approx([float(before.norm()), float(after.norm())])


class Table(nn.Module):
    """Logits (V, V) of the next token by the last one."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids):
        return self.logits[ids]


@torch.no_grad()
def test_ensembles_average_logarithms():
    g = torch.Generator().manual_seed(3)
    tables = [torch.randn(6, 6, generator=g) for _ in range(3)]
    ids, target = torch.tensor([[0, 3, 2, 5]]), torch.tensor([[1, 2, 4, 4]])
    whole = pw.merge.ensemble([Table(t) for t in tables], how="logit_avg")(ids)
    each = torch.stack([t.log_softmax(-1)[ids] for t in tables])
    mass = each.mean(0).exp().sum(-1)
    assert float(mass.max()) <= 1
    torch.testing.assert_close(whole, each.mean(0) - mass.log()[..., None])
    loss = -whole.gather(-1, target[..., None])[..., 0]
    members = -each.gather(-1, target.expand(3, -1, -1)[..., None])[..., 0].mean(0)
    torch.testing.assert_close(loss, members + mass.log())  # the sheet's identity: Z <= 1, so never above the mean


def test_distilling_from_an_ensemble_reaches_it():
    g = torch.Generator().manual_seed(0)
    teachers = [Table(2 * torch.randn(6, 6, generator=g)) for _ in range(3)]
    student = Table(torch.zeros(6, 6))
    stream = pw.train.Samples(torch.randint(0, 6, (60, 9), generator=g), seed=0)
    pw.distil.from_ensemble(teachers, student, stream, steps=300, batch=16, peak=0.1, warmup=5)
    wanted = pw.merge.ensemble(teachers)(torch.arange(6)[None])[0].detach().exp()
    assert float((student.logits.detach().softmax(-1) - wanted).abs().max()) < 0.03


def test_palm_counts_of_another_size():
    cost = laws.flops.transformer(laws.flops.palm(2048, 20, 10))
    params = 20 * (2 * 2048 * 10 * 256 + 2 * 2048 * 256 + 12 * 2048**2) + 256_000 * 2048
    assert cost.params == params
    rate, peak = 5e4, 16 * 3e14
    assert cost.mfu(rate, peak=peak, context=1024) == pytest.approx(
        rate * (6 * params + 12 * 20 * 10 * 256 * 1024) / peak
    )
    for wrong in ({"d": 64, "layers": 2, "heads": 4, "kv": 3}, {"d": 10, "layers": 2, "heads": 3}, {}, 5):
        with pytest.raises(OptionError):
            laws.flops.transformer(wrong)


def test_patches_are_resized_by_the_pseudo_inverse():
    model = pw.arch.vit(patch=4, image=8, width=8, depth=1, num_heads=2, channels=1)
    smaller = pw.adapt.repatch(model, 2)
    kernel, resized = (
        one.get_parameter("patch_embedding.weight").detach().double().reshape(8, -1).numpy() for one in (model, smaller)
    )
    line = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7  # a triangle twice as wide, cut at the edges
    shrink = np.kron(line, line)  # (4, 16): a patch of 4 to one of 2
    np.testing.assert_allclose(resized, np.linalg.lstsq(shrink.T, kernel.T, rcond=None)[0].T, atol=1e-6)
    larger = pw.adapt.repatch(smaller, 4, image=16).get_parameter("patch_embedding.weight").detach().double()
    line = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(larger.reshape(8, -1).numpy() @ np.kron(line, line), resized, atol=1e-6)  # exact upward


def test_projections_are_lines_in_the_logarithm():
    g = np.random.default_rng(0)

    def source(count, wrong):
        labels = g.integers(0, 3, count)
        points = 2 * np.eye(3)[labels] + g.standard_normal((count, 3))
        return points, np.where(g.random(count) < wrong, g.integers(0, 3, count), labels)

    found = pw.data.projektor(
        sources=[source(400, 0.0), source(400, 0.5)], valid=source(300, 0.0), pilot_sizes=(60, 240),
        ratios=[[1, 0], [0, 1], [0.5, 0.5], [0.75, 0.25], [0.25, 0.75]],
    )  # fmt: skip
    q = np.array([0.6, 0.4])
    low, high = found(q, 60), found(q, 240)
    value = (math.log(300 / 60) * high - math.log(300 / 240) * low) / math.log(240 / 60)
    assert found(q, 300) == pytest.approx(value)
    best = found.best_q(240)
    assert best.sum() == pytest.approx(1)
    assert found(best, 240) >= max(found(q, 240) for q in np.eye(2))
    for wrong in ((q, -1), (q, math.nan), ([0.5, 0.6], 100), ([1.0], 100), (["a", "b"], 100)):
        with pytest.raises(UserError):
            found(*wrong)
    with pytest.raises(DataError, match="give two rising numbers"):
        pw.data.projektor([source(9, 0), source(9, 0)], source(9, 0), (5,))


class Teacher:
    def answer(self, question, rng):
        return f"answer to {question}"

    def rephrase(self, question, rng):
        return f"again {question}"

    def invent(self, question, rng):
        return f"{question} {rng.integers(10**9)}"


def test_queries_are_spent_and_counted():
    for strategy, budget, made in (("answer", 7, 7), ("rephrase", 7, 3), ("new", 6, 3)):
        found = pw.data.augment(strategy, Teacher(), ["x", "y"], budget)
        assert (len(found.examples), found.queries) == (made, made * (1 if strategy == "answer" else 2))
    assert [pw.data.augment("auto", Teacher(), ["x", "y"], budget).strategy for budget in (5, 500)] == ["answer", "new"]
    for wrong in (0, -3):
        with pytest.raises(BudgetError):
            pw.data.augment("answer", Teacher(), ["x"], wrong)
    for wrong in (math.nan, 2.5, "many", None):
        with pytest.raises(OptionError):
            pw.data.augment("answer", Teacher(), ["x"], wrong)


def test_walks_go_where_counts_and_epsilon_say():
    graph = pw.data.ConceptGraph(
        topics=(("t",), ("t",), ("t",)), concepts=(("a", "b"), ("a", "b"), ("b", "c")), epsilon=0.5
    )
    near, chance = graph.probabilities("b", topics=False)
    assert near == ["a", "c"]
    logits = np.log(np.array([2 + 0.5, 1 + 0.5]))  # softmax of log(frequency + epsilon)
    np.testing.assert_allclose(chance, np.exp(logits) / np.exp(logits).sum())


def test_flatness_breaks_ties_alone():
    found = pw.select.by_flatness({"a": (2.0, 9.0), "b": (2.009, 4.0), "c": (2.02, 1.0)}, loss_tol=0.01)
    assert (found.name, found.candidates) == ("b", ("a", "b"))
    assert pw.select.by_flatness([(2.0, 9.0), (2.5, 4.0)]).name == "0"
    for wrong in ({"a": (math.nan, 1.0)}, {"a": (1.0, math.nan)}, {"a": (1.0, 1.0), "b": (math.inf, 1.0)}, {}):
        with pytest.raises(UserError):
            pw.select.by_flatness(wrong)
    data = torch.eye(2), torch.zeros(2, 1)
    for wrong in ({"samples": 1}, {"samples": 2.5}, {"params": ["none such"]}):
        with pytest.raises(OptionError):
            pw.measure.flatness(nn.Linear(2, 1), data, **wrong)
    # the mean of half a squared error: the Hessian is X'X / n for the weight and 1 for the bias
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    trace, error = pw.measure.flatness(nn.Linear(3, 1), (x, torch.zeros(40, 1)), samples=4000)
    assert abs(trace - (float((x * x).sum() / 40) + 1)) < 4 * error


def test_a_law_across_domains_is_found_again():
    def loss(n, d, r, k):
        return 1.2 + 0.4 / n**0.5 + 0.05 * r**1.5 / d**0.4 + 0.2 / (r + 0.1) ** 0.6 + 0.3 / k**0.7

    rows = [
        {"N": n, "D": d, "r": r, "k1": k1, "k2": k2, "loss": loss(n, d, r, 1 / k1 + 1.7 * k2)}
        for k1, k2 in ((2.0, 0.1), (2.5, 0.3), (3.0, 0.05), (1.6, 0.2), (2.2, 0.4))
        for n in (0.5, 1.8, 4.0) for d in (1.0, 10.0) for r in (0.1, 0.4, 0.7, 1.0)
    ]  # fmt: skip
    found = laws.dcpt.fit(rows)
    assert found.cross.w2 == pytest.approx(1.7, rel=1e-3)
    unseen = found.cross_domain(k1=2.8, k2=0.15)
    assert unseen(N=2, D=5, r=0.5) == pytest.approx(loss(2, 5, 0.5, 1 / 2.8 + 1.7 * 0.15), rel=1e-3)
    for wrong in ((-1, 0.1), (0, 0.1), (math.nan, 0.1), (2, -10), ("a", 1), (2, math.inf)):
        with pytest.raises(OptionError):
            found.cross_domain(*wrong)


def test_density_grows_by_its_dates():
    day = datetime.date(2024, 2, 1)
    models = [(day + datetime.timedelta(days=d), math.exp(0.005 * d)) for d in (0, 30, 100, 200)]
    behind = (day + datetime.timedelta(days=150), 1.1)  # no record: the line is of the running best
    found = laws.density.trend([*models, behind])
    assert (found.A, found.doubling_days) == pytest.approx((0.005, math.log(2) / 0.005))
    assert found.start == day
    for wrong in ([], [(0, 1.0)], [(0, 1.0), (1, math.nan)], [("x", 1.0), (1, 2.0)], None, [1, 2], [{"t": 1}]):
        with pytest.raises(DataError):
            laws.density.trend(wrong)


def test_out_of_distribution_points_get_a_law_of_their_own():
    x = np.geomspace(1e3, 1e7, 9)
    found = laws.fit((x, 3 * x**-0.1), form="power", axis="N", ood=(x, 4 * x**-0.05))
    assert (found.alpha, found.ood.alpha) == pytest.approx((0.1, 0.05))


def test_quantization_aware_runs_refuse_what_they_cannot_do():
    module = GPT(
        GPTConfig(width=8, depth=1, num_heads=2, vocabulary=16, context=16), generator=torch.Generator().manual_seed(0)
    )
    stream = pw.train.Samples(torch.randint(0, 16, (40, 9), generator=torch.Generator().manual_seed(0)), seed=0)
    good = {"steps": 20, "batch": 4, "bits": 2, "peak": 1e-3}
    run = pw.train.qat(module, stream, phases="auto", fuse_cooldown=True, **good)
    s = 20 * 4 * 8 / (run.params * 2 / 8)
    assert run.qat_steps == max(1, round(20 * math.exp(-6.7297 / math.log(s))))
    for wrong in ({"phases": "some"}, {"phases": 2}, {"phases": math.nan}, {"bits": 0}, {"bits": 2.5}, {"steps": 0},
                  {"peak": -1}, {"peak": math.nan}, {"batch": 0}):  # fmt: skip
        with pytest.raises(OptionError):
            pw.train.qat(module, stream, **(good | wrong))
    for wrong in ({"betas": 0.9}, {"betas": (0.9,)}, {"lr": "fast"}, {"lr": math.nan}, {"delta": -1}):
        with pytest.raises(OptionError):
            pw.train.optim.AdamP(module.parameters(), **wrong)
