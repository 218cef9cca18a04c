"""Attention over some blocks of keys, taken by chance or by estimated mass, and what the others could have changed.

Row 122. Source: F. Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative
AI", arXiv:2410.18441: pairs of query and key blocks take part with a probability that falls with their distance, in the
tiles of FlashAttention (T. Dao et al., arXiv:2205.14135). Differs from the source: only its abstract is public, so the
law of the probability is the caller's; blocks may also be chosen by the attention mass they are estimated to hold, and
the error of leaving out the rest is bounded, without looking at them one key at a time.

The mass of a block of keys is the sum of exp(logit) over it. By Jensen's inequality it is at least its number of keys
times exp(mean logit), and the mean logit is that of the mean key; it is at most that number times exp of the largest
logit that any key inside the block's box (least and largest value of each number) could give.

Shape letters: B sequences, H heads, T queries, S keys, D head dimension, R size of a block, M query blocks, N key
blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from pennyweight.errors import OptionError, ShapeError

Estimate = Literal["mean", "box"]


@dataclass(frozen=True)
class Attended:
    """What attention over some blocks gave.

    Attributes:
        output: (B, H, T, D).
        log_mass: (B, H, T) log of the mass of the keys that took part.
        computed: share of the pairs of blocks that causality allows.
    """

    output: Tensor
    log_mass: Tensor
    computed: float


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, *, block: int, scale: float | None = None
) -> Attended:
    """Causal attention of each query block to the key blocks that are kept for it.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D); the queries are the last T of S positions.
        value: (B, H, S, D).
        keep: (M, N), (H, M, N) or (B, H, M, N) booleans: which pairs take part. Pairs of the future never do; a query's
            own block always does, so that no query is left without keys.
        block: R; the last block of queries or keys may be shorter.
        scale: of logits; None for 1/sqrt(D).

    Exact, up to rounding, when every block is kept. Only kept pairs are computed (those of one head alone cost all
    heads), and T x S logits never exist at once. No fully fused kernel: for counting and for checking, not for speed.

    Raises:
        ShapeError: tensors that do not fit each other.
    """
    _check(query, key, value, block)
    batch, heads, length, dim = query.shape
    ahead = key.shape[2] - length
    blocks = _starts(length, block), _starts(key.shape[2], block)
    allowed = allowed_blocks(length, key.shape[2], block)
    whole = _expanded(keep, (batch, heads, len(blocks[0]), len(blocks[1]))) | own_blocks(length, key.shape[2], block)
    whole = whole & allowed
    scale = dim**-0.5 if scale is None else scale
    output, log_mass = torch.empty_like(query), query.new_empty(batch, heads, length)
    for row, start in enumerate(blocks[0]):
        end = min(start + block, length)
        q = query[:, :, start:end] * scale
        at = torch.arange(start, end, device=query.device)[:, None] + ahead
        top = q.new_full(q.shape[:-1], -math.inf)
        total, mixed = torch.zeros_like(top), torch.zeros_like(q)
        for column in whole[:, :, row].any(0).any(0).nonzero()[:, 0].tolist():
            first = blocks[1][column]
            last = min(first + block, key.shape[2])
            logits = q @ key[:, :, first:last].transpose(-1, -2)
            hidden = (torch.arange(first, last, device=query.device) > at) | ~whole[:, :, row, column, None, None]
            logits = logits.masked_fill(hidden, -math.inf)
            higher = torch.maximum(top, logits.amax(-1))
            safe = higher.masked_fill(higher == -math.inf, 0.0)  # no key yet: all weights are exp(-inf) = 0
            shrink, weight = (top - safe).exp(), (logits - safe[..., None]).exp()
            total = total * shrink + weight.sum(-1)
            mixed = mixed * shrink[..., None] + weight @ value[:, :, first:last]
            top = higher
        output[:, :, start:end] = mixed / total[..., None]
        log_mass[:, :, start:end] = top + total.log()
    done = (whole & allowed).sum() / (allowed.sum() * batch * heads)
    return Attended(output, log_mass, float(done))


def by_distance(
    length: int, keys: int, block: int, probability: Tensor, *, heads: int = 1, generator: Generator | None = None
) -> Tensor:
    """Blocks drawn independently by their distance: (H, M, N) booleans.

    Args:
        length: T.
        keys: S.
        block: R.
        probability: (N,) of a pair at a distance of 0, 1, ... blocks; what is at 0 always takes part.
        heads: H, drawn apart.
        generator: of the draws.

    Raises:
        OptionError: probabilities outside 0 to 1, or too few.
    """
    count = -(-keys // block)
    if probability.shape != (count,) or bool(((probability < 0) | (probability > 1)).any()):
        raise OptionError(
            f"by_distance: probabilities {tuple(probability.shape)} for {count} blocks; give ({count},) between 0 and 1"
        )
    chance = probability[_distance(length, keys, block).clamp_min(0)].expand(heads, -1, -1)
    drawn = torch.rand(chance.shape, generator=generator) < chance
    return (drawn | own_blocks(length, keys, block)) & allowed_blocks(length, keys, block)


def expected_share(length: int, keys: int, block: int, probability: Tensor) -> float:
    """Share of the allowed pairs that `by_distance` takes on average."""
    distance, allowed = _distance(length, keys, block), allowed_blocks(length, keys, block)
    chance = torch.where(own_blocks(length, keys, block), 1.0, probability.double()[distance.clamp_min(0)])
    return float(chance[allowed].mean())


def by_mass(
    query: Tensor, key: Tensor, *, block: int, count: int, estimate: Estimate = "mean", scale: float | None = None
) -> Tensor:
    """The ``count`` key blocks of largest estimated mass for each query block, its own among them: (B, H, M, N).

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D).
        block: R.
        count: key blocks a query block attends to; fewer where causality allows fewer.
        estimate: "mean" or "box": the bound from below or from above, see the module's text; of a block of queries the
            mean share over its queries.
        scale: of logits; None for 1/sqrt(D).

    Raises:
        OptionError: a count below 1, or another estimate.
    """
    if count < 1 or estimate not in ("mean", "box"):
        raise OptionError(f"by_mass: count = {count}, estimate = {estimate!r}; give at least 1, and mean or box")
    _check(query, key, key, block)
    length, keys = query.shape[2], key.shape[2]
    low, high = log_mass_bounds(query, key, block=block, scale=scale)
    logs = low if estimate == "mean" else high  # (B, H, T, N)
    allowed, own = allowed_blocks(length, keys, block), own_blocks(length, keys, block)
    rows = torch.arange(length) // block
    share = logs.masked_fill(~allowed[rows], -math.inf).softmax(-1)
    summed = share.new_zeros(*share.shape[:2], allowed.shape[0], allowed.shape[1]).index_add(2, rows, share)
    ranked = summed.masked_fill(~allowed, -1.0).masked_fill(own & allowed, math.inf)
    chosen = ranked.topk(min(count, allowed.shape[1]), dim=-1).indices
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, chosen, True) & allowed


def log_mass_bounds(query: Tensor, key: Tensor, *, block: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Bounds from below and above on the log mass of each key block for each query: (B, H, T, N) twice.

    The future is not masked inside a block: a block that a query sees in part has the bound from above alone.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q = query * scale
    starts = _starts(key.shape[2], block)
    parts = [key[:, :, start : start + block] for start in starts]
    size = torch.tensor([math.log(part.shape[2]) for part in parts])
    mean = torch.stack([part.mean(2) for part in parts], dim=2)
    least, most = (torch.stack([getattr(part, end)(2) for part in parts], dim=2) for end in ("amin", "amax"))
    low = q @ mean.transpose(-1, -2)
    # the corner of the box that a query likes best: positive parts with the largest, negative with the least
    high = q.clamp_min(0) @ most.transpose(-1, -2) + q.clamp_max(0) @ least.transpose(-1, -2)
    return low + size, high + size


def error_bound(
    attended: Attended,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    *,
    block: int,
    scale: float | None = None,
) -> Tensor:
    """How far, at most, ``attended`` is from full attention: (B, H, T), in the Euclidean norm of an output.

    With a share d of the whole mass left out, the output moves by d times the difference of two means of values, so by
    at most d times the diameter of the values. The mass left out is bounded from above by the boxes of its blocks.

    Args:
        attended: what `block_attention` gave for the same arguments.
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        keep: as given to `block_attention`.
        block: R.
        scale: of logits.
    """
    length, keys = query.shape[2], key.shape[2]
    _, high = log_mass_bounds(query, key, block=block, scale=scale)
    taken = _expanded(keep, (*query.shape[:2], -(-length // block), -(-keys // block)))
    left_out = allowed_blocks(length, keys, block) & ~(taken | own_blocks(length, keys, block))
    rows = torch.arange(length) // block
    missing = high.masked_fill(~left_out[:, :, rows], -math.inf).logsumexp(-1)
    share = torch.sigmoid(missing - attended.log_mass)
    diameter = (value.amax(2) - value.amin(2)).norm(dim=-1)  # of the box around all values
    bound: Tensor = share * diameter[..., None]
    return bound


def allowed_blocks(length: int, keys: int, block: int) -> Tensor:
    """(M, N) pairs with a key that some query of the block may see."""
    last = torch.arange(block - 1, length + block - 1, block).clamp_max(length - 1) + keys - length
    return torch.tensor(_starts(keys, block)) <= last[:, None]


def own_blocks(length: int, keys: int, block: int) -> Tensor:
    """(M, N) pairs that hold a query's own position."""
    begin = torch.arange(0, length, block) + keys - length
    last = torch.arange(block - 1, length + block - 1, block).clamp_max(length - 1) + keys - length
    columns = torch.arange(-(-keys // block))
    return (columns >= (begin // block)[:, None]) & (columns <= (last // block)[:, None])


def _distance(length: int, keys: int, block: int) -> Tensor:
    last = torch.arange(block - 1, length + block - 1, block).clamp_max(length - 1) + keys - length
    return (last // block)[:, None] - torch.arange(-(-keys // block))


def _starts(length: int, block: int) -> list[int]:
    return list(range(0, length, block))


def _expanded(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
    if keep.dtype != torch.bool or keep.ndim < 2 or keep.shape[-2:] != shape[-2:]:
        raise ShapeError(
            f"block_attention: keep is {keep.dtype} {tuple(keep.shape)}; give booleans {shape[-2:]}, by head or "
            "sequence too"
        )
    try:
        return keep.expand(shape)
    except RuntimeError:
        raise ShapeError(f"block_attention: keep {tuple(keep.shape)} does not expand to {shape}") from None


def _check(query: Tensor, key: Tensor, value: Tensor, block: int) -> None:
    fits = query.ndim == key.ndim == value.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    fits = fits and query.shape[-1] == key.shape[-1] and key.shape[2] == value.shape[2] >= query.shape[2] > 0
    if not fits or value.shape[-1] != query.shape[-1]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (query, key, value))
        raise ShapeError(f"block_attention: {shapes}; give query (B, H, T, D), key and value (B, H, S, D), S >= T")
    if block < 1:
        raise OptionError(f"block_attention: block = {block}; give at least 1")
