"""Row 203, wildfire on drones: 8-bit integers keep the accuracy of a fire detector, and floors are held or refused."""

from __future__ import annotations

from functools import lru_cache

import torch

from pennyweight import edge
from pennyweight.claims import Outcome, claim, fire, tiny
from pennyweight.claims.assets import Assets
from pennyweight.errors import BudgetError
from pennyweight.model.fold_norms import fold_norms
from pennyweight.zoo.fire import FireNet

_HEADLINE = "13 % more classification speed than unoptimized models; within 1.225 % of the original (abstract)"
_WIDTH = 16


@lru_cache(maxsize=1)
def _trained() -> FireNet:
    return fire.trained(width=_WIDTH)


def _shown(one: edge.Measured) -> str:
    return (
        f"{one.format} ({one.backend}) {one.accuracy:.4f}, fire {one.recall['fire']:.4f}, {one.p50_ms:.2f} ms, "
        f"p95 {one.p95_ms:.2f} ms ({one.fps:.0f} frames a second), "
        f"ratio {one.ratio.value:.2f} ({one.ratio.low:.2f} to {one.ratio.high:.2f}), {one.bytes:,} bytes"
    )


@claim(row=203, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def integers_keep_the_accuracy_of_a_fire_detector(assets: Assets) -> Outcome:
    """A class and a mask from 32x32 patches; four formats judged on 1,000 fresh ones and timed in turns."""
    module = _trained()
    images, labels, masks = fire.patches(1000, seed=101)
    found = edge.fit(
        module, fire.patches(512, seed=0), (images, labels), classes=fire.CLASSES, loss=fire.loss,
        budget="fps>=15", floors=["recall[fire]>=0.8"], steps=60,
    )  # fmt: skip
    by_format = {one.format: one for one in found.tried}
    plain, after, within = (by_format[name] for name in ("fp32", "int8-ptq", "int8-qat"))
    try:
        edge.fit(
            module, fire.patches(64, seed=0), (images, labels), classes=fire.CLASSES, formats=("fp32",),
            floors=["recall[fire]>=0.9999"], repeats=2,
        )  # fmt: skip
        refused = False
    except BudgetError:
        refused = True
    folded = fire.trained(64, width=4, steps=10)
    with torch.no_grad():
        before = folded(images[:32])
        fold_norms(folded, images[:4])
        gap = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, folded(images[:32]), strict=True))
        overlap = [fire.overlap(masks, one(images)[1]) for one in (module, found.module)]
    return Outcome(
        method=max(after.accuracy, within.accuracy),
        baseline=plain.accuracy,
        unit="accuracy on fresh synthetic patches, 8-bit integers against float32",
        lower_is_better=False,
        holds=after.accuracy >= plain.accuracy - 0.015
        and within.accuracy >= after.accuracy - 0.005
        and gap < 1e-5
        and refused
        and after.bytes < 0.6 * plain.bytes,
        control=("bfloat16 (AMP)", by_format["bf16"].accuracy),
        notes=(
            "; ".join(_shown(one) for one in found.tried)
            + f"; chosen {found.chosen.format}; overlap of masks {overlap[1]:.3f}, of the original {overlap[0]:.3f}; "
            f"folding changes outputs by {gap:.1g} of their largest; a floor of 0.9999 "
            f"{'is refused' if refused else 'PASSES'}"
        ),
    )
