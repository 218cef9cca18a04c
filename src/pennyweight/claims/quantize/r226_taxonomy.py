"""Row 226, quantization survey: on MiniLM codebooks beat uniform values, clipping pays, and integers alone suffice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.levers.quantize.integer_only import IntegerLinear, QuantizedInputs
from pennyweight.levers.quantize.ranges import Range, find_range, grid_of
from pennyweight.levers.quantize.scheme import Scheme
from pennyweight.weights import Weight

_HEADLINE = "4 bits or fewer: up to 16x in memory and latency in principle, 4x to 8x reached (abstract)"


def _error(weight: Weight, matrix: Tensor) -> float:
    return float((weight.dense().detach() - matrix).norm() / matrix.norm())


def _finest_group(matrix: Tensor, bits: int, budget: int) -> int:
    """The smallest group whose uniform values take no more than ``budget`` bytes."""
    for size in range(4, matrix.shape[1]):
        if Scheme(bits=bits, group_size=size).weight(matrix[:1]).cost().bytes * matrix.shape[0] <= budget:
            return size
    return matrix.shape[1]


@claim(row=226, pace="quick", headline=_HEADLINE)
def codebooks_beat_uniform_values_at_equal_bits(assets: Assets) -> Outcome:
    """A table of values for each row by k-means, beside uniform values on the range of least squared error."""
    rows = []
    for matrix in assets.minilm().matrices("encoder")[::3]:  # every third: query, output and down of each block
        fitted = Scheme(bits=3, values="k-means", granularity="channel").weight(matrix)
        uniform = Scheme(bits=3, range="mse", granularity="channel").weight(matrix)
        group = _finest_group(matrix, 3, fitted.cost().bytes)
        finer = Scheme(bits=3, range="mse", group_size=group).weight(matrix)
        rows.append([_error(weight, matrix) for weight in (fitted, uniform, finer)])
    errors = torch.tensor(rows)  # (matrices, 3)
    method, baseline, control = errors.mean(0).tolist()
    return Outcome(
        method=method,
        baseline=baseline,
        unit="relative Frobenius error at 3 bits, mean over matrices",
        holds=bool((errors[:, 0] < errors[:, 1]).all()) and method < 0.97 * baseline,
        control=("uniform values, the bytes of the tables spent on groups", control),
    )


@claim(row=226, pace="quick", headline=_HEADLINE)
def clipped_ranges_beat_min_max_on_activations(assets: Assets) -> Outcome:
    """Static 4-bit activations: the range is found on calibration text and judged on held-out text."""
    minilm = assets.minilm()
    text = {part: minilm.windows("wiki", part=part, length=128, count=8) for part in ("calibration", "heldout")}
    methods: tuple[Range, ...] = ("min-max", "percentile", "mse", "kl")
    rows = []
    for one in minilm.maps("ffn.down"):  # behind the GELU: a long tail on one side
        seen, fresh = (minilm.inputs(one, windows) for windows in text.values())
        errors = []
        for method in methods:
            low, high = find_range(seen.reshape(1, -1), method, bits=4, symmetric=False)
            grid = grid_of(low[:, None], high[:, None], bits=4, symmetric=False)
            errors.append(float((grid.values(grid.codes(fresh)) - fresh).norm() / fresh.norm()))
        rows.append(errors)
    table = torch.tensor(rows)  # (layers, methods)
    found = dict(zip(methods, table.mean(0).tolist(), strict=True))
    ordered = bool((table[:, 2] <= table.amin(1) + 1e-3).all())  # least squares is what is measured here
    return Outcome(
        method=found["mse"],
        baseline=found["min-max"],
        unit="relative error of 4-bit inputs of ffn.down, held-out text",
        holds=ordered and found["mse"] < 0.8 * found["min-max"],
        control=("99.9 % of the values inside", found["percentile"]),
        notes=f"entropy (KL) ranges: {found['kl']:.4g}",
    )


@claim(row=226, pace="quick", headline=_HEADLINE)
def integers_alone_give_what_simulated_quantization_gives(assets: Assets) -> Outcome:
    """Every linear map of MiniLM in 8-bit integers from code to code, beside the same in floating point."""
    minilm = assets.minilm()
    seen = minilm.windows("wiki", part="calibration", length=128, count=4)
    fresh = minilm.windows("wiki", part="heldout", length=128, count=2)
    scheme = Scheme(bits=8, symmetric=True, granularity="channel", activations="static", arithmetic="integer")
    errors: list[list[float]] = []
    largest, share = 0, list[float]()
    for one, matrix in zip(minilm.maps("encoder"), minilm.matrices("encoder"), strict=True):
        layer = minilm.model.module.get_submodule(one.path)
        assert isinstance(layer, nn.Linear)
        bias = layer.bias.detach()
        exact = scheme.layer(matrix, bias, minilm.inputs(one, seen), range="mse")
        assert isinstance(exact, IntegerLinear)
        assert exact.inputs.grid is not None
        x = minilm.inputs(one, fresh)
        codes = exact.inputs.grid.codes(x)
        apart = (exact.integers(codes).long() - exact.simulated(codes)).abs()
        largest, share = max(largest, int(apart.max())), [*share, float((apart > 0).float().mean())]
        wanted = x @ matrix.T + bias
        simulated = exact.outputs(QuantizedInputs(scheme.weight(matrix), bias, exact.inputs)(x))
        errors.append([float((found.detach() - wanted).norm() / wanted.norm()) for found in (exact(x), simulated)])
    method, baseline = torch.tensor(errors).mean(0).tolist()
    return Outcome(
        method=method,
        baseline=baseline,
        unit="relative error of the outputs of a map, 8 bits in, inside and out",
        holds=largest <= 1 and abs(method - baseline) < 0.02 * baseline and baseline < 0.1,
        notes=f"codes differ by {largest} at most, in {100 * max(share):.3g} % of the outputs of the worst map",
    )
