"""Row 124, AQT: at equal cost a larger network of 4 or 8 bits beats a smaller one of 16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from pennyweight.claims import Outcome, claim, tiny, vision
from pennyweight.claims.assets import Assets
from pennyweight.measure import stats
from pennyweight.measure.bit_macs import bit_macs
from pennyweight.model import anatomy
from pennyweight.plan.sizes import Trial, best_within, envelope
from pennyweight.train.aqt import AQT
from pennyweight.zoo.resnet import ResNet, ResNetConfig

_SEEDS = (0, 1, 2)
_SIZES = ((8, 2), (8, 4), (8, 8), (8, 16), (14, 8))  # (depth, width of the first stage)
_BITS = (16, 8, 4, 2)
_STEPS = 200
_HEADLINE = (
    "ResNet-50 at 4 bits, first and last layer at 8, 77.09 % top-1; the bfloat16 curve is dominated by those of 4 "
    "and 8 bits (abstract)"
)


@dataclass(frozen=True)
class _Run:
    trial: Trial
    losses: Tensor  # (597,) nats of held-out digits, mean over seeds
    gap: float  # held-out minus training loss, nats


@torch.no_grad()
def _losses(module: ResNet, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(vision.logits_of(module, images), labels, reduction="none")


def _trained(depth: int, width: int, bits: int, edge_bits: int | None = 8) -> _Run:
    """Trained from nothing through the rounding, weights and inputs at ``bits``; means over seeds."""
    held, gaps, cost = [], [], 0.0
    images, labels, fresh, wanted = vision.digits()
    for seed in _SEEDS:
        module = ResNet(ResNetConfig(depth=depth, width=width), generator=torch.Generator().manual_seed(seed))
        maps = anatomy.of(module).layers()
        aqt = AQT(module, maps, bits=bits, activation_bits=bits, edge_bits=edge_bits, start=_STEPS // 10)
        vision.train(module, steps=_STEPS, seed=seed, callbacks=[aqt])
        aqt.finish()
        module.eval()
        held.append(_losses(module, fresh, wanted))
        gaps.append(float(held[-1].mean() - _losses(module, images, labels).mean()))
        cost = bit_macs(module, inputs=fresh[:1]).total
    losses = torch.stack(held).mean(0)
    trial = Trial(
        f"depth {depth}, width {width}, {bits} bits", cost, float(losses.mean()),
        {"depth": depth, "width": width, "bits": bits},
    )  # fmt: skip
    return _Run(trial, losses, sum(gaps) / len(gaps))


@claim(row=124, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def few_bits_and_more_channels_beat_sixteen_bits_at_equal_cost(assets: Assets) -> Outcome:
    """ResNets of five sizes at 16, 8, 4 and 2 bits, three seeds each; judged at the costs of the 16-bit ones."""
    runs = {(d, w, b): _trained(d, w, b) for d, w in _SIZES for b in _BITS}
    by_name = {run.trial.name: run for run in runs.values()}
    wide = [run.trial for (_, _, b), run in runs.items() if b == 16]
    narrow = [run.trial for (_, _, b), run in runs.items() if b in (8, 4)]
    lines, won = [], 0
    best: list[tuple[_Run, _Run]] = []
    for level in envelope(wide):  # where 16 bits are at their best
        rival = best_within(narrow, level.cost)
        here, there = by_name[rival.name], by_name[level.name]
        gain = stats.paired_difference(there.losses, here.losses)
        won += gain.high < 0
        best.append((here, there))
        lines.append(f"{level.cost:.3g}: {rival.name} {rival.harm:.4f}, {level.name} {level.harm:.4f}")
    middle = best[len(best) // 2]
    gaps = ", ".join(
        f"{bits} bits {sum(run.gap for (_, _, b), run in runs.items() if b == bits) / len(_SIZES):.4f}"
        for bits in _BITS
    )
    everywhere = envelope([run.trial for run in runs.values()])
    return Outcome(
        method=middle[0].trial.harm,
        baseline=middle[1].trial.harm,
        unit=f"nats on held-out digits at {middle[1].trial.cost:.3g} bit-MACs (quadratic)",
        holds=won >= 3 and all(here.trial.harm <= there.trial.harm for here, there in best),
        control=(
            f"{middle[1].trial.settings['width']} channels as there, but 4 bits, at a sixteenth of the cost",
            runs[middle[1].trial.settings["depth"], middle[1].trial.settings["width"], 4].trial.harm,
        ),
        notes=(
            f"lower with a 95 % interval at {won} of {len(best)} costs; "
            + "; ".join(lines)
            + f"; gap to training, nats: "
            f"{gaps}; envelope: " + ", ".join(one.name for one in everywhere)
        ),
    )


@cache
def _edges() -> tuple[dict[tuple[int, int | None], Tensor], dict[tuple[int, int | None], float]]:
    """Held-out losses and costs of ResNet-8 by bits and bits of its edges, means of two widths and three seeds.

    (2, 0) are wider nets of 2 bits everywhere that cost at least what 8 bits in the edges do.
    """
    found = {
        (bits, edge): [_trained(8, width, bits, edge_bits=edge) for width in (4, 8)]
        for bits, edge in ((2, 8), (2, None), (4, 8), (4, None))
    }
    found[2, 0] = [_trained(8, width, 2, edge_bits=None) for width in (5, 10)]  # the wider nets
    losses = {key: torch.stack([run.losses for run in runs]).mean(0) for key, runs in found.items()}
    return losses, {key: sum(run.trial.cost for run in runs) for key, runs in found.items()}


@claim(row=124, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def eight_bits_in_the_first_and_last_layer_pay_at_four_bits(assets: Assets) -> Outcome:
    """ResNet-8 at 4 bits, two widths, three seeds: edges at 8 bits and at 4."""
    losses, costs = _edges()
    method, baseline = losses[4, 8], losses[4, None]
    gain = stats.paired_difference(baseline, method)
    return Outcome(
        method=float(method.mean()),
        baseline=float(baseline.mean()),
        unit="nats on held-out digits, 4-bit ResNet-8 of two widths",
        holds=gain.high < 0,
        control=(f"2 bits, edges at 8, {costs[2, 8] / costs[4, None]:.2f} times the cost", float(losses[2, 8].mean())),
        interval=(float(baseline.mean()) + gain.low, float(baseline.mean()) + gain.high),
        notes="digits have 17 levels of gray, which 4 bits all but hold",
    )


@claim(row=124, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def eight_bits_in_the_first_and_last_layer_pay_at_two_bits(assets: Assets) -> Outcome:
    """The same at 2 bits; control: the cost of the edges spent on a quarter more channels."""
    losses, costs = _edges()
    method, baseline = losses[2, 8], losses[2, None]
    gain, over_wide = (stats.paired_difference(rival, method) for rival in (baseline, losses[2, 0]))
    assert costs[2, 0] >= costs[2, 8], "the wider nets cost less than the edges"
    return Outcome(
        method=float(method.mean()),
        baseline=float(baseline.mean()),
        unit="nats on held-out digits, 2-bit ResNet-8 of two widths",
        holds=gain.high < -0.02 and over_wide.high < 0,
        control=(
            f"2 bits everywhere and a quarter more channels, at {costs[2, 0] / costs[2, 8]:.2f} times the cost",
            float(losses[2, 0].mean()),
        ),
        interval=(float(baseline.mean()) + gain.low, float(baseline.mean()) + gain.high),
        notes=f"the edges cost {100 * (costs[2, 8] / costs[2, None] - 1):.3g} % more bit-MACs; against the control "
        f"[{over_wide.low:+.3f}, {over_wide.high:+.3f}]; 4 bits everywhere at {costs[4, None] / costs[2, 8]:.2f} times "
        f"the cost, {float(losses[4, None].mean()):.4f}",
    )
