"""What came to the room of laws beside the laws: transport, datastores, tiny runs, patches, phases of training."""

import json
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers

from pennyweight import data, laws, retrieval
from pennyweight.data import teaching, transport
from pennyweight.errors import BudgetError, DataError, ModelError, OptionError
from pennyweight.laws import bench
from pennyweight.measure import fisher_trace, flatness, kernel_theory
from pennyweight.train import Samples, qat
from pennyweight.train.quantized import Rounded
from pennyweight.zoo import patches
from pennyweight.zoo.gpt import GPT, GPTConfig

# transport


def exact(cost):
    """The transport between uniform weights as a linear program over the full plan."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    found = scipy.optimize.linprog(
        cost.ravel(), A_eq=np.vstack(rows), b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]), method="highs"
    )
    return found.fun


def test_entropic_transport_nears_the_linear_program():
    g = np.random.default_rng(0)
    x, y = g.standard_normal((30, 3)), g.standard_normal((30, 3)) + 1
    cost = ((x[:, None] - y) ** 2).sum(-1)
    truth = exact(cost)
    shares = (0.3, 0.1, 0.02)
    errors = [transport.sinkhorn(cost, share, tolerance=1e-6, iterations=20_000)[0] - truth for share in shares]
    assert errors[0] > errors[1] > errors[2] > 0
    for share, error in zip(shares, errors, strict=True):  # what the entropy can cost at most
        assert error <= share * cost.mean() * math.log(30)
    assert errors[2] < 0.03 * truth
    _, f, g_ = transport.sinkhorn(cost, 0.05, tolerance=1e-6, iterations=20_000)
    assert np.ptp((f[:, None] + g_ - cost).max(1)) < 1  # dual potentials of all rows reach the cost alike
    labels = g.integers(0, 2, 30)
    assert transport.distance(x, labels, x, labels) == pytest.approx(0, abs=1e-6)
    assert transport.distance(x, labels, x, 1 - labels) == pytest.approx(0, abs=1e-6)  # names of classes do not matter
    assert transport.distance(x, (x[:, 0] > 0).astype(int), x, (x[:, 1] > 0).astype(int)) > 0.01


@given(v0=floats(0, 1), v1=floats(0, 1), n0=integers(2, 1000), more=integers(1, 1000))
def test_the_line_in_log_n_passes_through_both_pilots(v0, v1, n0, more):
    assert transport.project(n0, n0, n0 + more, v0, v1) == pytest.approx(v0, abs=1e-9)
    assert transport.project(n0 + more, n0, n0 + more, v0, v1) == pytest.approx(v1, abs=1e-9)


def test_predictions_are_clipped_and_marked():
    flat = transport.Surface(np.array([0.8, 0.6]), np.zeros(7), np.zeros(7), np.ones(7), 0.0)
    steep = transport.Surface(np.array([0.9, 0.6]), np.zeros(7), np.zeros(7), np.ones(7), 0.0)
    found = transport.Projektor((100, 200), (flat, steep), lambda q: 0.0, (np.array([1.0, 0.0]),), 2)
    far = found.project([1, 0], 10_000)
    assert (far.value, far.clipped) == (1.0, True)
    assert "clipped" in far.warning
    assert found.project([0, 1], 300).warning is None
    assert "50 times beyond" in found.project([0, 1], 10_000).warning
    with pytest.raises(DataError, match="give 2 shares that sum to 1"):
        found([0.7, 0.7], 300)
    np.testing.assert_allclose(transport.simplex(np.array([0.9, 0.5, -1.0])), [0.7, 0.3, 0.0])
    with pytest.raises(DataError, match="the larger pilot needs 50"):
        data.projektor([(np.zeros((20, 2)), np.zeros(20))] * 2, (np.zeros((5, 2)), np.zeros(5)), (10, 50))


# datastores


def test_a_subsample_afterwards_is_a_subsampled_index():
    g = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(60)]
    texts = [" ".join(g.choice(vocabulary, 12)) for _ in range(120)]
    store = retrieval.datastore(texts, chunk_words=12)
    draw, p, k = store.draw(seed=3), 0.4, 3
    for query in texts[:20]:
        ranked = [at for at, _ in store.search(query, len(store.passages))]
        late = retrieval.kept_of(ranked, draw, p, k)
        # really subsampled first: only passages that were drawn, ranked by the same scores
        scores = dict(store.search(query, len(store.passages)))
        early = sorted((at for at in range(len(store.passages)) if draw[at] < p), key=lambda at: (-scores[at], at))[:k]
        assert late == early
    assert float((draw < 0.4).mean()) == pytest.approx(0.4, abs=0.12)
    with pytest.raises(DataError, match="retrieve"):
        retrieval.scaling_curve(store, [0.01], K=20, queries=[("w1", "w2")], loss=lambda *a: 0.0)


def test_passages_that_hold_the_answer_are_left_out():
    answer = " ".join(f"a{i}" for i in range(40))
    assert retrieval.contaminated(f"before {answer} after", answer)
    assert not retrieval.contaminated(" ".join(answer.split()[:31]) + " and then something else entirely", answer)
    assert retrieval.contaminated(" ".join(answer.split()[:30]), " ".join(answer.split()[:30]))
    seen = []
    store = retrieval.datastore([answer, "a1 a2 other words"], chunk_words=64)
    retrieval.scaling_curve(store, [1.0], k=2, queries=[("a1 a2", answer)], loss=lambda p, q, a: seen.append(p) or 0.0)
    assert seen == [["a1 a2 other words"]]


# tiny runs


def test_runs_are_kept_and_read_back(tmp_path):
    runs = bench.grid(bench.Run(steps=4, batch=2, held_out=8, warmup=1), width=(4, 8), seed=(0,), evaluations=(2,))
    first = bench.sweep(runs, cache=tmp_path, workers=1)
    assert [record.run.params for record in first] == [run.params for run in runs]
    files = sorted(tmp_path.glob("run-*.json"))
    assert len(files) == 2
    changed = json.loads(files[0].read_text())
    changed["curve"][-1][1] = 1.5
    files[0].write_text(json.dumps(changed))
    again = bench.sweep(runs, cache=tmp_path, workers=1)
    assert 1.5 in [record.loss for record in again]  # read, not run
    columns = bench.points(first, curve=True)
    assert columns["D"] == [4 * 32, 8 * 32, 4 * 32, 8 * 32]
    bench.write_csv(first, tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_text().startswith("N,D,C,steps,B,lr,loss\n")
    files[0].write_text("{}")
    with pytest.raises(DataError, match="delete it, and it is made again"):
        bench.sweep(runs, cache=tmp_path, workers=1)
    with pytest.raises(OptionError, match="no setting is called 'witdh'"):
        bench.grid(witdh=(4,))
    assert bench.train(runs[0]).curve == first[0].curve


# patches


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 8), (3, 7)])
def test_a_resized_kernel_answers_a_resized_patch_as_before(old, new):
    g = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 2, old, old, generator=g, dtype=torch.float64)
    patch = torch.randn(7, 2, old, old, generator=g, dtype=torch.float64)
    resized = torch.nn.functional.interpolate(patch, size=(new, new), mode="bilinear", align_corners=False)
    wanted = torch.einsum("bcij,dcij->bd", patch, kernel)
    found = torch.einsum("bcij,dcij->bd", resized, patches.resize_patch(kernel, new))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(patches.resize_patch(kernel, old), kernel)


def test_only_patches_that_tile_are_taken():
    model = patches.vit(4, image=8, channels=1, width=8, depth=1, num_heads=2, classes=2, seed=0)
    with pytest.raises(OptionError, match="patches of 3 in an image of 8"):
        patches.repatch(model, 3)
    with pytest.raises(ModelError, match="a Linear has no patch embedding"):
        patches.repatch(torch.nn.Linear(2, 2), 2)


# phases


def test_a_quantized_run_ends_on_its_grid():
    module = GPT(GPTConfig(width=8, depth=1, num_heads=2, vocabulary=16, context=9))
    windows = torch.randint(0, 16, (32, 9), generator=torch.Generator().manual_seed(0))
    run = qat(module, Samples(windows), steps=8, batch=4, bits=4, peak=1e-3, phases=0.5, fuse_cooldown=False)
    assert (run.fp_steps, run.qat_steps, len(run.losses)) == (4, 4, 8)
    weight = module.blocks[0].mlp.up_proj.weight
    assert isinstance(weight, torch.nn.Parameter)
    step = weight.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close((weight / step).round() * step, weight, atol=1e-6, rtol=1e-5)
    assert run.params == sum(m.weight.numel() for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)
                             and n != "lm_head")  # fmt: skip
    for bits in (1, 2, 3, 8):
        rounded = Rounded(bits).round(torch.randn(6, 50, generator=torch.Generator().manual_seed(1)))
        assert all(len(row.unique()) <= 2**bits for row in rounded)
    with pytest.raises(OptionError, match="bits = 9"):
        qat(module, Samples(windows), steps=8, batch=4, bits=9, peak=1e-3)


# flatness and kernels


def test_traces_against_the_full_hessian_and_the_gauss_newton_matrix():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    names, weights = zip(*model.named_parameters(), strict=True)
    sizes = [w.numel() for w in weights]

    def value(flat):
        parts = [part.view_as(w) for part, w in zip(flat.split(sizes), weights, strict=True)]
        output = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return torch.nn.functional.cross_entropy(output, y)

    flat = torch.cat([w.detach().flatten() for w in weights])
    truth = torch.autograd.functional.hessian(value, flat).trace().item()
    found = flatness(model, (x, y), 500)
    assert abs(found.trace - truth) < 3 * found.standard_error
    # Gauss-Newton: J^T (diag p - p p^T) J, averaged
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: torch.func.functional_call(
            model, dict(zip(names, [part.view_as(w) for part, w in zip(flat.split(sizes), weights, strict=True)],
                            strict=True)), (x,)), flat,
    )  # fmt: skip
    p = model(x).softmax(-1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    truth = torch.einsum("bcw,bcd,bdw->", jacobian, inner, jacobian).item() / len(x)
    fisher = fisher_trace(model, (x, y), 500)
    assert abs(fisher.trace - truth) < 3 * fisher.standard_error
    with pytest.raises(OptionError, match="no parameter is meant"):
        flatness(model, (x, y), params=lambda name: False)


@given(n=integers(5, 60), k=integers(5, 60), ridge=floats(1e-6, 10), alpha=floats(1.1, 3))
def test_kernel_equations_hold(n, k, ridge, alpha):
    spectrum = np.arange(1, 400) ** -alpha
    found = kernel_theory.rf(n, k, spectrum, spectrum, ridge, 0.1)
    z = (spectrum / (spectrum + found.gamma)).sum()
    assert z + ridge / found.kappa == pytest.approx(n, rel=1e-6)
    assert z + k * found.kappa / found.gamma == pytest.approx(k, rel=1e-6)
    best = kernel_theory.optimal_ridge(n, spectrum, spectrum, 0.1, k)
    assert best.test <= found.test * (1 + 1e-9)
    wider = kernel_theory.optimal_ridge(n, spectrum, spectrum, 0.1, 2 * k)
    assert wider.test <= best.test * (1 + 1e-9)


def test_kernel_edges():
    spectrum = np.arange(1, 400) ** -1.5
    assert math.isinf(kernel_theory.rf(50, 50, spectrum, spectrum, 0.0, 0.1).test)
    under = kernel_theory.krr(50, spectrum[:10], spectrum[:10], 0.0, 0.3)  # more points than modes: least squares
    assert (under.kappa, under.test) == pytest.approx((0.0, 0.3 * 50 / 40))
    assert kernel_theory.krr(50, spectrum, spectrum, 0.0, 0.3).train == pytest.approx(0, abs=1e-9)
    with pytest.raises(DataError, match="give one of each a mode"):
        kernel_theory.krr(50, spectrum, spectrum[:-1])
    assert kernel_theory.optimal_fitting_ratio(1.2, 1.1, 0.0) < kernel_theory.optimal_fitting_ratio(2.0, 1.5, 2.0)


# questions of a teacher


def test_walks_follow_counts_and_recombine():
    graph = teaching.ConceptGraph((("t",), ("t", "u")), (("x", "y"), ("y", "z")), epsilon=1.0)
    near, chance = graph.probabilities("y", topics=False)
    assert near == ["x", "z"]
    np.testing.assert_allclose(chance, [0.5, 0.5])
    near, chance = graph.probabilities("topic t", topics=False)  # y twice, x and z once: 3, 2 and 2 of 7
    assert dict(zip(near, chance, strict=True)) == pytest.approx({"x": 2 / 7, "y": 3 / 7, "z": 2 / 7})
    assert graph.nearest(["y", "z"], 2) == [1, 0]

    def ask(texts, concepts, rng):
        return f"{'+'.join(texts)}: {' '.join(concepts)}"

    g = np.random.default_rng(0)
    many = teaching.ConceptGraph(
        tuple((f"t{i % 3}",) for i in range(12)),
        tuple(tuple(g.choice([f"c{j}" for j in range(20)], 4, replace=False)) for _ in range(12)),
    )
    documents = [f"d{i}" for i in range(12)]
    level = {n: data.synthesise(n, many, documents=documents, generate=ask, count=60) for n in (1, 3)}
    assert len(level[3]) > len(level[1])  # recombination says more at the same count
    with pytest.raises(OptionError, match="level 4"):
        data.synthesise(4, many, documents=documents, generate=ask, count=1)
    with pytest.raises(BudgetError, match="pays no new example"):
        data.augment("new", None, ["a"], 1)


def test_worth_of_narrow_weights():
    assert laws.qat.effective_params(1e9, 16) == 1e9
    assert laws.qat.effective_params(1e9, 4, gamma=2.0) == pytest.approx(1e9 * (1 - math.exp(-2)))
