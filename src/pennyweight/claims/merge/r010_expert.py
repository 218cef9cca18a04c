"""Row 10, Expert Merging: learned coefficients of chunks beat the best single scale; those of whole tensors do not."""

from __future__ import annotations

from functools import cache
from statistics import fmean

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.encoders import studied
from pennyweight.claims.experts import TASKS, experts, losses, parameters, windows
from pennyweight.claims.tiny import one_thread
from pennyweight.merge.engine import merge_tensors
from pennyweight.merge.expert import importance_chunks, merge_experts
from pennyweight.merge.linear import TaskArithmetic
from pennyweight.merge.ties import Ties

_HEADLINE = "InternVL2.5: task arithmetic 56.17, Expert Merging 58.11, ++ 58.45"


@cache
def _merged() -> tuple[float, float, float, float, str]:
    """Kept by a coefficient a tensor, by chunks, by the best single scale, by TIES; and how many chunks there are."""
    with one_thread():
        known = experts()
        base, models = parameters(known.base), [parameters(one) for one in known.models]
        before = losses(base, TASKS)
        after = [losses(model, [task])[0] for model, task in zip(models, TASKS, strict=True)]
        samples = [windows(task, "calibration", 4096)[:64] for task in TASKS]

        def kept(tensors: object) -> float:
            found = losses(tensors, TASKS)  # type: ignore[arg-type]
            return fmean((b - f) / (b - a) for b, f, a in zip(before, found, after, strict=True))

        options = {"initial": 0.3, "rate": 0.1, "epochs": 10, "batch": 8}
        first = merge_experts(known.base, known.models, samples, **options)  # type: ignore[arg-type]
        chunks = importance_chunks(known.base, known.models, first, budget=3 * len(base))
        plus = merge_experts(known.base, known.models, samples, chunks=chunks, **options)  # type: ignore[arg-type]
        scales = (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)
        single = max(kept(merge_tensors(TaskArithmetic(scale=s), models, base)) for s in scales)
        trimmed = max(kept(merge_tensors(Ties(density=0.2, scale=s), models, base)) for s in (0.5, 1.0, 1.5))
        shares = kept(first.tensors), kept(plus.tensors), single, trimmed
    return *shares, f"{sum(chunks.values())} chunks in {len(base)} tensors"


@claim(row=10, pace="slow", headline=_HEADLINE)
def learned_coefficients_beat_the_best_single_scale(assets: Assets) -> Outcome:
    """Four byte-level experts, one coefficient a tensor, 2 kB of text of each; the rival reads the judging text."""
    method, second, single, trimmed, _ = _merged()
    return Outcome(
        method=method,
        baseline=single,
        unit="share of four experts' gains that their merge keeps",
        lower_is_better=False,
        holds=method > single and method > trimmed,
        control=("TIES, best of three scales", trimmed),
        notes=f"learned chunks: {second:.3f}",
    )


@claim(row=10, pace="slow", headline=_HEADLINE)
def learned_chunks_beat_the_best_single_scale(assets: Assets) -> Outcome:
    """The same with up to three coefficients a tensor, where the first round says that they matter."""
    method, second, single, trimmed, chunks = _merged()
    return Outcome(
        method=second,
        baseline=single,
        unit="share of four experts' gains that their merge keeps",
        lower_is_better=False,
        holds=second > single + 0.01 and second > method + 0.01 and second > trimmed,
        control=("one coefficient a tensor, learned alike", method),
        notes=f"{chunks}; TIES, best of three scales: {trimmed:.3f}",
    )


@claim(row=10, pace="slow", headline=_HEADLINE)
def learned_coefficients_merge_encoders_better_than_one_scale(assets: Assets) -> Outcome:
    """Four copies of MiniLM, tuned on moods, reviews, code and articles; 8 pieces of each, none of them labelled."""
    found = studied()
    kept = {name: found.of(name, 4).held_in for name in ("expert merging", "task arithmetic", "ties")}
    return Outcome(
        method=kept["expert merging"],
        baseline=kept["task arithmetic"],
        unit="share of four encoders' gains that their merge keeps",
        lower_is_better=False,
        holds=kept["expert merging"] > max(kept["task arithmetic"], kept["ties"]),
        control=("TIES, better of two scales", kept["ties"]),
        notes=f"in chunks: {found.of('expert merging ++', 4).held_in:.3f}; the single scale is the better of two, too, "
        "by what is judged",
    )
