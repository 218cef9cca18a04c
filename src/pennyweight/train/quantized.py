"""Quantization-aware training: a phase in full precision, then one with rounded weights, split by the law of row 55.

Row 55. Source: A. Dremov et al., "Compute-Optimal Quantization-Aware Training", arXiv:2509.22935: the share of tokens
for the second phase from tokens a parameter byte (`laws.qat_fraction`), and the fused cooldown, where full precision
ends at its peak rate and the rate only decays while weights are rounded. Differs from the source: weights are rounded
to a symmetric grid a row, gradients passing straight through, with moments of the optimizer kept at the switch.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from pennyweight.elementwise import numbers
from pennyweight.errors import ModelError, OptionError
from pennyweight.laws.qat import qat_fraction
from pennyweight.train.loop import Loss, Trainer
from pennyweight.train.samples import Stream
from pennyweight.train.schedules import Schedule, constant, wsd


class Rounded(nn.Module):
    """A weight (M, N) on a symmetric grid of ``bits`` a row; gradients pass as if it were not rounded.

    The step of each row is the largest entry over the largest level from 4 bits on; below, where that would round most
    of a row to zero, 2 mean|w| over the root of the largest level. 1 bit is the sign times the mean.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, of the same shape."""
        with torch.no_grad():
            rounded = self.round(weight)
        return weight + (rounded - weight).detach()

    def round(self, weight: Tensor) -> Tensor:
        """The nearest point of the grid."""
        mean = weight.abs().mean(1, keepdim=True)
        if self.bits == 1:
            return torch.where(weight >= 0, mean, -mean)
        top = 2 ** (self.bits - 1) - 1
        largest = weight.abs().amax(1, keepdim=True) / top
        step = largest if self.bits >= 4 else torch.minimum(2 * mean / top**0.5, largest)
        step = step.clamp(min=torch.finfo(weight.dtype).tiny)
        return (weight / step).round().clamp(-top, top) * step


class QATRun(NamedTuple):
    """What a run did.

    Attributes:
        fraction: share of the steps with rounded weights.
        fp_steps: steps before, in full precision.
        qat_steps: steps with rounded weights.
        params: quantized parameters.
        losses: of every step.
    """

    fraction: float
    fp_steps: int
    qat_steps: int
    params: int
    losses: list[float]


def qat(
    module: nn.Module,
    stream: Stream,
    *,
    steps: int,
    batch: int,
    bits: int,
    peak: float,
    phases: Literal["auto"] | float = "auto",
    fuse_cooldown: bool = True,
    warmup: int = 0,
    decay_frac: float = 0.1,
    layers: Callable[[str, nn.Linear], bool] | None = None,
    optimizer: Optimizer | None = None,
    loss: Loss | None = None,
    clip: float | None = 1.0,
) -> QATRun:
    """Train ``module`` in place; its quantized layers end with rounded weights.

    Args:
        module: to train.
        stream: of samples.
        steps: of both phases together.
        batch: samples a step.
        bits: of a quantized weight, 1 to 8.
        peak: the rate.
        phases: share of the steps with rounded weights, 0 to 1; "auto" asks `laws.qat_fraction`.
        fuse_cooldown: decay the rate only while weights are rounded, with no second warm-up. False is the classic
            recipe: full precision with its own decay, then a second warm-up and decay.
        warmup: steps of a linear rise.
        decay_frac: share of all steps that decays.
        layers: which linear layers are quantized, by name; None for all but a head tied to the embedding.
        optimizer: of the parameters; None for AdamW without decay.
        loss: see `Trainer`.
        clip: largest norm of the gradient.

    Raises:
        OptionError: options out of range.
        ModelError: no layer is meant.
    """
    if phases != "auto":
        numbers("qat", phases=phases)
    if batch < 1:
        raise OptionError(f"qat: batch = {batch}; give at least 1 sample a step")
    if not 1 <= bits <= 8 or int(bits) != bits or steps < 2 or not (phases == "auto" or 0 <= float(phases) <= 1):
        raise OptionError(
            f"qat: bits = {bits}, steps = {steps}, phases = {phases!r}; give 1-8, 2 or more, 'auto' or 0-1"
        )
    tied = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    chosen = [
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and (layers(name, m) if layers else id(m.weight) not in tied)
    ]
    if not chosen:
        raise ModelError("qat: no linear layer is meant; give layers=..., or a model that has some")
    params = sum(m.weight.numel() for _, m in chosen)
    window = stream.take(0, 1)[0]
    tokens = steps * batch * max(1, window[0].numel() - (1 if not window.is_floating_point() else 0))
    share = qat_fraction(params, tokens, bits) if phases == "auto" else float(phases)
    late = min(steps, max(1, round(share * steps))) if share > 0 else 0
    early = steps - late
    decay = max(1, round(decay_frac * steps))
    if optimizer is None:
        optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    trainer = Trainer(
        module, optimizer, stream, batch=batch, clip=clip, loss=loss,
        schedule=_schedule(steps, early, late, decay, warmup, peak, fuse_cooldown),
    )  # fmt: skip
    losses = trainer.run(early)
    if late:
        for _, layer in chosen:
            parametrize.register_parametrization(layer, "weight", Rounded(bits), unsafe=True)
        losses += trainer.run(steps)
    for _, layer in chosen:
        if late:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        else:  # nothing was trained rounded: round at the end, so that the result has the promised width
            with torch.no_grad():
                layer.weight.copy_(Rounded(bits).round(layer.weight))
    return QATRun(late / steps, early, late, params, losses)


def _schedule(steps: int, early: int, late: int, decay: int, warmup: int, peak: float, fused: bool) -> Schedule:
    if fused or not late or not early:
        return constant(warmup, peak=peak).decayed(steps - decay, decay, "linear")
    first = wsd(early, min(warmup, early // 2), min(0.5, decay / early), "linear", peak=peak)
    second = wsd(late, min(warmup, late // 4), min(0.5, decay / late), "linear", peak=peak)
    return Schedule(
        f"{first.name}, then {second.name}",
        "steps",
        steps,
        lambda done: first(done) if done <= early else second(done - early),
    )
