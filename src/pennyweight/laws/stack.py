"""Tiny runs of one shape trained as one: their weights in a stack, so that a step of all costs little more than of one.

A step of a run of `pennyweight.laws.bench` is mostly the calling of operators; runs that differ in rate and seed alone
share those calls. The losses are those of `bench.train` up to rounding.

    best = min(stack.train(bench.grid(lr=(1e-3, 3e-3, 9e-3), seed=(0, 1))), key=lambda record: record.loss)

Imports torch only inside a run. Shape letters: R runs, B windows a step, T bytes of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pennyweight.errors import ModelError, OptionError
from pennyweight.laws import bench
from pennyweight.laws.bench import Record, Run

if TYPE_CHECKING:
    from torch import Tensor

_BETAS, _EPS, _CLIP = (0.9, 0.999), 1e-8, 1.0  # of torch's AdamW, and of `bench`
_RATE = ("cosine", "constant")


def train(runs: Sequence[Run]) -> list[Record]:
    """Records of runs that differ in ``lr`` and ``seed`` only, in order, on one thread.

    Raises:
        OptionError: no runs, runs that differ in more, or a schedule other than cosine and constant.
        ModelError: a loss that is not finite.
        DataError: fewer held-out windows than are asked for.
    """
    import torch

    if not runs:
        raise OptionError("stack: no runs; give one or more")
    first = runs[0]
    if other := [run for run in runs if replace(run, lr=first.lr, seed=first.seed) != first]:
        raise OptionError(f"stack: {other[0]} differs from {first} in more than lr and seed; train them apart")
    if first.schedule not in _RATE:
        raise OptionError(f"stack: schedule = {first.schedule!r}; give cosine or constant, or use bench.sweep")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(runs)
    finally:
        torch.set_num_threads(before)


def _train(runs: Sequence[Run]) -> list[Record]:
    import torch
    from torch import func
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from pennyweight.evaluate.perplexity import token_losses
    from pennyweight.train import Samples, schedules
    from pennyweight.zoo.gpt import GPT, GPTConfig

    run, count = runs[0], len(runs)
    windows, held = bench._text(run)
    config = GPTConfig(width=run.width, depth=run.depth, num_heads=2, vocabulary=256, context=run.length + 1)
    modules = [GPT(config, generator=torch.Generator().manual_seed(one.seed)) for one in runs]
    samples = {one.seed: Samples(windows, seed=one.seed) for one in runs}
    named = [dict(module.named_parameters()) for module in modules]  # the head, tied to the embedding, is named once
    weights = {name: torch.stack([one[name].detach() for one in named]).requires_grad_() for name in named[0]}
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    rates = [
        schedules.cosine(run.steps, run.warmup, peak=one.lr)
        if run.schedule == "cosine"
        else schedules.constant(run.warmup, peak=one.lr)
        for one in runs
    ]

    def loss(own: dict[str, Tensor], ids: Tensor) -> Tensor:  # of one run; ids (B, T)
        logits = func.functional_call(modules[0], own, (ids[:, :-1],), tie_weights=True)
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    losses = func.vmap(loss)
    stops = [round(at * run.steps / run.evaluations) for at in range(1, run.evaluations + 1)]
    curves: list[list[tuple[int, float]]] = [[] for _ in runs]
    trained: list[list[float]] = [[] for _ in runs]
    for step in range(1, run.steps + 1):
        taken = {seed: stream.take((step - 1) * run.batch, run.batch)[0] for seed, stream in samples.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the other kernel is called once a run under vmap
            found = losses(weights, torch.stack([taken[one.seed] for one in runs]))  # (R,)
        if not found.isfinite().all():
            raise ModelError(f"stack: a loss of step {step} is not finite; lower the learning rates")
        slopes = dict(zip(weights, torch.autograd.grad(found.sum(), list(weights.values())), strict=True))
        _adamw(weights, slopes, moments, torch.tensor([rate(step) for rate in rates]), step, run.weight_decay)
        for one, value in zip(trained, found.tolist(), strict=True):
            one.append(value)
        if step in stops:
            for index in range(count):
                _unstack(named[index], weights, index)
                curves[index].append((step, float(token_losses(modules[index], held, batch=128).mean())))
    return [Record(one, tuple(curve), tuple(values)) for one, curve, values in zip(runs, curves, trained, strict=True)]


def _unstack(own: dict[str, Any], weights: dict[str, Tensor], index: int) -> None:
    for name, weight in own.items():
        weight.data.copy_(weights[name].data[index])


def _adamw(
    weights: dict[str, Tensor],
    slopes: dict[str, Tensor],
    moments: dict[str, tuple[Tensor, Tensor]],
    rates: Tensor,  # (R,)
    step: int,
    decay: float,
) -> None:
    """torch's AdamW after its ``clip_grad_norm_``, each run with its own norm and rate."""
    import torch

    norm = torch.stack([slope.flatten(1).norm(dim=1) for slope in slopes.values()]).norm(dim=0)
    kept = (_CLIP / (norm + 1e-6)).clamp(max=1.0)
    first, second = _BETAS
    with torch.no_grad():
        for name, weight in weights.items():
            shape = (-1, *(1,) * (weight.ndim - 1))
            slope, rate = slopes[name] * kept.view(shape), rates.view(shape)
            mean, square = moments[name]
            mean.lerp_(slope, 1 - first)
            square.mul_(second).addcmul_(slope, slope, value=1 - second)
            if decay:
                weight.mul_(1 - rate * decay)
            root = (square / (1 - second**step)).sqrt_().add_(_EPS)
            weight.sub_(rate / (1 - first**step) * mean / root)
