"""Row 96, OTA + FFG: second moments tell which edits matter and how to weigh them; both at once do not add up here."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.encoders import studied
from pennyweight.claims.experts import TASKS, experts, losses, parameters
from pennyweight.claims.kept import Kept
from pennyweight.claims.tiny import one_thread
from pennyweight.measure import stats
from pennyweight.merge.engine import merge_tensors
from pennyweight.merge.linear import Linear
from pennyweight.merge.moments import compressed, read_moments
from pennyweight.merge.ota import OTA, ffg
from pennyweight.merge.ties import Ties

_HEADLINE = "OTA + FFG improves over strong weight-space baselines; FFG is critical, compressed moments keep the gain"


def _kept(found: dict[str, Tensor], task: str, base: float, expert: float) -> float:
    return (base - losses(found, [task])[0]) / (base - expert)


def _grafted(density: float) -> tuple[float, float, float]:
    """What each of four experts keeps of its gain by edits that moments, sizes and compressed moments choose; means."""
    with one_thread():
        known = experts()
        base = parameters(known.base)
        before = losses(base, TASKS)
        rows = []
        for n, task in enumerate(TASKS):
            model, moments = parameters(known.models[n]), known.moments[n]
            after = losses(model, [task])[0]
            rivals = (
                ffg(read_moments(moments), density=density),
                Ties(density=density),
                ffg(read_moments(compressed(moments)), density=density),
            )
            found = [merge_tensors(one, [model], base) for one in rivals]
            size = sum(one.numel() for one in base.values())
            for merged in found:  # keeping every edit would keep every gain
                assert sum(int((merged[name] != base[name]).sum()) for name in base) <= (density + 0.005) * size
            rows.append([_kept(merged, task, before[n], after) for merged in found])
    by_moments, by_size, by_sums = torch.tensor(rows).mean(0).tolist()
    return by_moments, by_size, by_sums


@claim(row=96, pace="slow", headline=_HEADLINE)
def grafts_by_curvature_keep_more_than_the_largest_edits(assets: Assets) -> Outcome:
    """Each of four experts alone: a tenth of its edits on the base, chosen by v * edit^2, or by size."""
    method, baseline, control = _grafted(0.1)
    return Outcome(
        method=method,
        baseline=baseline,
        unit="share of an expert's gain that a tenth of its edits keeps",
        lower_is_better=False,
        holds=method > baseline + 0.01 and method > 0.2,
        control=("second moments as row and column sums", control),
    )


@claim(row=96, pace="slow", headline=_HEADLINE)
def two_fifths_of_the_edits_keep_an_experts_gain(assets: Assets) -> Outcome:
    """The same at the paper's density of 40 %."""
    method, baseline, control = _grafted(0.4)
    return Outcome(
        method=method,
        baseline=baseline,
        unit="share of an expert's gain that 40 % of its edits keep",
        lower_is_better=False,
        holds=method >= 0.95 and method > baseline + 0.01,
        control=("second moments as row and column sums", control),
    )


@cache
def _kept_by_each() -> dict[str, Tensor]:
    """Of four experts merged: the share of their gains by window (see `Kept`), by method."""
    with one_thread():
        known = experts()
        base, models = parameters(known.base), [parameters(one) for one in known.models]
        full = tuple(read_moments(one) for one in known.moments)
        small = tuple(read_moments(compressed(one)) for one in known.moments)
        rivals = {
            "average": Linear(),
            "ties": Ties(density=0.2),
            "ota": OTA(moments=full),
            "ota, rank one": OTA(moments=small),
            "ota + ffg": OTA(moments=full, density=0.4),
            "ota + ffg, rank one": OTA(moments=small, density=0.4),
        }
        kept = Kept(known)
        return {name: kept(merge_tensors(formula, models, base)) for name, formula in rivals.items()}


@claim(row=96, pace="slow", headline=_HEADLINE)
def grafts_before_weighing_keep_more_than_weighing_alone(assets: Assets) -> Outcome:
    """The whole method, FFG at 40 % and then OTA, against OTA of all edits."""
    kept = _kept_by_each()
    gain, baseline = stats.paired_difference(kept["ota"], kept["ota + ffg"]), float(kept["ota"].mean())
    return Outcome(
        method=float(kept["ota + ffg"].mean()),
        baseline=baseline,
        unit="share of four experts' gains that their merge keeps",
        lower_is_better=False,
        holds=gain.low > 0,
        control=("average", float(kept["average"].mean())),
        interval=(baseline + gain.low, baseline + gain.high),
        notes="an element that one expert's mask leaves gets that expert's edit whole; interval: of the difference",
    )


@claim(row=96, pace="slow", headline=_HEADLINE)
def weighing_by_curvature_keeps_more_than_averaging(assets: Assets) -> Outcome:
    """Four experts merged, with whole and compressed moments, no grafts before."""
    kept = _kept_by_each()
    gain, small = (stats.paired_difference(kept["average"], kept[name]) for name in ("ota", "ota, rank one"))
    baseline = float(kept["average"].mean())
    return Outcome(
        method=float(kept["ota"].mean()),
        baseline=baseline,
        unit="share of four experts' gains that their merge keeps",
        lower_is_better=False,
        holds=min(gain.value, small.value) > 0.01 and min(gain.low, small.low) > 0,
        control=("TIES", float(kept["ties"].mean())),
        interval=(baseline + gain.low, baseline + gain.high),
        notes="; ".join(f"{name}: {float(value.mean()):.3f}" for name, value in kept.items())
        + f"; moments of rank one over the average [{small.low:+.3f}, {small.high:+.3f}]; intervals are of differences",
    )


@claim(row=96, pace="slow", headline=_HEADLINE)
def grafted_and_weighed_encoders_keep_more_than_averaged_ones(assets: Assets) -> Outcome:
    """Four copies of MiniLM, tuned on moods, reviews, code and articles: FFG at 40 %, then OTA; control: no FFG."""
    found = studied()
    kept = {name: found.of(name, 4).held_in for name in ("ota + ffg", "average", "ota", "ties", "dare-ties")}
    return Outcome(
        method=kept["ota + ffg"],
        baseline=kept["average"],
        unit="share of four encoders' gains that their merge keeps",
        lower_is_better=False,
        holds=kept["ota + ffg"] > kept["average"] + 0.01,
        control=("OTA of all edits", kept["ota"]),
        notes=f"better of two scales: TIES {kept['ties']:.3f}, DARE-TIES {kept['dare-ties']:.3f}",
    )
