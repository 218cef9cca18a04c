"""Row 10, Expert Merging: learned coefficients of chunks beat the best single scale; those of whole tensors do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.encoders import studied
from pennyweight.claims.experts import TASKS, experts, parameters, windows
from pennyweight.claims.kept import Kept
from pennyweight.claims.tiny import one_thread
from pennyweight.measure import stats
from pennyweight.merge.engine import merge_tensors
from pennyweight.merge.expert import importance_chunks, merge_experts
from pennyweight.merge.formula import Formula
from pennyweight.merge.linear import TaskArithmetic
from pennyweight.merge.ties import Ties

_HEADLINE = "InternVL2.5: task arithmetic 56.17, Expert Merging 58.11, ++ 58.45"


@dataclass(frozen=True)
class _Merged:
    """Shares of gains, by window (see `Kept`), and how many chunks there are."""

    tensors: Tensor
    chunks: Tensor
    single: Tensor
    ties: Tensor
    count: str


@cache
def _merged() -> _Merged:
    """By a coefficient a tensor, by chunks, by the best single scale and by TIES."""
    with one_thread():
        known = experts()
        base, models = parameters(known.base), [parameters(one) for one in known.models]
        samples = [windows(task, "calibration", 4096)[:64] for task in TASKS]
        kept = Kept(known)

        def best(rivals: Iterable[Formula]) -> Tensor:
            return max(
                (kept(merge_tensors(one, models, base)) for one in rivals), key=lambda found: float(found.mean())
            )

        options = {"initial": 0.3, "rate": 0.1, "epochs": 10, "batch": 8}
        first = merge_experts(known.base, known.models, samples, **options)  # type: ignore[arg-type]
        chunks = importance_chunks(known.base, known.models, first, budget=3 * len(base))
        plus = merge_experts(known.base, known.models, samples, chunks=chunks, **options)  # type: ignore[arg-type]
        return _Merged(
            kept(first.tensors),
            kept(plus.tensors),
            best(TaskArithmetic(scale=s) for s in (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)),
            best(Ties(density=0.2, scale=s) for s in (0.5, 1.0, 1.5)),
            f"{sum(chunks.values())} chunks in {len(base)} tensors",
        )


@claim(row=10, pace="slow", headline=_HEADLINE)
def learned_coefficients_beat_the_best_single_scale(assets: Assets) -> Outcome:
    """Four byte-level experts, one coefficient a tensor, 2 kB of text of each; the rival reads the judging text."""
    found = _merged()
    gain, over_ties = (stats.paired_difference(rival, found.tensors) for rival in (found.single, found.ties))
    single = float(found.single.mean())
    return Outcome(
        method=float(found.tensors.mean()),
        baseline=single,
        unit="share of four experts' gains that their merge keeps",
        lower_is_better=False,
        holds=gain.low > 0 and over_ties.low > 0,
        control=("TIES, best of three scales", float(found.ties.mean())),
        interval=(single + gain.low, single + gain.high),
        notes=f"learned chunks: {float(found.chunks.mean()):.3f}; over TIES by [{over_ties.low:+.3f}, "
        f"{over_ties.high:+.3f}]; intervals are of differences",
    )


@claim(row=10, pace="slow", headline=_HEADLINE)
def learned_chunks_beat_the_best_single_scale(assets: Assets) -> Outcome:
    """The same with up to three coefficients a tensor, where the first round says that they matter."""
    found = _merged()
    gain, over_tensors, over_ties = (
        stats.paired_difference(rival, found.chunks) for rival in (found.single, found.tensors, found.ties)
    )
    single = float(found.single.mean())
    return Outcome(
        method=float(found.chunks.mean()),
        baseline=single,
        unit="share of four experts' gains that their merge keeps",
        lower_is_better=False,
        holds=min(gain.value, over_tensors.value) > 0.01 and min(gain.low, over_tensors.low, over_ties.low) > 0,
        control=("one coefficient a tensor, learned alike", float(found.tensors.mean())),
        interval=(single + gain.low, single + gain.high),
        notes=f"{found.count}; TIES, best of three scales: {float(found.ties.mean()):.3f}; over the control by "
        f"[{over_tensors.low:+.3f}, {over_tensors.high:+.3f}]; intervals are of differences",
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
