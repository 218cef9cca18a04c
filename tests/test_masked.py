"""Masks under training: every gradient rule in closed form, what masks promise a loop, and the decayed AdamW."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import OptionError, ShapeError
from pennyweight.model import safetensors_file
from pennyweight.solvers.masks import Selection
from pennyweight.train import masked
from pennyweight.train.masked import Masked, MaskedAdamW, Masks
from pennyweight.weights import CompactLinear, Dense

RULES = {
    "hard": lambda w, m: masked.hard(w, m),
    "through": lambda w, m: masked.straight_through(w, m),
    "sr-ste": lambda w, m: masked.sr_ste(w, m, 0.3),
    "soft": lambda w, m: masked.soft(w, m, 0.25),
    "soft-through": lambda w, m: masked.soft(w, m, 0.25, through=True),
}
#: rule -> what is computed with, and the gradient, of a pruned entry w under an outer gradient g
PRUNED = {
    "hard": lambda w, g: (0 * w, 0 * g),
    "through": lambda w, g: (0 * w, g),
    "sr-ste": lambda w, g: (0 * w, g + 0.3 * w),
    "soft": lambda w, g: (0.25 * w, 0.25 * g),
    "soft-through": lambda w, g: (0.25 * w, g),
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_forward_and_backward_in_closed_form(rule):
    weight, outer, mask = drawn(5, 8).requires_grad_(), drawn(5, 8, seed=1), drawn(5, 8, seed=2) > 0
    found = RULES[rule](weight, mask)
    found.backward(outer)
    value, gradient = PRUNED[rule](weight.detach(), outer)
    assert torch.equal(found, torch.where(mask, weight, value))
    torch.testing.assert_close(weight.grad, torch.where(mask, outer, gradient), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_ones_is_the_identity_to_the_bit(rule, dtype):
    weight = drawn(5, 8).to(dtype).requires_grad_()
    outer = drawn(5, 8, seed=1).to(dtype)
    found = RULES[rule](weight, torch.ones(5, 8, dtype=torch.bool))
    found.backward(outer)
    assert torch.equal(found, weight)
    assert torch.equal(weight.grad, outer)


@pytest.mark.parametrize("through", [False, True])
def test_a_leak_of_one_is_dense_and_of_none_is_hard(through):
    weight, mask = drawn(5, 8), drawn(5, 8, seed=2) > 0
    assert torch.equal(masked.soft(weight, mask, 1.0, through=through), weight)
    assert torch.equal(masked.soft(weight, mask, 0.0, through=through), masked.hard(weight, mask))


def test_scores_get_the_gradient_of_their_mask():
    scores, outer = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1)
    found = masked.score_through(scores, scores.detach() > 0)
    found.backward(outer)
    assert torch.equal(found, (scores > 0).float())
    assert torch.equal(scores.grad, outer)


# ---- patterns


def test_patterns_are_all_the_ways_to_keep():
    assert masked.patterns_of(2, 4).int().tolist() == [
        [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1],
    ]  # fmt: skip
    assert masked.patterns_of(1, 3).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    for kept, of in ((0, 4), (5, 4), (8, 16)):
        with pytest.raises(OptionError, match="256 ways or fewer"):
            masked.patterns_of(kept, of)


def test_gumbel_masks_are_drawn_with_the_odds_of_the_softmax():
    patterns, logits = masked.patterns_of(2, 4), torch.tensor([0.4, -0.2, 0.1, 0.0, -0.5, 0.3])
    g = torch.Generator().manual_seed(0)
    found = masked.gumbel_mask(logits.expand(40_000, 6), patterns, scale=2.0, temperature=0.02, generator=g)
    assert found.sum(-1).sub(2).abs().max() < 1e-5  # soft or not, a mask sums to what is kept
    nearest = (found @ patterns.float().T).argmax(-1)
    odds = torch.bincount(nearest, minlength=6) / len(nearest)
    expected = (2 * logits).softmax(-1)
    assert ((odds - expected).abs() < 4 * (expected * (1 - expected) / len(nearest)).sqrt()).all()


def test_gumbel_gradients_are_those_of_the_softmax():
    patterns, logits = masked.patterns_of(2, 4).double(), drawn(3, 6).double().requires_grad_()
    outer = drawn(3, 4, seed=1).double()
    masked.gumbel_mask(logits, patterns, scale=1.5, temperature=0.7).backward(outer)
    odds = (1.5 / 0.7 * logits.detach()).softmax(-1)
    towards = outer @ patterns.T
    expected = 1.5 / 0.7 * odds * (towards - (odds * towards).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)


# ---- hard-concrete gates


@pytest.mark.parametrize("log_alpha", [-2.0, -0.5, 0.0, 1.3])
def test_gates_are_open_with_the_odds_of_the_closed_form(log_alpha):
    gates = torch.full((40_000,), log_alpha)
    found = masked.hard_concrete(gates, generator=torch.Generator().manual_seed(1))
    odds = float(masked.open_probability(gates[:1]))
    assert odds == pytest.approx(1 - 1 / (1 + math.exp(-(2 / 3 * math.log(0.1 / 1.1) - log_alpha))), rel=1e-6)
    assert float((found > 0).float().mean()) == pytest.approx(odds, abs=3 * (odds * (1 - odds) / 40_000) ** 0.5)
    assert 0 <= float(found.min())
    assert float(found.max()) <= 1


def test_gates_pass_gradients_where_they_are_not_clamped():
    gates = drawn(2000).double().requires_grad_()
    found = masked.hard_concrete(gates, generator=torch.Generator().manual_seed(1))
    found.sum().backward()
    free = (found > 0) & (found < 1)
    inner = (found.detach() + 0.1) / 1.2
    torch.testing.assert_close(gates.grad[free], (1.2 * 1.5 * inner * (1 - inner))[free], rtol=1e-9, atol=1e-12)
    assert not gates.grad[~free].any()
    assert 0 < int(free.sum()) < 2000


def test_settled_gates_close_as_many_as_expected_and_the_lowest():
    log_alpha = drawn(50) * 2
    found = masked.settled_gates(log_alpha)
    closed = round(float((1 - masked.open_probability(log_alpha)).sum()))
    assert 0 < closed < 50
    assert set(found.nonzero().flatten().tolist()) == set(log_alpha.argsort()[closed:].tolist())
    kept = found > 0
    torch.testing.assert_close(found[kept], (1.2 * log_alpha[kept]).sigmoid())


# ---- masks of layers


def kept_of(masks, pattern="2:4"):
    return Selection(pattern=pattern).kept([matrix.abs() for matrix in masks.matrices()])


def layers():
    torch.manual_seed(0)
    return [nn.Linear(12, 6), Conv1D(6, 12), nn.Conv2d(4, 6, 2), Dense(torch.randn(6, 12))]


@pytest.mark.parametrize("rule", ["hard", "through", "sr-ste", "soft", "soft-through"])
def test_patterns_run_along_the_inputs_of_every_kind_of_layer(rule):
    masks = Masks(layers(), rule, decay=0.1, leak=0.5)
    assert masks.choose(kept_of(masks)) == sum(matrix.numel() for matrix in masks.matrices()) // 2
    assert masks.choose(kept_of(masks)) == 0
    assert masks.sparsity == 0.5
    assert [one.kept for one in masks.report()] == [one.total // 2 for one in masks.report()]
    linear, transposed, convolution, dense = masks.layers
    masks.finish()
    for matrix in (linear.weight, transposed.weight.T, convolution.weight.flatten(1), dense.matrix):
        assert ((matrix.reshape(6, -1, 4) != 0).sum(-1) == 2).all()
    assert type(linear) is nn.Linear
    assert type(dense) is Dense
    assert [matrix.shape for matrix in masks.matrices()] == [(6, 12), (6, 12), (6, 16), (6, 12)]


def test_a_layer_computes_with_its_masked_weight_and_keeps_its_parameter():
    layer = nn.Linear(8, 3)
    parameter, x = layer.weight, drawn(2, 8)
    masks = Masks([layer], "through")
    masks.choose(kept_of(masks))
    ((weight, mask),) = masks
    assert weight is parameter
    assert torch.equal(layer(x), nn.functional.linear(x, parameter * mask, layer.bias))
    compact = CompactLinear(Dense(drawn(3, 8)))
    inner = Masks([compact.weight], "hard")
    inner.choose(kept_of(inner))
    assert torch.equal(compact(x), x @ (drawn(3, 8) * inner.kept()[0]).T)


def test_masks_survive_a_file(tmp_path):
    def fresh():
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
        return module, Masks(module, "hard")

    module, masks = fresh()
    masks.choose(kept_of(masks))
    path = tmp_path / "masked.safetensors"
    safetensors_file.write(path, dict(module.state_dict()))
    header = safetensors_file.read_header(path)
    again, other = fresh()
    again.load_state_dict({k: safetensors_file.read_tensor(path, entry) for k, entry in header.entries.items()})
    assert all(torch.equal(a, b) for a, b in zip(masks.kept(), other.kept(), strict=True))
    assert torch.equal(module(drawn(2, 8)), again(drawn(2, 8)))
    assert other.sparsity == 0.5


def test_momentum_moves_no_pruned_weight_and_is_cleared_where_asked():
    layer = nn.Linear(8, 4)
    masks = Masks([layer])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)

    def step():
        layer(drawn(5, 8, seed=3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.restore()

    step()
    masks.choose(kept_of(masks))
    mask, before = masks.parts[0].mask, masks.parameters[0].detach().clone()
    step()
    assert torch.equal(masks.parameters[0][~mask], before[~mask])
    assert (masks.parameters[0][mask] != before[mask]).all()
    assert optimizer.state[masks.parameters[0]]["exp_avg"][~mask].any()
    masks.clear_moments(optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        held = optimizer.state[masks.parameters[0]][name]
        assert not held[~mask].any()
        assert held[mask].all()


def test_what_cannot_be_masked_is_refused():
    layer = nn.Linear(8, 4)
    with pytest.raises(OptionError, match="rule 'firm'; give one of hard"):
        Masked(layer.weight, "firm")
    with pytest.raises(ShapeError, match="row 45: two of the layers share a weight"):
        Masks([layer, layer], where="row 45")
    with pytest.raises(ShapeError, match="each with a weight of its own"):
        Masks([nn.ReLU()])
    masks = Masks([layer])
    with pytest.raises(ShapeError, match=r"a torch.float32 mask \(4, 8\); give bool \(4, 8\)"):
        masks.choose([torch.ones(4, 8)])


# ---- the decay behind the momentum


@pytest.mark.parametrize("anneal", [0, 3])
def test_decayed_adamw_follows_the_formula(anneal):
    weight, mask = nn.Parameter(drawn(4, 8).double()), drawn(4, 8, seed=1) > 0
    options = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "mask_decay": 0.05, "anneal": anneal}
    optimizer = MaskedAdamW([weight], [(weight, mask)], **options)
    w, m, v = weight.detach().clone(), torch.zeros(4, 8).double(), torch.zeros(4, 8).double()
    for t in range(1, 6):
        grad = drawn(4, 8, seed=10 + t).double()
        weight.grad = grad.clone()
        optimizer.step()
        w = w * (1 - 0.01 * 0.1)
        m = 0.8 * m + 0.2 * grad
        u = m + (0.05 * min(1, (t - 1) / anneal) if anneal else 0.05) * w * ~mask
        v = 0.9 * v + 0.1 * u**2
        w = w - 0.01 / (1 - 0.8**t) * u / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), w, rtol=1e-12, atol=1e-12)


def test_without_a_mask_it_is_adamw():
    ours, theirs = nn.Parameter(drawn(4, 8).double()), nn.Parameter(drawn(4, 8).double())
    options = {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}
    pair = (MaskedAdamW([ours], [], **options, mask_decay=3.0), torch.optim.AdamW([theirs], **options))
    for t in range(5):
        for weight, optimizer in zip((ours, theirs), pair, strict=True):
            weight.grad = drawn(4, 8, seed=t).double()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(OptionError, match="mask_decay = -1"):
        MaskedAdamW([ours], [], mask_decay=-1)
    with pytest.raises(OptionError, match=r"betas \(0.9, 1\)"):
        MaskedAdamW([ours], [], betas=(0.9, 1))


def test_the_decay_moves_pruned_weights_towards_zero_and_no_others():
    weight, mask = nn.Parameter(drawn(4, 8)), drawn(4, 8, seed=1) > 0
    optimizer = MaskedAdamW([weight], [(weight, mask)], lr=0.01, mask_decay=0.05)
    before = weight.detach().clone()
    for _ in range(3):
        weight.grad = torch.zeros(4, 8)
        optimizer.step()
    assert torch.equal(weight[mask], before[mask])
    assert (weight[~mask].abs() < before[~mask].abs()).all()
