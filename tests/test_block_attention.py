"""Attention over some blocks against dense attention with the same mask, and its error against its bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from
from torch.nn import functional

from pennyweight.errors import OptionError, ShapeError
from pennyweight.zoo.block_attention import (
    allowed_blocks,
    block_attention,
    by_distance,
    by_mass,
    error_bound,
    expected_share,
    log_mass_bounds,
    own_blocks,
)


def qkv(length, keys, seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    q = size * torch.randn(2, 3, length, 4, dtype=torch.float64, generator=g)
    k, v = torch.randn(2, 2, 3, keys, 4, dtype=torch.float64, generator=g)
    return q, k, v


def mask_of(keep, length, keys, block):
    """(B, H, T, S): every pair of positions by hand."""
    mask = torch.zeros(*keep.shape[:-2], length, keys, dtype=torch.bool)
    for t in range(length):
        for s in range(t + keys - length + 1):
            # a query block's own blocks hold a position of one of its queries
            mine = {(u + keys - length) // block for u in range(length) if u // block == t // block}
            mask[..., t, s] = keep[..., t // block, s // block] | (s // block in mine)
    return mask


SIZES = {"length": integers(1, 13), "more": integers(0, 7), "block": integers(1, 6), "seed": integers(0, 99)}


@settings(max_examples=60)
@given(**SIZES, size=sampled_from([1.0, 30.0]))
def test_it_is_dense_attention_with_the_blocks_masked(length, more, block, seed, size):
    q, k, v = qkv(length, length + more, seed, size)
    shape = (-(-length // block), -(-(length + more) // block))
    keep = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = mask_of(keep, length, length + more, block)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = block_attention(q, k, v, keep, block=block)
    torch.testing.assert_close(found.output, expected, rtol=1e-9, atol=1e-11)
    logits = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(found.log_mass, logits.logsumexp(-1))
    bound = error_bound(found, q, k, v, keep, block=block)
    everything = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_of(keep | True, length, length + more, block)
    )
    assert bool(((found.output - everything).norm(dim=-1) <= bound + 1e-9).all())


@given(**SIZES)
def test_with_every_block_kept_it_is_exact_and_its_bound_is_zero(length, more, block, seed):
    q, k, v = qkv(length, length + more, seed)
    keep = allowed_blocks(length, length + more, block)
    found = block_attention(q, k, v, keep, block=block)
    causal = torch.ones(length, length + more, dtype=torch.bool).tril(more)
    torch.testing.assert_close(found.output, functional.scaled_dot_product_attention(q, k, v, attn_mask=causal))
    assert found.computed == 1
    assert not error_bound(found, q, k, v, keep, block=block).any()
    assert torch.equal(by_mass(q, k, block=block, count=99), keep.expand(2, 3, -1, -1))
    assert torch.equal(by_distance(length, length + more, block, torch.ones(keep.shape[1]))[0], keep)


def test_bounds_hold_the_mass_between_them():
    q, k, _ = qkv(6, 22, size=3.0)
    low, high = log_mass_bounds(q, k, block=5)
    logits = q @ k.transpose(-1, -2) / 2
    exact = torch.stack([part.logsumexp(-1) for part in logits.split(5, dim=-1)], dim=-1)
    assert bool((low <= exact + 1e-12).all())
    assert bool((exact <= high + 1e-12).all())
    # blocks of one key hold no doubt
    low, high = log_mass_bounds(q, k, block=1)
    torch.testing.assert_close(low, logits)
    torch.testing.assert_close(high, logits)


@pytest.mark.parametrize("estimate", ["mean", "box"])
def test_by_mass_takes_the_blocks_that_matter(estimate):
    q, k, v = qkv(32, 32)
    q[..., 0] += 4
    k[:, :, 8:12, 0] += 4  # a block that all queries like
    keep = by_mass(q, k, block=4, count=3, estimate=estimate)
    assert bool(keep[:, :, 7, 2].all())
    assert bool((keep.sum(-1) == torch.tensor([1, 2, 3, 3, 3, 3, 3, 3])).all())
    assert bool((keep | ~own_blocks(32, 32, 4)).all())
    full = functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def error(chosen):
        return float((block_attention(q, k, v, chosen, block=4).output - full).norm())

    nearest = own_blocks(32, 32, 4) | (torch.arange(8)[:, None] - torch.arange(8) < 3)
    assert error(keep) < 0.7 * error(nearest)
    # with blocks of one key the estimate is the mass itself: no other choice of as many keys holds more
    single = by_mass(q, k, block=1, count=5, estimate=estimate)
    mass = block_attention(q, k, v, single, block=1).log_mass
    logits = (q @ k.transpose(-1, -2) / 2).masked_fill(~torch.ones(32, 32).bool().tril(), -torch.inf)
    own = logits.diagonal(dim1=-1, dim2=-2)
    others = logits.masked_fill(torch.eye(32).bool(), -torch.inf).topk(4, dim=-1).values
    torch.testing.assert_close(mass, torch.cat([own[..., None], others], -1).logsumexp(-1))


def test_blocks_drawn_by_distance_come_as_often_as_they_should():
    chance = torch.tensor([1.0, 0.5, 0.3, 0.1, 0.0, 0.2])
    keep = by_distance(24, 24, 4, chance, heads=4000, generator=torch.Generator().manual_seed(0))
    often = keep.float().mean(0)
    for row in range(6):
        for column in range(6):
            expected = float(chance[row - column]) if column <= row else 0.0
            assert abs(float(often[row, column]) - expected) < 4 * (0.25 / 4000) ** 0.5
    share = float(keep.sum()) / (4000 * 21)
    assert share == pytest.approx(expected_share(24, 24, 4, chance), abs=0.005)
    q, k, v = qkv(24, 24)
    assert block_attention(q, k, v, keep[:3], block=4).computed == pytest.approx(float(keep[:3].sum()) / 63)


def test_gradients_are_those_of_dense_attention():
    q, k, v = (part.requires_grad_() for part in qkv(5, 7))
    keep = by_mass(q.detach(), k.detach(), block=2, count=2)
    dense = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(keep, 5, 7, 2))
    grads = [
        torch.autograd.grad(out.square().sum(), (q, k, v))
        for out in (block_attention(q, k, v, keep, block=2).output, dense)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(4, 6)
    with pytest.raises(ShapeError, match=r"give booleans \(2, 3\), by head or sequence too"):
        block_attention(q, k, v, torch.ones(2, 2, dtype=torch.bool), block=2)
    with pytest.raises(ShapeError, match=r"keep \(5, 2, 3\) does not expand to \(2, 3, 2, 3\)"):
        block_attention(q, k, v, torch.ones(5, 2, 3, dtype=torch.bool), block=2)
    with pytest.raises(ShapeError, match="S >= T"):
        block_attention(k, q, q, torch.ones(3, 2, dtype=torch.bool), block=2)
    with pytest.raises(OptionError, match="count = 0, estimate = 'mean'; give at least 1"):
        by_mass(q, k, block=2, count=0)
    with pytest.raises(OptionError, match=r"probabilities \(2,\) for 3 blocks; give \(3,\) between 0 and 1"):
        by_distance(4, 6, 2, torch.ones(2))
