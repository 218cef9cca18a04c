"""AdamP and SGDP against the figures of the official implementation, and what projection promises."""

import copy
import math

import pytest
import torch
from torch import nn

from pennyweight.errors import OptionError
from pennyweight.train.optim import SGDP, AdamP, effective_step


def toy():
    """A linear map of unit rows: scale-invariant in each row; float64."""
    matrix = [[0.1, 0.2, 0.3, 0.4], [-0.5, -0.6, -0.7, -0.8], [0.9, 1.0, 1.1, 1.2]]
    weight = nn.Parameter(torch.tensor(matrix, dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
    x = torch.tensor([[1, 2, -1, 0.5], [0, 1, 1, -1]], dtype=torch.float64)
    y = torch.tensor([[1, 0, -1], [0, 1, 0]], dtype=torch.float64)

    def loss():
        unit = weight / weight.norm(dim=1, keepdim=True)
        return (x @ unit.T + bias - y).square().mean()

    return weight, bias, loss


def trained(make, steps=20):
    weight, bias, loss = toy()
    optimizer = make([weight, bias])
    norms, losses = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(float(value.detach()))
        optimizer.step()
        norms.append(float(weight.detach().norm()))
    return weight.detach(), norms, losses


# figures of the official code on this toy: norms after 1, 5, 20 steps and, where known, the loss at step 20 and W[0, 0]
@pytest.mark.parametrize(
    ("make", "norms", "loss", "corner"),
    [
        (lambda p: AdamP(p, lr=0.1), (2.57165090, 2.62229646, 2.66874863), 0.0826405439, 0.24209093),
        (lambda p: AdamP(p, lr=0.1, delta=0.0), (2.61916016, 2.91572809, 3.66868092), None, None),
        (lambda p: torch.optim.Adam(p, lr=0.1), (2.61916016, 2.91572809, 3.66868092), None, None),
        (lambda p: SGDP(p, lr=0.5, momentum=0.9), (2.64138040, 2.95268257, 3.23104909), 0.0635426982, None),
        (lambda p: SGDP(p, lr=0.5, momentum=0.9, delta=0.0), (2.64138040, 4.25554857, 8.38074754), None, None),
        (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), (2.64138040, 4.25554857, 8.38074754), None, None),
    ],
    ids=["adamp", "adamp-off", "adam", "sgdp", "sgdp-off", "sgd"],
)
def test_norms_and_losses_are_the_official_ones(make, norms, loss, corner):
    weight, seen, losses = trained(make)
    assert [seen[0], seen[4], seen[19]] == pytest.approx(list(norms), abs=1e-8)
    if loss is not None:
        assert losses[19] == pytest.approx(loss, abs=1e-9)
    if corner is not None:
        assert float(weight[0, 0]) == pytest.approx(corner, abs=1e-8)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kind", [AdamP, SGDP])
def test_steps_are_orthogonal_to_every_channel(kind, nesterov):
    weight, bias, loss = toy()
    options = {"lr": 0.3, "nesterov": nesterov, **({"momentum": 0.9} if kind is SGDP else {})}
    optimizer = kind([weight, bias], **options)
    for _ in range(6):
        before = weight.detach().clone()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        step = weight.detach() - before
        assert step.norm() > 1e-3
        # relative to the largest row: eps beside the norm leaves 1e-8 of the radial part
        assert ((step * before).sum(1) / before.norm(dim=1)).abs().max() < 1e-7 * step.norm()


def test_the_layer_view_takes_over_where_channels_are_not_scale_invariant(generator):
    weight = nn.Parameter(torch.randn(3, 50, generator=generator, dtype=torch.float64))
    gradient = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    # along the weight in opposite senses: every channel sees a large cosine, the whole sees none
    gradient[:2] = weight.detach()[:2] * torch.tensor([[1.0], [-1.0]])
    gradient[1] *= weight.detach()[0].square().sum() / weight.detach()[1].square().sum()
    gradient[2] -= weight.detach()[2] * (gradient[2] @ weight.detach()[2]) / weight.detach()[2].square().sum()
    weight.grad, before = gradient.clone(), weight.detach().clone()
    AdamP([weight], lr=0.1, betas=(0.5, 0.5)).step()
    step = weight.detach() - before
    assert abs(float((step * before).sum())) < 1e-6
    assert (step * before).sum(1).abs().max() > 1e-2  # and not channel by channel


def test_weights_that_are_not_scale_invariant_are_left_to_plain_adam(generator):
    target = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    results = []
    for make in (
        lambda p: AdamP(p, lr=0.05, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    ):
        weight = nn.Parameter(target.clone() * 0.2)
        optimizer = make([weight])
        for _ in range(30):
            optimizer.zero_grad()
            (weight - target).square().sum().backward()
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgdp_decays_weights_as_much_as_sgd_does_in_the_long_run(momentum):
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))  # 1-D: never projected
    optimizer = SGDP([weight], lr=0.01, momentum=momentum, weight_decay=0.1)
    weight.grad = torch.zeros(4, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4,), 1 - 0.001 / (1 - momentum), dtype=torch.float64))


def test_projected_weights_decay_by_their_own_ratio():
    decayed = []
    for ratio in (0.0, 0.1, 1.0):
        weight = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
        weight.grad = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)  # cosine 0: counts as scale-invariant
        AdamP([weight], lr=0.1, weight_decay=0.5, wd_ratio=ratio).step()
        decayed.append(float(weight.detach()[0, 0]))
    assert decayed == pytest.approx([3, 3 * (1 - 0.005), 3 * (1 - 0.05)])


def test_one_dimensional_weights_take_the_steps_of_adam(generator):
    start, results = torch.randn(6, generator=generator, dtype=torch.float64), []
    for make in (lambda p: AdamP(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)):
        weight = nn.Parameter(start.clone())
        optimizer = make([weight])
        for _ in range(10):
            optimizer.zero_grad()
            (weight / weight.norm()).square().mul(torch.arange(6)).sum().backward()
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [AdamP, SGDP])
def test_a_state_dict_carries_everything(kind):
    def steps(weight, bias, loss, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    options = {"lr": 0.1, **({"momentum": 0.9} if kind is SGDP else {})}
    weight, bias, loss = toy()
    optimizer = kind([weight, bias], **options)
    steps(weight, bias, loss, optimizer, 7)
    again, again_bias, again_loss = toy()
    with torch.no_grad():
        again.copy_(weight)
        again_bias.copy_(bias)
    other = kind([again, again_bias], lr=9.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    steps(weight, bias, loss, optimizer, 5)
    steps(again, again_bias, again_loss, other, 5)
    assert torch.equal(weight, again)
    assert torch.equal(bias, again_bias)


def test_convolutions_are_projected_by_output_channel_in_any_memory_format(generator):
    kernel = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    slope = torch.randn(4, 27, generator=generator, dtype=torch.float64)
    flat = kernel.flatten(1)
    slope = (slope - flat * (slope * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True)).view_as(kernel)
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(kernel.clone(memory_format=memory))
        weight.grad = slope.clone(memory_format=memory)
        AdamP([weight], lr=0.1).step()
        step = weight.detach() - kernel
        assert (step.flatten(1) * flat).sum(1).abs().max() < 1e-6
        results.append(step)
    torch.testing.assert_close(results[0], results[1])


def test_closures_groups_and_parameters_without_gradients():
    weight, bias, loss = toy()
    idle = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamP([{"params": [weight], "lr": 0.0}, {"params": [bias, idle]}], lr=0.1)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    before = weight.detach().clone()
    assert optimizer.step(closure) == pytest.approx(float(toy()[2]().detach()))
    assert torch.equal(weight, before)
    assert not torch.equal(bias, toy()[1])
    assert torch.equal(idle, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: AdamP(p, lr=-1), r"lr = -1"),
        (lambda p: AdamP(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: AdamP(p, eps=math.nan), "eps = nan"),
        (lambda p: SGDP(p, momentum=1.0), "momentum 1.0"),
        (lambda p: SGDP(p, delta=math.inf), "delta = inf"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(OptionError, match=words):
        make([nn.Parameter(torch.zeros(2, 2))])


def test_sparse_gradients_are_refused():
    layer = nn.Embedding(4, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(OptionError, match="SparseAdam"):
        AdamP(layer.parameters()).step()


def test_effective_steps_are_turns_of_the_direction():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0]]))
        watch = effective_step(layer)
        layer.weight.mul_(2)  # longer, and not turned
        watch.step()
        layer.weight.copy_(torch.tensor([[0.0, 1.0]]))  # a right angle: the chord is the root of 2
        watch.step()
    assert watch.norms["weight"] == [3, 6, 1]
    assert watch.turns["weight"] == pytest.approx([0, math.sqrt(2)])
    assert watch.growth() == pytest.approx({"weight": 1 / 3})
    with pytest.raises(OptionError, match="no weight of two dimensions"):
        effective_step(nn.LayerNorm(3))
