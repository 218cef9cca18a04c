"""Row 230, runtime dissection: every part of a training step is timed and weighed, one technique at a time."""

from __future__ import annotations

import torch

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.measure import dissect

_COVERED = 0.9  # of the step, by modules and the optimizer
_SAME = 0.01
_KEPT = 0.5


@claim(
    row=230,
    pace="slow",
    headline="shares by module and technique for 7B to 70B on 8 GPUs (tables); none in the abstract",
)
def recomputing_trades_activations_for_a_second_forward(assets: Assets) -> Outcome:
    model = assets.smollm2().model
    ids = assets.smollm2().windows(part="calibration", length=64, count=2)
    plain, again, pieces = (
        dissect.training(model, ids, technique=technique, repeats=3)
        for technique in ("plain", "recompute", "accumulate")
    )
    modules = plain.total_seconds - sum(took for (_, part), took in plain.seconds.items() if part.startswith("outside"))
    covered = modules / max(plain.plain_seconds, plain.total_seconds)  # what watching adds is no part of them
    foreseen = dissect.predicted_memory(model.module)
    held = plain.memory.weights + plain.memory.gradients + plain.memory.optimizer
    numbers = sum(weight.numel() for weight in model.module.parameters())
    twice = again.phase("recompute") / (again.phase("forward") + again.phase("backward"))
    return Outcome(
        method=again.memory.activations / 1e6, baseline=plain.memory.activations / 1e6,
        unit="MB held between forward and backward",
        holds=again.memory.activations < _KEPT * plain.memory.activations
        and covered >= _COVERED
        and abs(held / foreseen.peak - 1) <= _SAME
        and abs(held / (16 * numbers) - 1) <= _SAME
        and 0.15 <= twice <= 0.5,
        control=("one sequence after the other instead", pieces.memory.activations / 1e6),
        notes=f"SmolLM2-135M, AdamW, 2 x 64 tokens on {torch.get_num_threads()} threads. Modules and optimizer cover "
        f"{100 * covered:.0f} % of the step, watching adds {100 * plain.overhead:.0f} %; weights, gradients "
        f"and states take {held / numbers:.3f} bytes a parameter (16 by the formula); recomputing takes "
        f"{100 * twice:.0f} % of forward and backward. Seconds of a step: plain {plain.plain_seconds:.2f}, recomputed "
        f"{again.plain_seconds:.2f}, one by one {pieces.plain_seconds:.2f}.",
    )  # fmt: skip
