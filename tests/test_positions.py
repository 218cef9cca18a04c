"""Rotary positions times a decay with distance, against closed forms."""

import numpy as np
import pytest
import scipy.special
import torch
from torch.nn import functional

from pennyweight.errors import OptionError, ShapeError
from pennyweight.zoo.gpt import GPT, GPTConfig
from pennyweight.zoo.positions import angles, distance_bias, rope_alibi, rotated, slopes


def qkv(length=7, heads=4, dim=8, seed=0):
    return torch.randn(3, 2, heads, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_harmonic_bias_is_the_digamma_function():
    slope = torch.tensor([0.5, 2.0], dtype=torch.float64)
    bias = distance_bias(3000, slope, "harmonic")[:, -1].flip(-1).numpy()  # of the last query, by distance
    exact = scipy.special.digamma(np.arange(3000) + 1) + np.euler_gamma
    np.testing.assert_allclose(bias, -slope.numpy()[:, None] * exact, rtol=1e-13, atol=1e-13)
    # so that a head of slope m weighs keys by a power law: n^-m up to the constant e^(-m gamma)
    weight = np.exp(bias[1, 1000:])
    np.testing.assert_allclose(weight * np.exp(2 * np.euler_gamma) * np.arange(1000, 3000) ** 2, 1, rtol=1.1e-3)


def test_the_linear_bias_is_alibi():
    slope = slopes(8, "geometric")
    torch.testing.assert_close(slope, torch.tensor([0.5**power for power in range(1, 9)]))
    torch.testing.assert_close(slopes(4), torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]))
    bias = distance_bias(4, slope, "linear")
    for head, m in enumerate(slope.tolist()):
        for query in range(4):
            for key in range(4):
                assert float(bias[head, query, key]) == (-m * (query - key) if key <= query else -torch.inf)
    assert torch.equal(distance_bias(4, slope, "none")[3].exp(), torch.ones(4, 4).tril())


def test_turned_products_depend_on_the_distance_and_lengths_stay():
    cosine, sine = angles(50, 6)
    q, k = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = (rotated(x.expand(50, 6), cosine, sine) for x in (q, k))
    products = turned_q @ turned_k.T
    for apart in range(-40, 41, 8):
        line = products.diagonal(apart)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=0, atol=2e-5)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(50))
    # as complex numbers: a turn by position times frequency
    whole = torch.complex(q[:3], q[3:]) * torch.polar(torch.ones(3), 7 * 10_000.0 ** (-torch.arange(0, 6, 2) / 6))
    torch.testing.assert_close(torch.cat([whole.real, whole.imag]), turned_q[7])


@pytest.mark.parametrize("distance", ["linear", "harmonic"])
def test_attention_is_that_of_the_rotary_logits_times_the_decay(distance):
    q, k, v = qkv()
    found = rope_alibi(q, k, v, distance=distance)
    turn = angles(7, 8)
    logits = rotated(q, *turn) @ rotated(k, *turn).transpose(-1, -2) / 8**0.5
    grown = {"linear": [0.0, 1, 2, 3, 4, 5, 6], "harmonic": [0, 1, 3 / 2, 11 / 6, 25 / 12, 137 / 60, 49 / 20]}[distance]
    for head in range(4):
        for query in range(7):
            decay = torch.tensor([np.exp(-grown[query - key] / (head + 1)) for key in range(query + 1)])
            weight = logits[:, head, query, : query + 1].exp() * decay  # the factors
            expected = (weight / weight.sum(-1, keepdim=True))[:, None] @ v[:, head, : query + 1]
            torch.testing.assert_close(found[:, head, query], expected[:, 0], rtol=1e-6, atol=1e-7)


def test_slopes_of_zero_are_rotary_attention_alone_and_gradients_are_right():
    q, k, v = qkv()
    turn = angles(7, 8)
    plain = functional.scaled_dot_product_attention(rotated(q, *turn), rotated(k, *turn), v, is_causal=True)
    for distance in ("linear", "harmonic"):
        torch.testing.assert_close(rope_alibi(q, k, v, slope=torch.zeros(4), distance=distance), plain)
    torch.testing.assert_close(rope_alibi(q, k, v, distance="none"), plain)
    small = [part[:1, :2, :3, :2].clone().requires_grad_() for part in (q, k, v)]
    slope = torch.tensor([0.3, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v, s: rope_alibi(q, k, v, slope=s), (*small, slope))


@pytest.mark.parametrize("distance", ["linear", "harmonic"])
def test_a_gpt_decays_with_distance(distance):
    sizes = {"width": 16, "depth": 2, "num_heads": 2, "vocabulary": 20, "context": 24}
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (2, 24), generator=g)
    plain = GPT(GPTConfig(**sizes), generator=torch.Generator().manual_seed(1))
    other = GPT(GPTConfig(**sizes, distance=distance), generator=torch.Generator().manual_seed(1))
    assert plain.state_dict().keys() == other.state_dict().keys()
    with torch.no_grad():
        assert float((plain(ids) - other(ids)).abs().max()) > 1e-3
        for layer in other.blocks:
            layer.attention.slope.zero_()
        torch.testing.assert_close(other(ids), plain(ids))


def test_what_does_not_fit_is_refused():
    q, k, v = qkv()
    with pytest.raises(OptionError, match="head_dim 7; rotary positions turn pairs"):
        angles(3, 7)
    with pytest.raises(OptionError, match="distance 'far'; give one of none, linear, harmonic"):
        rope_alibi(q, k, v, distance="far")
    with pytest.raises(OptionError, match="slopes are one number a head, at least 0"):
        distance_bias(3, torch.tensor([-1.0]))
    with pytest.raises(ShapeError, match=r"slopes \(3,\) for 4 heads; give one a head"):
        rope_alibi(q, k, v, slope=torch.ones(3))
    with pytest.raises(ShapeError, match="the same B, H and T"):
        rope_alibi(q, k[:, :2], v)
    with pytest.raises(OptionError, match="series 'far'; give at least 1, and harmonic or geometric"):
        slopes(4, "far")
    with pytest.raises(OptionError, match="distance 'far'"):
        GPTConfig(distance="far")
