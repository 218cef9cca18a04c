"""Row 131, ZeroQuant-FP: 4-bit floats match integers, shifts for scales cost little, 8-bit floats bear outliers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pennyweight.calibrate import collect
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import AssetModel, Assets
from pennyweight.evaluate.forward import looking
from pennyweight.levers.quantize.fp import FloatingPoint
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.weights import Activation, Dense

_WEIGHTS = "FP4 weights comparable or better than INT4; constraints cost little; LoRC helps small models (abstract)"
#: Relative error of E4M3 (mantissas of 3 bits, log-uniform) over that of INT8 for a range of one.
_MEETING = (1 / (64 * 12 * 1.5 / math.log(2))) ** 0.5 * 255 * 12**0.5
_ACTIVATIONS = "FP8 activations beat INT8, the more so above 1B parameters (abstract)"


@claim(row=131, pace="quick", headline=_WEIGHTS)
def four_bit_floats_with_shifted_scales_match_integers(assets: Assets) -> Outcome:
    """GPTQ in groups of 256 on every other block of MiniLM: E2M1 under each constraint, and INT4 with zeros."""
    minilm = assets.minilm()
    seen = collect(minilm.model, minilm.windows("wiki", part="calibration", length=128, count=24))
    fresh = collect(minilm.model, minilm.windows("wiki", part="heldout", length=128, count=8, seed=1))
    levers: dict[str, GPTQ | FloatingPoint] = {
        "ratio": FloatingPoint(),
        "integer": GPTQ(bits=4, group_size=256),
        "free": FloatingPoint(scales="free"),
        "power": FloatingPoint(scales="power"),
        "ceil": FloatingPoint(shift="ceil"),
        "lorc": FloatingPoint(rank=8),
    }
    errors: dict[str, list[float]] = {name: [] for name in levers}
    taken: dict[str, int] = dict.fromkeys(levers, 0)
    for one, matrix in zip(minilm.maps("encoder"), minilm.matrices("encoder"), strict=True):
        if one.block is None or one.block % 2:
            continue
        for name, lever in levers.items():
            found = lever.solve(Dense(matrix), seen[one.name])
            errors[name].append(found.error(matrix, fresh[one.name].second_moment))
            taken[name] += found.cost().bytes
    mean = {name: sum(found) / len(found) for name, found in errors.items()}
    within = all(0.8 < f / i < 1.1 for f, i in zip(errors["ratio"], errors["integer"], strict=True))
    ordered = all(f <= r < p for f, r, p in zip(*(errors[n] for n in ("free", "ratio", "power")), strict=True))
    helped = all(given < without for given, without in zip(errors["lorc"], errors["ratio"], strict=True))
    return Outcome(
        method=mean["ratio"],
        baseline=mean["integer"],
        unit="relative error of a map's outputs at 4 bits, groups of 256, held-out text, mean over maps",
        holds=within and ordered and helped and taken["ratio"] < taken["integer"],
        control=("no constraint on the scales (16 bits each)", mean["free"]),
        notes=f"bytes: {taken['ratio']:,} against {taken['integer']:,}; scales that are powers of two: "
        f"{mean['power']:.4g}; the paper's ceiling: {mean['ceil']:.4g}; rank 8 given back: {mean['lorc']:.4g}",
    )


@claim(row=131, pace="quick", headline=_ACTIVATIONS)
def eight_bit_floats_beat_integers_where_tokens_have_outliers(assets: Assets) -> Outcome:
    """A range for each token, integers with a zero point: SmolLM2, whose tokens have outliers, and MiniLM, whose not.

    An integer errs by the range R of its token, by R / 255 / sqrt(12), a float by its own size: by 0.0245 of the root
    mean square where mantissas are spread as logarithms are. The two meet where R is 21.7 times that.
    """
    decoder, encoder = _rounding(assets.smollm2()), _rounding(assets.minilm())
    spread, ints, floats = decoder.T
    wide = spread > _MEETING
    agree = float(((floats < ints) == wide).float().mean())
    return Outcome(
        method=float(floats[wide].mean()),
        baseline=float(ints[wide].mean()),
        unit="relative error of a map's outputs, inputs in 8 bits, mean over SmolLM2's maps that read outliers",
        holds=int(wide.sum()) > 20 and float(floats[wide].mean()) < 0.9 * float(ints[wide].mean()) and agree > 0.75,
        control=("E4M3 in the maps that read none", float(floats[~wide].mean())),
        notes=f"{int(wide.sum())} of {len(wide)} maps read outliers; integers in the others: {ints[~wide].mean():.4g}; "
        f"the range tells the better format in {100 * agree:.3g} % of the maps; over all maps {floats.mean():.4g} "
        f"against {ints.mean():.4g}; on MiniLM, without outliers, integers are ahead: {encoder[:, 2].mean():.4g} "
        f"against {encoder[:, 1].mean():.4g}",
    )


def _rounding(model: AssetModel) -> Tensor:
    """For each map: range of a token over root mean square of the inputs, error with integers, error with E4M3."""
    windows = model.windows("wiki", part="heldout", length=128, count=2, seed=1)
    rows: list[list[float]] = []
    hooks = []
    for one in model.maps():
        layer = model.model.module.get_submodule(one.path)

        def hook(layer: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            x, matrix = given[0].reshape(-1, given[0].shape[-1]), layer.weight
            assert isinstance(matrix, Tensor)
            exact = x @ matrix.T
            spread = ((x.amax(1) - x.amin(1)).square().mean() / x.square().mean()).sqrt()
            errors = [
                float((Activation(format=format)(x) @ matrix.T - exact).norm() / exact.norm())
                for format in ("integer", "e4m3")
            ]
            rows.append([float(spread), *errors])

        hooks.append(layer.register_forward_pre_hook(hook))
    try:
        with looking(model.model.module):
            model.model.module(input_ids=windows)
    finally:
        for handle in hooks:
            handle.remove()
    assert len(rows) == len(model.maps())
    return torch.tensor(rows)
