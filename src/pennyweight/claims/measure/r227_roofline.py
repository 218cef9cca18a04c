"""Row 227, the roofline of every operation: with this machine tuned, it predicts a model's time to within 30 %."""

from __future__ import annotations

from statistics import median

import torch

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.measure import decoding
from pennyweight.measure.operations import Stage
from pennyweight.measure.roofline import roofline
from pennyweight.measure.tune import Tuning
from pennyweight.model.loading import load

_WITHIN = 1.3
_ROUNDS, _TOKENS = 9, 8
_LENGTHS = (64, 256)
_STAGES: tuple[Stage, ...] = ("prefill", "decode")

Setting = tuple[torch.dtype, int, Stage]
Seconds = dict[Setting, float]


@claim(
    row=227,
    pace="slow",
    headline="operations and bytes of Llama-2-7B on an A6000 (section 2), kept by the tests; no predicted times there",
)
def a_tuned_roofline_predicts_prefill_and_decoding(assets: Assets) -> Outcome:
    models = {dtype: load(assets.smollm2().name, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    tuning = Tuning()
    runs: dict[Setting, list[float]] = {}
    for _ in range(_ROUNDS):  # in turns, so that what else the machine does is in both
        tuning.measure()
        for dtype, model in models.items():
            for length in _LENGTHS:
                run = decoding.greedy(model.module, torch.arange(length), tokens=_TOKENS)
                for stage in _STAGES:
                    runs.setdefault((dtype, length, stage), []).append(getattr(run, stage))
    here = tuning.device()
    measured: Seconds = {}
    predicted: Seconds = {}
    bounds: Seconds = {}
    for (dtype, length, stage), seconds in runs.items():
        context = length + (_TOKENS // 2 if stage == "decode" else 0)
        found = roofline(models[dtype], device=here, stage=stage, context=context)
        assert found.seconds is not None
        key = (dtype, length, stage)
        measured[key], predicted[key], bounds[key] = median(seconds), found.seconds, found.bound_seconds
    once = next(iter(measured))
    scaled = {key: bounds[key] * measured[once] / bounds[once] for key in bounds}
    method, baseline, control = (_worst(guess, measured) for guess in (predicted, bounds, scaled))
    pairs = "; ".join(
        f"{str(dtype)[6:]} {length} {stage} {1e3 * predicted[dtype, length, stage]:.0f} ms for {1e3 * seconds:.0f}"
        for (dtype, length, stage), seconds in measured.items()
    )
    return Outcome(
        method=method, baseline=baseline, unit="worst factor between predicted and measured seconds",
        holds=method <= _WITHIN and all(bounds[key] <= min(runs[key]) for key in runs),
        control=("the bounds, scaled to one measured prefill", control),
        notes=f"SmolLM2-135M on {here.threads} threads, medians of {_ROUNDS} rounds: {pairs}. The baseline is the "
        "bound itself, which is under every single run.",
    )  # fmt: skip


def _worst(guess: Seconds, measured: Seconds) -> float:
    return max(max(guess[key] / measured[key], measured[key] / guess[key]) for key in measured)
