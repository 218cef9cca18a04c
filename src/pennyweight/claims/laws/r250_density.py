"""Row 250, densing law: more training raises a model's density, pruning lowers it, and 8 bits raise it a byte."""

from __future__ import annotations

import torch
from torch import nn

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.laws import density
from pennyweight.train.schedules import cosine
from pennyweight.weights import Dense, Quantized

_WIDTHS, _LENGTHS, _BATCH = (16, 24, 32, 48), (150, 300, 600), 16


def _size(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in _layers(module))


def _layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]


def _trained(width: int, steps: int) -> nn.Module:
    module = tiny.gpt(width=width)
    tiny.trainer(module, cosine(steps, 20, peak=4e-3), batch=_BATCH).run(steps)
    return module


def _loss(module: nn.Module) -> float:
    return float(tiny.held_out_losses(module).mean())


def _eight(layer: nn.Linear) -> Quantized:
    """Its weights in 8 bits, a scale and a zero a row."""
    return Quantized.nearest(layer.weight.detach(), bits=8, group_size=layer.weight.shape[1])


@torch.no_grad()
def _changed(module: nn.Module, how: str) -> float:
    """The loss with half of the weights zero, or with all of them in 8 bits; the module is put back as it was."""
    kept = [layer.weight.clone() for layer in _layers(module)]
    for layer in _layers(module):
        if how == "pruned":
            limit = layer.weight.abs().flatten().kthvalue(layer.weight.numel() // 2).values
            layer.weight.mul_(layer.weight.abs() > limit)
        else:
            layer.weight.copy_(_eight(layer).dense())
    loss = _loss(module)
    for layer, weight in zip(_layers(module), kept, strict=True):
        layer.weight.copy_(weight)
    return loss


@claim(row=250, pace="slow", headline="capacity density of open models doubles every three months or so (abstract)")
@tiny.one_thread()
def density_follows_training_and_pruning(assets: Assets) -> Outcome:
    """A family of byte GPTs; density of one of them at the reference length, trained longer, pruned, and in 8 bits."""
    runs = []
    for width in _WIDTHS:
        for steps in _LENGTHS:
            module = _trained(width, steps)
            runs.append({"N": _size(module), "D": steps * _BATCH * 32, "loss": _loss(module)})
            if (width, steps) == (32, 600):
                model, source = module, runs[-1]
    family = density.reference(runs, D0=600 * _BATCH * 32)
    params = source["N"]
    rho = family.density(params=params, loss=source["loss"])
    longer = family.density(params=params, loss=_loss(_trained(32, 1500)))
    pruned = family.density(params=params, loss=_changed(model, "pruned"))
    loss = _changed(model, "int8")
    eight = family.density(params=params, loss=loss)
    whole, small = (
        sum(weight.cost().bytes for weight in weights)
        for weights in ([Dense(layer.weight.detach()) for layer in _layers(model)], map(_eight, _layers(model)))
    )
    gain = family.per_byte(small, loss=loss) / family.per_byte(whole, loss=source["loss"])
    return Outcome(
        method=float(longer / rho),
        baseline=float(pruned / rho),
        unit="density over that of the source model",
        lower_is_better=False,
        holds=bool(
            longer > 1.05 * rho > 0 and pruned < 0.95 * rho and 0.7 < rho < 1.4 and gain > 3 and eight > 0.95 * rho
        ),
        control=("the same model in 8 bits", float(eight / rho)),
        notes=(
            f"family of {len(runs)} runs, {min(r['N'] for r in runs)} to {max(r['N'] for r in runs)} parameters; "
            f"density of a member {rho:.2f}, trained 2.5 times as long {longer:.2f}, half of it zero {pruned:.2f}; "
            f"{small:,} bytes in 8 bits, {whole:,} in float32: {float(gain):.2f} times the effective parameters a byte"
        ),
    )
