"""Row 232, STABLE-RPS: scaled gradients make training blind to the size of the store; sharing against a small model."""

from __future__ import annotations

import torch
from torch import nn

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import gpt, held_out_losses, one_thread, text, trainer
from pennyweight.levers.factorize.roast import scaling, share
from pennyweight.model import anatomy
from pennyweight.train import Samples, Trainer
from pennyweight.train.schedules import cosine
from pennyweight.weights import Hashed, LowRank

_HEADLINE = "sharing beats or matches pruning and small models from 1x to 100x; training does not diverge (abstract)"
_STEPS, _BATCH = 120, 16


def _shared(width: int, density: float, size: float | None = None) -> tuple[nn.Module, list[Hashed]]:
    module = gpt(width=width)
    paths = [one.path for one in anatomy.of(module).layers() if one.block is not None and one.kind != "embedding"]
    return module, share(module, paths, density=density, start="random", size=size)


def _descended(size: float, scaled: bool) -> float:
    """Nats a byte after plain descent."""
    module, held = _shared(32, 0.125, size)
    gamma = scaling(held) if scaled else None
    if gamma is not None:
        held[0].values.register_hook(lambda gradient: gradient * gamma)  # type: ignore[no-untyped-call]
    Trainer(
        module, torch.optim.SGD(module.parameters(), lr=0.5), Samples(text()[0], seed=0), batch=_BATCH, clip=None
    ).run(60)
    return float(held_out_losses(module).mean())


@claim(row=232, pace="quick", headline=_HEADLINE)
def scaled_gradients_make_the_size_of_the_store_irrelevant(assets: Assets) -> Outcome:
    """A GPT of bytes, 8 weights a value, 60 steps of plain descent; values laid out as 1/128, 1/32 and 1/8."""
    with one_thread():
        sizes = (1 / 128, 1 / 32, 1 / 8)
        scaled, plain = ([_descended(size, on) for size in sizes] for on in (True, False))
    spread, baseline = (max(found) - min(found) for found in (scaled, plain))
    return Outcome(
        method=spread,
        baseline=baseline,
        unit="nats a byte between the best and the worst size of the store, held out",
        holds=spread < 0.1 * baseline and max(scaled) < min(plain) + 0.5 * baseline,
        control=("best loss without scaling, sizes tried in turn", min(plain)),
        notes=f"losses, scaled: {', '.join(f'{x:.4g}' for x in scaled)}; not: {', '.join(f'{x:.4g}' for x in plain)}",
    )


def _fitted(module: nn.Module) -> float:
    """Nats a byte after 120 steps of AdamW."""
    trainer(module, cosine(_STEPS, 10, peak=5e-3), batch=_BATCH).run(_STEPS)
    return float(held_out_losses(module).mean())


def _count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())  # a store that layers share counts once


@claim(row=232, pace="quick", headline=_HEADLINE)
def sharing_trains_better_than_a_narrow_model_of_equal_parameters(assets: Assets) -> Outcome:
    """A GPT of bytes, 64 wide, 8 weights a value; baseline: one as deep, 28 wide; control: low rank from scratch."""
    with one_thread():
        shared, _ = _shared(64, 0.125)
        narrow, low = gpt(width=28), gpt(width=64)
        for one in anatomy.of(low).layers():
            if one.block is not None and one.kind != "embedding":
                matrix = anatomy.matrix(low, one)
                rank = round(0.125 * matrix.numel() / sum(matrix.shape) + 0.49)
                anatomy.replace(low, one.path, LowRank.nearest(matrix, rank))
        assert _count(shared) <= min(_count(narrow), _count(low))
        method, baseline, control = (_fitted(module) for module in (shared, narrow, low))
        whole = _fitted(gpt(width=64))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="nats a byte after 120 steps, held out",
        holds=method < baseline - 0.05,
        control=("low rank of no fewer parameters, 64 wide", control),
        notes=f"whole: {whole:.4g} with {_count(gpt(width=64)) / _count(shared):.3g} times the parameters; "
        "sharing saves memory alone, the narrow model multiplications too",
    )
