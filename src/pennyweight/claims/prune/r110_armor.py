"""Row 110, ARMOR: two small block-diagonals around a 2:4 core take off output error that a 2:4 mask alone leaves."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pennyweight.calibrate import collect
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.levers.prune.armor import ARMOR
from pennyweight.levers.prune.sparsegpt import SparseGPT
from pennyweight.levers.prune.wanda import Wanda
from pennyweight.levers.quantize.lorc import compensation
from pennyweight.solvers.scores import normalized
from pennyweight.weights import Dense, NofM, Sum, Weight

_HEADLINE = "Qwen2.5-7B at 2:4, MMLU: ARMOR 65.6 at 5 % more parameters, SparseGPT 56.9, NoWag 53.5, Wanda 52.2 (table)"
_BLOCKS = (0, 2, 5)  # of MiniLM's six
_MARGIN = 0.97


def _proxy(weight: Weight, matrix: Tensor, moment: Tensor) -> float:
    """The loss that ARMOR descends, relative to a zero matrix."""
    target, rows, columns = normalized(matrix)
    gap = (weight.dense().detach().float() - matrix) / rows / columns
    return float((gap.square() * moment.diagonal()).sum() / (target.square() * moment.diagonal()).sum())


def _masked(matrix: Tensor, nowag: Weight) -> NofM:
    return NofM.keep(matrix.half(), nowag.dense() != 0, n=2, m=4)


@cache
def _figures(assets: Assets) -> tuple[Tensor, Tensor, float]:
    """Proxies (maps, 3) of ARMOR, NoWag and Wanda; output errors (maps, 5) on held-out text, of SparseGPT and of NoWag
    with a low rank as well; the share of bytes that ARMOR adds to a 2:4 matrix."""
    minilm = assets.minilm()
    seen = collect(minilm.model, minilm.windows("wiki", part="calibration", length=128, count=24))
    fresh = collect(minilm.model, minilm.windows("wiki", part="heldout", length=128, count=8, seed=1))
    proxies, errors, sizes = [], [], []
    for one, matrix in zip(minilm.maps(), minilm.matrices(), strict=True):
        if one.block not in _BLOCKS:
            continue
        weight, known = Dense(matrix), seen[one.name]
        moment, judge = known.second_moment, fresh[one.name].second_moment
        assert moment is not None
        armor, nowag = (ARMOR(iterations=count).solve(weight, known) for count in (300, 0))
        wanda, sparsegpt = (lever(pattern="2:4").solve(weight, known) for lever in (Wanda, SparseGPT))
        rank = ARMOR().block_of((matrix.shape[0], matrix.shape[1]))
        rest = matrix - nowag.dense().detach().float()
        # the mask's own values with a low rank in the place of the block-diagonals
        low = Sum(_masked(matrix, nowag), compensation(rest, rank, moment=None, factor_bits=16, where="row 110"))
        proxies.append([_proxy(each, matrix, moment) for each in (armor, nowag, wanda)])
        errors.append([each.error(matrix, judge) for each in (armor, nowag, wanda, sparsegpt, low)])
        sizes.append((armor.cost().bytes, wanda.cost().bytes))
    more = sum(a for a, _ in sizes) / sum(w for _, w in sizes) - 1
    return torch.tensor(proxies), torch.tensor(errors), more


@claim(row=110, pace="slow", headline=_HEADLINE)
def block_diagonals_make_good_for_a_mask(assets: Assets) -> Outcome:
    """2:4 in half of MiniLM's layers, against masks of the same core; the control spends the bytes on a low rank."""
    proxies, errors, more = _figures(assets)
    method, nowag, wanda, _, control = errors.mean(0).tolist()
    helped = float((errors[:, :1] < errors[:, 1:3]).all(1).float().mean())
    every = bool((proxies[:, :1] < proxies[:, 1:]).all())
    return Outcome(
        method=method,
        baseline=wanda,
        unit="relative error of a map's outputs at 2:4, held-out text, mean over maps",
        holds=every and helped >= 0.9 and method < _MARGIN * min(wanda, nowag),
        control=("a plain low rank of the same bytes on the mask", control),
        notes=(
            f"NoWag {nowag:.4f}; ARMOR ahead of both in {helped:.0%} of the maps, its own proxy lower in "
            f"{'all' if every else 'not all'}: {proxies.mean(0)[0]:.4f} against {proxies.mean(0)[1]:.4f} (NoWag) and "
            f"{proxies.mean(0)[2]:.4f} (Wanda); it stores {more:.1%} more bytes than a 2:4 matrix"
        ),
    )


@claim(row=110, pace="slow", headline=_HEADLINE)
def block_diagonals_beat_sparsegpt(assets: Assets) -> Outcome:
    """The same layers, against SparseGPT's update of all that is kept."""
    _, errors, more = _figures(assets)
    method, _, wanda, sparsegpt, _ = errors.mean(0).tolist()
    ahead = float((errors[:, 0] < errors[:, 3]).float().mean())
    return Outcome(
        method=method,
        baseline=sparsegpt,
        unit="relative error of a map's outputs at 2:4, held-out text, mean over maps",
        holds=ahead >= 0.5 and method < sparsegpt,
        control=("Wanda", wanda),
        notes=f"ahead of SparseGPT in {ahead:.0%} of the maps, with {more:.1%} more bytes",
    )
