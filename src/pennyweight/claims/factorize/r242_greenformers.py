"""Row 242, Greenformers: factors chosen in one call make an encoder faster; weighting them keeps its embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import one_thread
from pennyweight.levers.factorize.auto import Auto
from pennyweight.levers.factorize.routes import Route, choose, crossing
from pennyweight.measure import latency
from pennyweight.measure.cost import cost
from pennyweight.model.model import Model
from pennyweight.work import Work

_HEADLINE = "BERT-base costs over 30 % less to compute; low-rank layers for sequences up to 512 tokens (abstract)"


def _changed(assets: Assets, lever: Auto, windows: Tensor | None = None) -> Model:
    model = assets.minilm().fresh()
    maps = tuple(one for one in model.anatomy.maps() if one.block is not None)
    lever.change(model, Work(model=model, windows=windows, maps=maps))
    return model


def _states(model: Model, windows: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.module(input_ids=windows).last_hidden_state
    return found


@claim(row=242, pace="quick", headline=_HEADLINE)
def factors_at_half_the_break_even_rank_are_measured_faster(assets: Assets) -> Outcome:
    """MiniLM on 2 windows of 128 tokens, one thread, timed in turns; control: a rank at which factors barely save."""
    windows = assets.minilm().windows("wiki", part="heldout", length=128, count=2)
    with one_thread():
        half = _changed(assets, Auto(rank=0.5, tokens=256, dtype="float32"))
        nearly = _changed(assets, Auto(rank=0.95, tokens=0, dtype="float32"))
        models = (half, nearly, assets.minilm().model)
        rounds = list(
            latency.in_turns([lambda m=m: _states(m, windows) for m in models], repeats=8, warmup=1)  # type: ignore[misc]  # mypy infers no type of a lambda with a default
        )
    method, control, baseline = (1e3 * torch.tensor(rounds).median(0).values).tolist()
    saved = 1 - cost(half).params / cost(models[2]).params
    return Outcome(
        method=method,
        baseline=baseline,
        unit="ms for 256 tokens",
        holds=method < 0.9 * baseline and 0.4 < saved < 0.6,
        control=("95 % of the break-even rank, nothing timed", control),
        notes=f"{100 * saved:.3g} % fewer parameters outside tables",
    )


@claim(row=242, pace="quick", headline=_HEADLINE)
def factors_weighted_by_inputs_keep_embeddings_nearer(assets: Assets) -> Outcome:
    """MiniLM at half the break-even rank, held-out text: weighted by inputs, plain, and semi-nonnegative factors."""
    seen = assets.minilm().windows("wiki", part="calibration", length=128, count=16)
    windows = assets.minilm().windows("wiki", part="heldout", length=128, count=8, seed=1)
    original = _states(assets.minilm().model, windows).mean(1)
    found = []
    for solver in ("weighted", "svd", "snmf"):
        model = _changed(assets, Auto(rank=0.5, solver=solver, tokens=0), seen)
        found.append(float(1 - functional.cosine_similarity(_states(model, windows).mean(1), original).mean()))
    method, baseline, control = found
    return Outcome(
        method=method,
        baseline=baseline,
        unit="1 - cosine of mean-pooled embeddings with the original's, held-out text",
        holds=method < 0.7 * baseline and baseline < control,
        control=("semi-nonnegative factors of the same rank", control),
    )


def _said(route: Route) -> str:
    return ", ".join(f"{way} {time:.3g}" for way, time in route.milliseconds.items()) + " ms"


@claim(row=242, pace="quick", headline=_HEADLINE)
def the_measured_route_changes_with_the_length(assets: Assets) -> Outcome:
    """One layer of MiniLM's sizes, one thread, at 128 and 4,096 tokens; baseline: dense; control: factors."""
    with one_thread():
        short, longest, long = (
            choose(length, width=384, num_heads=12, rank=0.5, keys=128, repeats=repeats)
            for length, repeats in ((128, 5), (512, 5), (4096, 3))
        )
    took = long.milliseconds
    return Outcome(
        method=took["linformer"],
        baseline=took["dense"],
        unit="ms a layer for 4,096 tokens",
        holds=short.best == "low_rank" and long.best == "linformer" and took["linformer"] < 0.8 * took["low_rank"],
        control=("factors at half the break-even rank", took["low_rank"]),
        notes=f"at 128 tokens: {_said(short)}; at 512, the most that MiniLM reads: {_said(longest)}; "
        f"by multiplications alone they cross at {crossing(width=384, rank=0.5, keys=128):.0f} tokens",
    )
