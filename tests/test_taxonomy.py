"""Row 226: every value of the survey's taxonomy on one linear layer, each held to its own bound."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import OptionError, ShapeError
from pennyweight.levers.quantize.equalize import equalize
from pennyweight.levers.quantize.extreme import binary, powers_of_two, ternary
from pennyweight.levers.quantize.integer_only import ActivationGrid, IntegerLinear, QuantizedInputs, dyadic, requantize
from pennyweight.levers.quantize.learned_step import learned_step, tuned
from pennyweight.levers.quantize.ranges import find_range, grid_of
from pennyweight.levers.quantize.scheme import Scheme
from pennyweight.levers.quantize.taxonomy import taxonomy
from pennyweight.recipe import Recipe
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import CompactLinear, Dense, Quantized, rebuild, structure
from pennyweight.weights.vector import VectorCodebook


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def matrix(generator):
    """(24, 100): normal, with outliers; 100 is no multiple of the usual groups."""
    found = torch.randn(24, 100, generator=generator)
    found[::5, ::17] *= 6
    return found


# --- the table


def test_every_axis_of_the_survey_has_its_values_and_most_are_here():
    axes = {axis: list(values) for axis, values in itertools.groupby(taxonomy(), key=lambda value: value.axis)}
    assert list(axes) == [
        "values", "symmetry", "range", "granularity", "rounding", "activations", "arithmetic", "tuning",
        "mixed precision", "assisted by", "coding",
    ]  # fmt: skip
    for value in taxonomy():
        assert value.implemented == (value.by is not None), f"{value.axis} = {value.name}: {value.by} is not here"
    assert [value.name for value in taxonomy() if not value.implemented] == ["reinforcement learning", "distillation"]
    with pytest.raises(OptionError, match=r"data-free is not a setting of one map; it is pennyweight.levers"):
        next(value for value in taxonomy() if value.name == "data-free").scheme()


@pytest.mark.parametrize(
    "value", [v for v in taxonomy() if v.settings is not None], ids=lambda value: f"{value.axis}-{value.name}"
)
def test_every_value_is_one_setting_of_one_configuration_and_survives_a_file(value, matrix, generator):
    scheme = value.scheme()
    inputs, bias = torch.randn(40, 100, generator=generator), torch.randn(24, generator=generator)
    layer = scheme.layer(matrix, bias, inputs)
    exact = inputs @ matrix.T + bias
    # a value that did nothing sensible would be off by the size of the outputs themselves
    assert float((layer(inputs).detach() - exact).norm() / exact.norm()) < (0.75 if value.name == "binary" else 0.55)
    weight = scheme.weight(matrix)
    back = rebuild(structure(weight), weight.state_dict())
    assert torch.equal(back.dense(), weight.dense())
    if scheme.arithmetic == "simulated" and scheme.activations == "none" and scheme.tuning == "none":
        assert torch.equal(scheme.solve(Dense(matrix), NO_STATISTICS).dense(), weight.dense())
        text = f"pennyweight: 1\nsteps:\n- quantize.scheme: {dict(value.settings)}\n"
        assert Recipe.parse(text).steps[0].lever == scheme


# --- uniform values


COMBINATIONS = list(
    itertools.product((False, True), ("min-max", "percentile", "mse", "kl"), ("tensor", "channel", "group"), (2, 4, 8))
)


@pytest.mark.parametrize(("symmetric", "range", "granularity", "bits"), COMBINATIONS)
def test_rounding_is_off_by_half_a_step_at_most_inside_the_range_and_clips_to_its_end(
    symmetric, range, granularity, bits, matrix
):
    scheme = Scheme(bits=bits, symmetric=symmetric, range=range, granularity=granularity)
    grid = scheme.grid(matrix)
    rounded = scheme.weight(matrix).dense()
    step, zero = (None if part is None else part.expand(24, -1) for part in grid.columns(0, 100))
    low = -step * ((2 ** (bits - 1)) if zero is None else zero)
    high = step * ((2 ** (bits - 1) - 1) if zero is None else 2**bits - 1 - zero)
    inside = (matrix >= low) & (matrix <= high)
    assert inside.float().mean() > 0.6
    error = (rounded - matrix).abs()
    assert float((error / step)[inside].max()) <= 0.5 + 1e-5
    assert torch.allclose(rounded[~inside], torch.where(matrix > high, high, low)[~inside])
    if range == "min-max":
        assert float((error / step).max()) <= 1.0 + 1e-5  # nothing is clipped but by the rounding of the zero
        assert len(torch.unique(rounded)) > 1
    groups = {"tensor": (1, 1), "channel": (24, 1), "group": (24, 2)}[granularity]
    assert tuple(grid.scale.shape) == groups


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_finer_granularity_and_a_bit_more_never_round_worse(symmetric, matrix):
    def error(**options):
        return float((Scheme(symmetric=symmetric, **options).weight(matrix).dense() - matrix).square().sum())

    tensor, channel, group = (error(granularity=g, range="mse") for g in ("tensor", "channel", "group"))
    assert group < channel < tensor
    assert error(bits=5) < error(bits=4) < error(bits=3)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_calibrations_order_on_a_heavy_tailed_tensor(bits):
    x = torch.from_numpy(scipy.stats.t(df=3).rvs(size=(1, 200_000), random_state=226)).float()

    def error(method):
        low, high = find_range(x, method, bits=bits, symmetric=True)
        grid = grid_of(low[:, None], high[:, None], bits=bits, symmetric=True)
        return float((grid.values(grid.codes(x)) - x).square().mean()), float(high)

    errors = {method: error(method) for method in ("min-max", "percentile", "mse", "kl")}
    assert errors["mse"][0] == min(e for e, _ in errors.values())
    assert errors["mse"][0] < 0.5 * errors["min-max"][0]  # clipping is worth it here, and plainly so
    assert errors["kl"][0] < errors["min-max"][0]
    assert errors["percentile"][0] < errors["min-max"][0]
    assert errors["percentile"][1] == pytest.approx(np.abs(np.quantile(x.numpy(), [0.0005, 0.9995])).max(), rel=1e-3)
    tops = [error_and_top[1] for error_and_top in errors.values()]
    assert max(tops) == errors["min-max"][1]


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_least_squares_ranges_are_never_worse_than_min_max(values, bits, symmetric):
    x = torch.tensor([values])
    errors = []
    for method in ("min-max", "mse"):
        low, high = find_range(x, method, bits=bits, symmetric=symmetric)
        grid = grid_of(low[:, None], high[:, None], bits=bits, symmetric=symmetric)
        errors.append(float((grid.values(grid.codes(x)) - x).square().sum()))
    assert errors[1] <= errors[0]


def test_the_entropy_method_keeps_all_of_a_flat_histogram_and_clips_a_lone_outlier():
    flat = torch.linspace(0, 1, 20_001)[None]
    low, high = find_range(flat, "kl", bits=8, symmetric=False)
    assert float(low) == 0
    assert float(high) > 0.98
    spiked = torch.cat([torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0)), torch.tensor([[40.0]])], 1)
    _, high = find_range(spiked, "kl", bits=8, symmetric=True)
    assert 2 < float(high) < 10


def test_stochastic_rounding_is_unbiased():
    matrix = torch.tensor([[0.0, 0.1, 0.35, 0.5, 0.77, -0.29, -0.71, 1.0]]) * 7
    scheme = Scheme(bits=4, symmetric=True, granularity="channel", rounding="stochastic")
    step = float(scheme.grid(matrix).scale)
    draws = torch.stack([Scheme(**{**vars(scheme), "seed": seed}).weight(matrix).dense()[0] for seed in range(4000)])
    deviation = (draws.mean(0) - matrix[0]).abs()
    assert bool((deviation <= 3 * draws.std(0) / len(draws) ** 0.5 + 1e-6).all())
    fraction = (matrix[0] / step) % 1
    assert torch.allclose(draws.var(0), step**2 * fraction * (1 - fraction), rtol=0.2, atol=1e-6)  # Bernoulli
    assert torch.equal(draws[:, 0], torch.zeros(4000))  # what lies on the grid stays
    nearest = Scheme(bits=4, symmetric=True, granularity="channel").weight(matrix).dense()[0]
    assert float((nearest - matrix[0]).abs().max()) > 0.2 * step  # nearest is biased, entry by entry


# --- other values


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_a_k_means_codebook_beats_uniform_values_at_equal_bits(bits, granularity, matrix):
    errors = [
        float(
            (Scheme(bits=bits, values=values, granularity=granularity, **more).weight(matrix).dense() - matrix).norm()
        )
        for values, more in (("k-means", {}), ("uniform", {"range": "mse"}))
    ]
    assert errors[0] <= errors[1]


def test_k_means_finds_values_that_are_there(generator):
    table = torch.tensor([-3.0, -0.25, 0.5, 4.0])
    matrix = table[torch.randint(0, 4, (9, 30), generator=generator)]
    assert torch.equal(Scheme(bits=2, values="k-means", granularity="tensor").weight(matrix).dense(), matrix)


@given(values=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=7))
def test_binary_and_ternary_are_the_nearest_of_their_kind(values):
    w = np.array(values)
    matrix = torch.tensor([values])
    # brute force over every assignment of {-1, 1} or {-1, 0, 1}, each with its own best scale
    for levels, found in (((-1, 1), binary(matrix)), ((-1, 0, 1), ternary(matrix))):
        best = np.inf
        for pattern in itertools.product(levels, repeat=len(w)):
            p = np.array(pattern)
            scale = max(0.0, w @ p / max(p @ p, 1))
            best = min(best, float(((w - scale * p) ** 2).sum()))
        error = float(((found.dense()[0].detach().numpy() - w) ** 2).sum())
        # the scale is stored in 16 bits: off by 2^-11 of itself in each place, to second order
        assert error <= best + 1e-6 * (w @ w) + 1e-12


def test_power_of_two_values_are_powers_of_two(matrix):
    assert powers_of_two(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    weight = Scheme(bits=4, values="power-of-two", granularity="channel").weight(matrix)
    ratios = weight.dense().abs() / weight.dense().abs().amax(1, keepdim=True)
    logs = torch.log2(ratios[ratios > 0])
    assert torch.allclose(logs, logs.round(), atol=1e-3)
    # against the nearest level by brute force
    levels = powers_of_two(4) * weight.scale.dense()[:, :, None]  # (M, 1, K)
    nearest = (matrix[..., None] - levels).abs().argmin(-1)
    wanted = levels.expand(24, 100, -1).gather(-1, nearest[..., None])[..., 0]
    assert torch.allclose(weight.dense(), wanted)


def test_vectors_are_coded_together_and_beat_scalars_on_what_is_correlated(generator):
    half = torch.randn(64, 48, generator=generator)
    matrix = torch.stack([half, half + 0.05 * torch.randn(64, 48, generator=generator)], dim=2).reshape(64, 96)
    vector = Scheme(bits=6, values="vector", granularity="tensor", dimension=2).weight(matrix)  # 3 bits a weight
    scalar = Scheme(bits=3, values="k-means", granularity="tensor").weight(matrix)
    assert vector.codes().shape == (64, 48)
    assert vector.cost().bytes <= scalar.cost().bytes + vector.table.nbytes
    assert float((vector.dense() - matrix).norm()) < 0.5 * float((scalar.dense() - matrix).norm())


def test_vector_codes_are_the_nearest_of_the_table_and_exact_when_it_holds_all(generator):
    table = torch.randn(8, 3, generator=generator).half().float()
    matrix = table[torch.randint(0, 8, (5, 4), generator=generator)].reshape(5, 12)[:, :11]
    padded = torch.nn.functional.pad(matrix, (0, 1))
    exact = VectorCodebook.nearest(matrix, bits=6, dimension=3)
    assert torch.allclose(exact.dense(), matrix)
    coarse = VectorCodebook.nearest(matrix, bits=2, dimension=3)
    distances = (padded.reshape(5, 4, 1, 3) - coarse.table.detach().float()).square().sum(-1)
    assert torch.equal(distances.argmin(-1).to(torch.uint8), coarse.codes())
    with pytest.raises(OptionError, match="9 bits for vectors of 3"):
        VectorCodebook.nearest(matrix, bits=9, dimension=3)


# --- activations and integers


def test_dynamic_ranges_follow_each_row_and_static_ones_do_not(generator):
    inputs = torch.randn(200, 64, generator=generator)
    dynamic, static = ActivationGrid(8, None), ActivationGrid.static(inputs)
    for scale in (0.01, 1.0, 100.0):
        error = (dynamic(scale * inputs) - scale * inputs).abs().amax(1)
        steps = (scale * inputs).amax(1).clamp_min(0) - (scale * inputs).amin(1).clamp_max(0)
        assert bool((error <= 0.501 * steps / 255 * (1 + 2**-9)).all())
    assert float((static(inputs) - inputs).abs().max()) <= 0.501 * float(inputs.max() - inputs.min()) / 255 * (
        1 + 2**-9
    )
    assert float((static(100 * inputs) - 100 * inputs).abs().max()) > 50  # clipped: the calibration knew nothing of it
    assert dynamic(inputs.reshape(10, 20, 64)).shape == (10, 20, 64)


@given(value=st.floats(1e-9, 1e8), seed=st.integers(0, 2**31))
def test_a_dyadic_number_is_right_to_thirty_bits(value, seed):
    mantissa, shift = dyadic(torch.tensor([value], dtype=torch.float64))
    assert abs(int(mantissa) / 2 ** int(shift) / value - 1) <= 2**-31
    accumulator = int(np.random.default_rng(seed).integers(-(2**24), 2**24))
    exact = accumulator * int(mantissa) / 2 ** int(shift)
    if abs(exact) < 2**40:
        got = requantize(torch.tensor([accumulator]), mantissa, shift, 2**41, 42)
        assert int(got) == 2**41 + (2 * accumulator * int(mantissa) + 2 ** int(shift)) // 2 ** (int(shift) + 1)


def test_a_multiplier_out_of_reach_is_refused():
    with pytest.raises(OptionError, match="dyadic: multipliers must lie between"):
        dyadic(torch.tensor([1e-30]))
    with pytest.raises(OptionError, match="dyadic"):
        dyadic(torch.tensor([0.0]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), bits=st.integers(2, 8), out_bits=st.integers(4, 8), whole=st.booleans())
def test_integers_alone_equal_the_float_simulation_within_one_code(seed, bits, out_bits, whole):
    g = torch.Generator().manual_seed(seed)
    matrix, bias, inputs = (torch.randn(*shape, generator=g) for shape in ((12, 40), (12,), (64, 40)))
    scheme = Scheme(
        bits=bits, symmetric=True, granularity="tensor" if whole else "channel", activations="static",
        activation_bits=out_bits, arithmetic="integer",
    )  # fmt: skip
    layer = scheme.layer(matrix, bias, inputs)
    assert isinstance(layer, IntegerLinear)
    assert not any(tensor.is_floating_point() for tensor in layer.state_dict().values())
    codes = layer.inputs.grid.codes(3 * torch.randn(30, 40, generator=g))
    difference = (layer.integers(codes).long() - layer.simulated(codes)).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.01  # and mostly not even that
    # against the layer that rounds the same things in floating point: one code of the output, and the rounded bias
    simulated = QuantizedInputs(scheme.weight(matrix), bias, layer.inputs)(inputs)
    step = float(layer.outputs.grid.scale)
    assert float((layer(inputs) - simulated).abs().max()) <= 0.51 * step + float(
        (scheme.grid(matrix).scale.float() * layer.inputs.grid.scale.float()).max()
    )


def test_integer_layers_refuse_what_no_single_multiplier_can_fold(matrix):
    static = ActivationGrid.static(torch.randn(10, 100, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(OptionError, match="symmetric integer weights with one scale"):
        IntegerLinear(Quantized.nearest(matrix, bits=8), None, static, static)
    with pytest.raises(OptionError, match="needs activations = static"):
        IntegerLinear(Quantized.nearest(matrix, bits=8, symmetric=True), None, ActivationGrid(8, None), static)


# --- tuning


@torch.enable_grad()
def test_learned_steps_have_the_gradients_of_the_source():
    x = torch.tensor([[-9.0, -1.6, -0.2, 0.4, 1.3, 9.0]], requires_grad=True)
    step = torch.tensor([[0.5]], requires_grad=True)
    found = learned_step(x, step, 3)  # levels -4 .. 3
    assert found.tolist() == [[-2.0, -1.5, 0.0, 0.5, 1.5, 1.5]]
    found.sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 1, 0]]
    level = np.array([-9.0, -1.6, -0.2, 0.4, 1.3, 9.0]) / 0.5
    slope = np.where((level > -4) & (level < 3), np.round(level) - level, np.clip(level, -4, 3))
    assert float(step.grad) == pytest.approx(slope.sum() / np.sqrt(6 * 3), rel=1e-5)


def test_tuning_through_the_rounding_lowers_the_error_of_the_outputs(matrix, generator):
    mixing = torch.randn(100, 100, generator=generator)  # correlated inputs: there is something to trade
    inputs, fresh = (torch.randn(400, 100, generator=generator) @ mixing for _ in range(2))
    scheme = Scheme(bits=3, symmetric=True, group_size=50, tuning="aware")
    before = Scheme(bits=3, symmetric=True, group_size=50).weight(matrix)
    after = scheme.layer(matrix, None, inputs).weight
    assert isinstance(after, Quantized)
    errors = [float(((weight.dense() - matrix) @ fresh.T).norm()) for weight in (before, after)]
    assert errors[1] < 0.8 * errors[0]
    assert structure(after) == structure(before)  # the same storage
    assert torch.equal(tuned(matrix, scheme.grid(matrix), inputs, steps=0).dense(), before.dense())


# --- data-free


def test_equalized_maps_are_the_same_function_with_equal_ranges(generator):
    spread = torch.logspace(-2, 2, 16)
    first = torch.randn(16, 8, generator=generator) * spread[:, None]
    second = torch.randn(5, 16, generator=generator) / spread
    bias, x = torch.randn(16, generator=generator) * spread, torch.randn(30, 8, generator=generator)
    one, two, moved = equalize(first, second, bias)
    before = torch.relu(x @ first.T + bias) @ second.T
    assert torch.allclose(torch.relu(x @ one.T + moved) @ two.T, before, rtol=1e-4, atol=1e-4)
    assert torch.allclose(one.abs().amax(1), two.abs().amax(0), rtol=1e-5)
    scheme = Scheme(bits=8, granularity="tensor")
    plain = torch.relu(x @ scheme.weight(first).dense().T + bias) @ scheme.weight(second).dense().T
    q1, q2, moved = scheme.pair(first, second, bias)
    equal = torch.relu(x @ q1.dense().T + moved) @ q2.dense().T
    assert float((equal - before).norm()) < 0.1 * float((plain - before).norm())
    with pytest.raises(ShapeError, match=r"gives 16 channels, .* takes 8"):
        equalize(first, torch.zeros(3, 8))


def test_a_dead_channel_is_left_as_it_is():
    one, two, _ = equalize(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0, 0.5]]))
    assert torch.isfinite(one).all()
    assert torch.isfinite(two).all()
    assert float(one[0]) == 0
    assert float(two[0, 0]) == 3


# --- what does not go together


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"values": "k-means", "symmetric": True}, "symmetric means nothing with k-means values"),
        ({"values": "binary"}, "binary has 1 bit, not 4 with binary values; give bits = 1"),
        ({"values": "ternary"}, "ternary has 2 bits, not 4"),
        ({"values": "float", "bits": 5}, "5 bits are no format with float values; give bits = 4 or 8"),
        ({"values": "vector"}, "one table serves all with vector values; give granularity = tensor"),
        ({"values": "normal-float", "range": "mse"}, "range = mse means nothing"),
        ({"values": "ternary", "bits": 2, "rounding": "stochastic"}, "stochastic rounding is"),
        ({"bits": 1, "symmetric": True}, "1 bit without a zero has one level"),
        ({"arithmetic": "integer"}, "integers need with uniform values; give symmetric = true"),
        ({"arithmetic": "integer", "symmetric": True}, "groups have scales of their own"),
        ({"arithmetic": "integer", "symmetric": True, "granularity": "channel"}, "give activations = static"),
        ({"tuning": "aware"}, "learned steps need"),
        ({"percentile": 99.0}, "percentile = 99.0 has no effect; give range = percentile with it"),
        ({"granularity": "tensor", "group_size": 32}, "group_size = 32 has no effect"),
        ({"dimension": 4}, "dimension = 4 has no effect; give values = vector"),
        ({"seed": 1}, "seed = 1 has no effect"),
        ({"range": "median"}, "range = 'median' is a str"),
    ],
)
def test_options_that_contradict_each_other_or_do_nothing_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        Scheme(**options)


def test_the_weight_alone_refuses_what_needs_the_layer(matrix):
    with pytest.raises(OptionError, match="activations needs the layer and its inputs"):
        Scheme(activations="dynamic").solve(Dense(matrix), NO_STATISTICS)
    assert isinstance(Scheme().layer(matrix, None, matrix), CompactLinear)
