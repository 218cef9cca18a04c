"""prune.ast, prune.maskllm and prune.progressive against closed forms, brute force and the levers they start from."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from families import VOCABULARY, build
from problems import problem
from torch import nn

from pennyweight.errors import DataError, OptionError
from pennyweight.evaluate.agreement import agreement
from pennyweight.lever import make
from pennyweight.levers.prune.adaptive import softened
from pennyweight.levers.prune.magnitude import Magnitude
from pennyweight.levers.prune.maskllm import PatternOdds, Sharpening
from pennyweight.levers.prune.progressive import GradientNoise, ProgressiveMasks
from pennyweight.levers.prune.sparsegpt import SparseGPT
from pennyweight.levers.prune.wanda import Wanda
from pennyweight.model import anatomy
from pennyweight.model.loading import load, of_module
from pennyweight.model.saving import save
from pennyweight.solvers.sparse_training import Adaptive
from pennyweight.statistics import NO_STATISTICS
from pennyweight.train.masked import Masks
from pennyweight.weights import Dense, NofM, Sum
from pennyweight.work import Work


def windows(count=12, length=20):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def changed(name, options, *, family="llama", data=True, seed=0):
    model = of_module(build(family))
    maps = tuple(found for found in model.anatomy.layers() if found.block is not None)
    work = Work(model=model, windows=windows() if data else None, maps=maps, seed=seed)
    make(name, options).change(model, work)
    return model, maps


def matrices(module, maps):
    return [anatomy.matrix(module, found) for found in maps]


TRAINED = {
    "prune.ast": {"steps": 12, "batch": 4, "rate": 2e-3, "every": 4, "group": 8},
    "prune.maskllm": {"steps": 12, "batch": 4, "prior": "magnitude"},
    "prune.progressive": {"steps": 12, "batch": 4, "rate": 2e-3},
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_they_leave_packed_patterns_that_survive_a_file(name, family, tmp_path):
    model, maps = changed(name, TRAINED[name], family=family)
    for found in maps:
        weight = model.module.get_submodule(found.path).weight
        kept = weight.terms[0] if isinstance(weight, Sum) else weight
        assert isinstance(kept, NofM)
        assert (kept.mask().reshape(-1, 4).sum(1) == 2).all()
        m, n = found.shape
        assert kept.cost().bytes == m * n // 2 * 2 + m * (-(-n // 4 * 3 // 8) if n // 4 * 3 % 8 else n // 4 * 3 // 8)
        if isinstance(weight, Sum):
            assert weight.cost().params == m * n // 2 + m * n // 8 + 8
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.module(windows()).logits, model.module(windows()).logits)


@pytest.mark.parametrize("name", ["prune.ast", "prune.progressive"])
def test_training_draws_the_model_to_its_dense_self(name):
    original = build("llama")
    # the text of these windows is noise: only the original is worth learning
    options = {"steps": 120, "batch": 6, "rate": 1e-3, "weight_decay": 0.0}
    options |= {"distill": 1.0} if name == "prune.ast" else {}
    cut, _ = changed("prune.ast", {"steps": 0})
    model, _ = changed(name, options)
    before, after = (float(agreement(original, one.module, windows(24)[12:]).kl.mean()) for one in (cut, model))
    assert after < 0.8 * before


@pytest.mark.parametrize(("name", "inner"), [("prune.ast", True), ("prune.ast", False), ("prune.maskllm", False)])
def test_only_what_is_meant_is_trained(name, inner):
    options = {"steps": 3, "batch": 4, "rate": 1e-2}
    model, _ = changed(name, options | ({"others": inner} if name == "prune.ast" else {}))
    original = dict(build("llama").named_parameters())
    rest = [key for key in original if "embed" in key or "norm" in key]
    assert rest
    assert all(torch.equal(model.module.get_parameter(key), original[key]) != inner for key in rest)


# ---- AST


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_without_steps_ast_is_the_one_shot_lever(score):
    model, maps = changed("prune.ast", {"steps": 0, "score": score})
    original = of_module(build("llama"))
    known = Work(model=original, windows=windows(), maps=maps).statistics({"second_moment"})
    for found in maps:
        matrix = Dense(anatomy.matrix(original.module, found))
        lever = Wanda(pattern="2:4") if score == "wanda" else Magnitude(pattern="2:4")
        plain = lever.solve(matrix, known[found.name])
        assert torch.equal(model.module.get_submodule(found.path).weight.dense(), plain.dense())


def test_from_sparsegpt_it_starts_with_what_sparsegpt_leaves():
    options = {"steps": 0, "prior": "sparsegpt", "dtype": "float32"}
    model, maps = changed("prune.ast", options)
    original = of_module(build("llama"))
    known = Work(model=original, windows=windows(), maps=maps).statistics({"second_moment"})
    for found, matrix in zip(maps, matrices(original.module, maps), strict=True):
        wanted = SparseGPT(pattern="2:4", dtype="float32").solve(Dense(matrix), known[found.name])
        assert torch.equal(anatomy.matrix(model.module, found), wanted.dense())
    options |= {"steps": 6, "batch": 4, "rate": 2e-3, "every": 0, "decay": 0.0}
    trained, _ = changed("prune.ast", options)
    for before, after in zip(matrices(model.module, maps), matrices(trained.module, maps), strict=True):
        assert torch.equal(before != 0, after != 0)  # masks that stay
        assert not torch.equal(before, after)


def test_the_softened_divergence_is_that_of_the_formula_with_its_gradient():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 29, 11, generator=g, dtype=torch.float64) for _ in range(2))  # 87 rows: no 32s
    gradients = []
    for loss in (
        lambda one: softened(one, teacher, 2.0),
        lambda one: 4 * ((teacher / 2).softmax(-1) * ((teacher / 2).log_softmax(-1) - (one / 2).log_softmax(-1))).sum()
        / 87,
    ):  # fmt: skip
        leaf = student.clone().requires_grad_()
        found = loss(leaf)
        (3 * found).backward()
        gradients.append((found.detach(), leaf.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("start", ["mean", "sum"])
def test_one_parameter_a_pruned_weight_is_the_dense_model(start):
    model, maps = changed("prune.ast", {"steps": 0, "group": 1, "start": start, "dtype": "float32"})
    for found, matrix in zip(maps, matrices(build("llama"), maps), strict=True):
        assert torch.equal(model.module.get_submodule(found.path).weight.dense(), matrix)


def test_the_mean_is_the_least_squares_start():
    model, maps = changed("prune.ast", {"steps": 0, "group": 8, "dtype": "float32"})
    plain, _ = changed("prune.ast", {"steps": 0, "dtype": "float32"})
    for found, matrix in zip(maps, matrices(build("llama"), maps), strict=True):
        kept, side = model.module.get_submodule(found.path).weight.terms
        assert torch.equal(kept.dense(), plain.module.get_submodule(found.path).weight.dense())
        projection = torch.block_diag(*[torch.ones(1, 8)] * (matrix.shape[1] // 8))  # P of the paper
        pruned = matrix * ~kept.mask()
        best = torch.linalg.lstsq(projection.T.double(), pruned.T.double()).solution.T
        torch.testing.assert_close(side.dense().double(), best @ projection.double(), rtol=1e-5, atol=1e-7)


def test_masks_move_with_the_weights_and_settle_where_asked():
    layer = nn.Linear(16, 4)
    masks = Masks([layer], "through")
    moving, still = Adaptive(masks, "2:4", every=2), Adaptive(masks, "2:4", every=0)
    first = masks.kept()[0].clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.where(first, 0.1, 1.0))
    still.step()
    moving.step()
    assert torch.equal(masks.kept()[0], first)
    moving.step()
    assert torch.equal(masks.kept()[0], ~first)
    for _ in range(4):
        moving.step()
    assert moving.flips == [1.0, 0.0, 0.0]


# ---- MaskLLM


@pytest.mark.parametrize(("prior", "lever"), [("magnitude", Magnitude), ("wanda", Wanda), ("sparsegpt", SparseGPT)])
def test_without_steps_it_is_the_prior_s_mask_on_weights_as_they_were(prior, lever):
    model, maps = changed("prune.maskllm", {"steps": 0, "prior": prior, "dtype": "float32"})
    original = of_module(build("llama"))
    known = Work(model=original, windows=windows(), maps=maps).statistics({"second_moment"})
    for found in maps:
        matrix = anatomy.matrix(original.module, found)
        mask = lever(pattern="2:4").solve(Dense(matrix), known[found.name]).mask()
        assert torch.equal(model.module.get_submodule(found.path).weight.dense(), matrix * mask)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prune.maskllm", {"prior": "sparsegpt"}),
        ("prune.maskllm", {"prior": "wanda"}),
        ("prune.ast", {"prior": "sparsegpt"}),
        ("prune.ast", {"score": "wanda"}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_tables_are_pruned_by_what_prices_them(name, options, family):
    """A recipe that selects nothing selects the embedding, too, which is given tokens and no inputs."""
    model = of_module(build(family))
    maps = model.anatomy.layers()
    assert maps[0].kind == "embedding"
    make(name, {**options, "steps": 0}).change(model, Work(model=model, windows=windows(), maps=maps))
    assert all(isinstance(model.module.get_submodule(one.path).weight, NofM) for one in maps)


def test_learning_changes_masks_and_no_weight():
    model, maps = changed("prune.maskllm", {"steps": 12, "batch": 4, "rate": 0.05, "dtype": "float32"})
    prior, _ = changed("prune.maskllm", {"steps": 0, "dtype": "float32"})
    moved = 0
    for found, matrix in zip(maps, matrices(build("llama"), maps), strict=True):
        weight, before = (one.module.get_submodule(found.path).weight for one in (model, prior))
        assert torch.equal(weight.dense(), matrix * weight.mask())
        moved += int((weight.mask() != before.mask()).sum())
    assert moved > 0
    again, _ = changed("prune.maskllm", {"steps": 12, "batch": 4, "rate": 0.05, "dtype": "float32"})
    other, _ = changed("prune.maskllm", {"steps": 12, "batch": 4, "rate": 0.05, "dtype": "float32"}, seed=1)
    same, differ = (
        all(torch.equal(a, b) for a, b in zip(matrices(model.module, maps), matrices(one.module, maps), strict=True))
        for one in (again, other)
    )
    assert same
    assert not differ


def test_the_learned_pattern_is_the_best_of_the_six():
    """Two hundred layers of four inputs and one output at once, each with its own data; every pattern tried by hand."""
    g = torch.Generator().manual_seed(0)
    matrix, inputs = torch.randn(200, 4, generator=g), torch.randn(200, 64, 4, generator=g)

    def errors(masked):
        return torch.einsum("mtn,mn->mt", inputs, masked - matrix).square().mean(1)

    part = PatternOdds((200, 4), (2, 4), generator=torch.Generator().manual_seed(0))
    sharpening = Sharpening([part], 2000, scale=(100, 500), temperature=(4.0, 0.05))
    # slow: odds that grow fast settle near ties by their first draws (92 to 95 % right at twice the rate and more)
    optimizer = torch.optim.Adam([part.logits], lr=5e-5)
    for _ in range(2000):
        errors(part(matrix)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        sharpening.step()
    assert (part.scale, part.temperature) == pytest.approx((500, 0.05))
    best = torch.stack([errors(matrix * pattern) for pattern in part.patterns], 1).argmin(1)
    assert (part.patterns[best].bool() == part.likeliest()).all(1).float().mean() >= 0.95


def test_odds_lean_by_what_patterns_share_with_the_prior():
    part = PatternOdds((3, 8), (2, 4), generator=torch.Generator().manual_seed(0))
    before = part.logits.detach().clone()
    mask = Magnitude(pattern="2:4").solve(Dense(problem(3, 8)[0]), NO_STATISTICS).mask()
    part.lean_towards(mask, 3.0)
    steps = ((part.logits - before) / (3.0 * before.std())).detach()
    shared = (mask.view(3, 2, 1, 4) & part.patterns.bool()).sum(-1)
    torch.testing.assert_close(steps, shared.float() - 1, rtol=1e-4, atol=1e-4)
    part.lean_towards(mask, 100.0)
    assert torch.equal(part.likeliest(), mask)
    weight = problem(3, 8)[0]
    part.scale, part.temperature = 1e6, 1e-3
    assert torch.equal(part(weight), weight * mask)
    assert float(part.norm.detach()) == pytest.approx(float((weight * mask).square().sum()))


# ---- progressive gradient flow


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))


def trained(module, callback, steps=20):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        (module(torch.randn(16, 64, generator=g)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if callback is not None:
            callback.step()
    return module


@pytest.mark.parametrize("method", ["mask-linear", "mask-exponential"])
@pytest.mark.parametrize("gradient", ["faded", "through"])
def test_masks_that_never_fade_are_dense_training_to_the_bit(method, gradient):
    module, plain = net(), net()
    progress = ProgressiveMasks(
        [module[0]], pattern="1:8", steps=21, method=method, fine=0.0, rate=0.0, gradient=gradient
    )
    trained(module, progress)
    trained(plain, None)
    assert torch.equal(progress.masks.parameters[0], plain[0].weight)
    assert (progress.leak, progress.masks.sparsity) == (1.0, 0.875)


@pytest.mark.parametrize(
    ("method", "leaks"),
    [
        ("mask-linear", [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("mask-exponential", [1, 1, 1, math.exp(-1.25), math.exp(-2.5), math.exp(-3.75), 0, 0]),
    ],
)
def test_masks_fade_in_between_the_phases(method, leaks):
    module = net()
    progress = ProgressiveMasks([module[0]], pattern="1:8", steps=8, method=method, dense=0.25, fine=0.25)
    for step, expected in enumerate(leaks):
        assert progress.leak == pytest.approx(expected)
        assert progress.masks.sparsity == (0.875 if step >= 2 else 0.0)
        weight, mask = progress.masks.parameters[0], progress.masks.kept()[0]
        torch.testing.assert_close(module[0].weight, torch.where(mask, weight, expected * weight))
        progress.step()


@pytest.mark.parametrize(
    ("method", "patterns"),
    [
        ("structure-halving", [(7, 8), (4, 8), (2, 8), (1, 8)]),
        ("structure-geometric", [(8, 64), (4, 32), (2, 16), (1, 8)]),
        ("sr-ste", [(1, 8)]),
    ],
)
def test_patterns_harden_and_are_legal_at_every_step(method, patterns):
    module = net()
    progress = ProgressiveMasks([module[0]], pattern="1:8", steps=20, method=method, dense=0.1, fine=0.1)
    seen = []
    for step in range(20):
        found = progress.frames.pattern(step)
        assert (found is None) == (step < 2)
        if found is not None:
            kept, of = found
            assert ((module[0].weight.view(-1, of) != 0).sum(1) == kept).all()
            seen.append(found)
        trained(module, progress, steps=1)
    assert [seen[0]] + [b for a, b in pairwise(seen) if a != b] == patterns
    progress.finish()
    assert ((module[0].weight.view(-1, 8) != 0).sum(1) == 1).all()


def test_progress_goes_on_from_a_checkpoint():
    def fresh():
        module = net()
        return module, ProgressiveMasks([module[0]], pattern="1:8", steps=10)

    module, progress = fresh()
    trained(module, progress, steps=5)
    again, other = fresh()
    again.load_state_dict(copy.deepcopy(module.state_dict()))
    other.load_state_dict(progress.state_dict())
    assert other.leak == progress.leak
    assert torch.equal(again[0].weight, module[0].weight)


def test_gradient_noise_is_the_variance_over_steps():
    layer = nn.Linear(8, 4, bias=False)
    masks = Masks([layer], "through")
    Adaptive(masks, "2:4", every=0)
    noise, g, seen = GradientNoise(masks), torch.Generator().manual_seed(0), []
    for _ in range(5):
        x = torch.randn(3, 8, generator=g)
        layer(x).sum().backward()
        seen.append(masks.parameters[0].grad.clone())
        layer.zero_grad()
    variance, mask = torch.stack(seen).double().var(0, unbiased=False), masks.kept()[0]
    assert noise.read() == pytest.approx((float(variance[mask].mean()), float(variance[~mask].mean())))
    with pytest.raises(OptionError, match="0 gradients to read"):
        noise.read()


# ---- what cannot be


def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match=r"prune.ast: start = sum has no effect without group"):
        make("prune.ast", {"start": "sum"})
    with pytest.raises(OptionError, match="anneal has no effect with decay_in = gradient"):
        make("prune.ast", {"decay_in": "gradient", "anneal": 0.5})
    with pytest.raises(OptionError, match=r"prune.maskllm: nothing to learn from"):
        make("prune.maskllm", {"steps": 0, "prior": "none"})
    with pytest.raises(OptionError, match="patterns of 8:16; give"):
        make("prune.maskllm", {"pattern": "8:16"})
    with pytest.raises(OptionError, match="gradient has no effect with method = sr-ste"):
        make("prune.progressive", {"method": "sr-ste", "gradient": "through"})
    with pytest.raises(OptionError, match="groups of 24 do not divide"):
        changed("prune.ast", {"steps": 0, "group": 24})
    for name in TRAINED:
        with pytest.raises(OptionError, match=r"pattern 2:7 does not divide the \d+ inputs"):
            changed(name, {"pattern": "2:7", "steps": 2, **({"prior": "none"} if name == "prune.maskllm" else {})})
        with pytest.raises(DataError, match="needs calibration data"):
            changed(name, {"steps": 2}, data=False)
        with pytest.raises(OptionError, match="is of kind masked-lm"):
            changed(name, {"steps": 2, **({"prior": "none"} if name == "prune.maskllm" else {})}, family="bert")
    with pytest.raises(OptionError, match="60% dense and 50% at the end leave -1 of 10"):
        ProgressiveMasks([net()[0]], pattern="1:8", steps=10, dense=0.6, fine=0.5)
    with pytest.raises(OptionError, match="method 'slow', gradient 'faded'"):
        ProgressiveMasks([net()[0]], pattern="1:8", steps=10, method="slow")
    with pytest.raises(OptionError, match="pattern 256:512 does not divide the 64 inputs"):
        ProgressiveMasks([net()[0]], pattern="32:64", steps=10, method="structure-geometric")
