"""Row 42, time-series laws: does an encoder of masked patches scale better than a decoder of the next one?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight import laws
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.claims.laws.r042_time_series import CONTEXT, PATCH, series_of

_PATCHES = (CONTEXT + PATCH) // PATCH
_PARTS, _DEPTH = 4, 2
_WIDTHS, _SEEDS = (4, 8, 16, 32, 64), (0, 1, 2)
_STEPS, _BATCH, _WARMUP, _RATE = 500, 64, 50, 3e-3
#: Moves the unit of a value by ten, so that the likelihood's logarithm is positive: a power law needs that.
_LOG_TEN = 2.302585


class _PatchTransformer(nn.Module):
    """Patches to a mixture of four Student-t distributions of each value: of masked patches, or of the next one."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.into = nn.Linear(PATCH, width)
        self.positions = nn.Parameter(0.02 * torch.randn(_PATCHES, width))
        self.masked = nn.Parameter(0.02 * torch.randn(width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, _DEPTH, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 4 * _PARTS * PATCH)

    def loss(self, series: Tensor, hidden: int) -> Tensor:
        """Negative log likelihood of a value, plus log 10. The encoder is asked for the last ``hidden`` patches (of
        each (B, T) series) at once, the decoder for as many last ones, each from those before it."""
        patches = series.reshape(len(series), _PATCHES, PATCH)
        states = self.into(patches)
        if self.causal:
            seen = states[:, :-1] + self.positions[:-1]
            mask = nn.Transformer.generate_square_subsequent_mask(_PATCHES - 1)
            states = self.blocks(seen, mask=mask, is_causal=True)
        else:
            blank = self.masked.expand(len(series), hidden, -1)
            states = self.blocks(torch.cat([states[:, :-hidden], blank], 1) + self.positions)
        return _LOG_TEN - self._log_likelihood(states[:, -hidden:], patches[:, -hidden:]).mean()

    def _log_likelihood(self, states: Tensor, values: Tensor) -> Tensor:
        found = self.head(states).unflatten(-1, (4, _PARTS, PATCH))
        weight, location, scale, freedom = found.unbind(-3)
        spread = nn.functional.softplus(scale) + 1e-3
        student = torch.distributions.StudentT(2 + nn.functional.softplus(freedom), location, spread)
        each: Tensor = student.log_prob(values[..., None, :])  # type: ignore[no-untyped-call]  # of torch
        mixed: Tensor = (weight.log_softmax(-2) + each).logsumexp(-2)
        return mixed


class _Point(NamedTuple):
    causal: bool
    size: float
    inside: float
    outside: float


def _trained(width: int, seed: int, *, causal: bool) -> _PatchTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _PatchTransformer(width, causal=causal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.1, betas=(0.9, 0.98))
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / _WARMUP, 1.0, _WARMUP)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS - _WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [_WARMUP])
    g = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        # 15 to 50 % of the patches are masked; the decoder is scored on every patch after the first
        hidden = _PATCHES - 1 if causal else int(torch.randint(1, _PATCHES // 2 + 1, (), generator=g))
        optimizer.zero_grad()
        model.loss(series_of(_BATCH, g, outside=False), hidden).backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        schedule.step()
    return model


def _point(width: int, seed: int, *, causal: bool) -> _Point:
    """Losses of the last patch given the others, inside the distribution and outside."""
    model = _trained(width, seed, causal=causal)
    found = []
    for outside in (False, True):
        with torch.no_grad():
            found.append(float(model.loss(series_of(2000, torch.Generator().manual_seed(10**6), outside=outside), 1)))
    return _Point(causal, float(sum(p.numel() for p in model.parameters())), *found)


@claim(
    row=42, pace="slow", headline="encoder-only scales better than decoder-only (abstract; exponents 0.029 and 0.015)"
)
@tiny.one_thread()
def encoders_scale_better_than_decoders(assets: Assets) -> Outcome:
    """Patch Transformers of 1,200 to 110,000 parameters, three seeds: log-log slopes of likelihood against size."""
    encoders, decoders = (
        [_point(width, seed, causal=causal) for width in _WIDTHS for seed in _SEEDS] for causal in (False, True)
    )
    inside = laws.compare_slopes([(p.size, p.inside) for p in encoders], [(p.size, p.inside) for p in decoders])
    outside = laws.compare_slopes([(p.size, p.outside) for p in encoders], [(p.size, p.outside) for p in decoders])
    ends = [
        f"{name} {np.mean([p.inside for p in largest]):.4f}, {np.mean([p.outside for p in largest]):.4f}"
        for name, kind in (("encoder", encoders), ("decoder", decoders))
        for largest in ([p for p in kind if p.size == max(q.size for q in kind)],)
    ]
    return Outcome(
        method=inside.a.slope,
        baseline=inside.b.slope,
        unit="slope of log10 likelihood loss a decade of size, in distribution",
        holds=bool(inside.interval.high < 0 and inside.a.interval.high < 0),
        interval=(inside.a.interval.low, inside.a.interval.high),
        control=("the difference of the two out of distribution", outside.difference),
        notes=(
            f"decoder [{inside.b.interval.low:.4f}, {inside.b.interval.high:.4f}]; encoder less decoder "
            f"{inside.difference:.4f} [{inside.interval.low:.4f}, {inside.interval.high:.4f}]; out of distribution "
            f"{outside.a.slope:.4f} and {outside.b.slope:.4f}, difference [{outside.interval.low:.4f}, "
            f"{outside.interval.high:.4f}]; losses of the largest inside, outside: {'; '.join(ends)}"
        ),
    )
