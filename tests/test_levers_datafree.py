"""quantize.nf4 and quantize.hqq against their published definitions, and the search for scales that inputs weight."""

import pytest
import torch
from assets_here import needs
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers, sampled_from
from problems import objective, problem

from pennyweight.errors import FormError, OptionError
from pennyweight.lever import make
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.levers.quantize.hqq import HQQ
from pennyweight.levers.quantize.nf4 import NF4, NF4_VALUES
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import anatomy, assets
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Codebook, Dense, normal_float, rebuild, structure

# --- NF4


def test_the_sixteen_values_are_the_published_ones_and_the_quantiles():
    published = (
        "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
        "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
        "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
    )
    assert list(NF4_VALUES) == [float(value) for value in published.split()]
    # the published ones come from an offset of 7 digits
    torch.testing.assert_close(normal_float(4), torch.tensor(NF4_VALUES), rtol=0, atol=2e-7)


@settings(max_examples=30)
@given(m=integers(1, 5), n=integers(1, 150), size=sampled_from([4, 64]), double=booleans(), seed=integers(0, 2**31))
def test_every_weight_takes_the_nearest_value_times_the_largest_of_its_block(m, n, size, double, seed):
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    found = NF4(block_size=size, double=double).solve(Dense(matrix), NO_STATISTICS)
    assert isinstance(found, Codebook)
    scale, dense = found.scale.dense().detach(), found.dense().detach()
    for row in range(m):
        for block, start in enumerate(range(0, n, min(size, n))):
            x, unit = matrix[row, start : start + min(size, n)], float(scale[row, block])
            # two bytes of a scale, or 1/255 of what the scales of 256 rows span
            assert unit == pytest.approx(float(x.abs().max()), rel=2e-3 if not double else None, abs=0.02 * double)
            distance = (x[:, None] - unit * torch.tensor(NF4_VALUES)).abs()
            ours = dense[row, start : start + min(size, n)]
            torch.testing.assert_close((x - ours).abs(), distance.amin(1), rtol=1e-5, atol=1e-6)


def test_double_quantization_stores_a_byte_a_block():
    matrix, _ = problem(512, 256)
    single, double = (NF4(double=d).solve(Dense(matrix), NO_STATISTICS) for d in (False, True))
    blocks, codes = 512 * 4, 512 * 128
    assert single.cost().bytes == codes + 2 * blocks + 64
    assert double.cost().bytes == codes + blocks + 4 * (blocks // 256) + 64  # two float16 for 256 scales; the table
    assert single.error(matrix) < double.error(matrix) < 1.01 * single.error(matrix)
    again = rebuild(structure(double), double.state_dict())
    assert torch.equal(again.dense(), double.dense())


def test_rows_of_zeros_stay_zero():
    matrix, _ = problem(300, 64)
    matrix[3] = 0
    for double in (True, False):
        assert not NF4(double=double).solve(Dense(matrix), NO_STATISTICS).dense()[3].any()


# --- HQQ


def official(x, bits, lp_norm=0.7, beta=10.0, kappa=1.01, iters=20):
    """The method as its code states it, for groups (P, S): codes, codes a unit, zeros."""
    low, high = x.min(1, keepdim=True)[0], x.max(1, keepdim=True)[0]
    scale = ((2**bits - 1) / (high - low)).clamp(max=2e4)
    zero = -low * scale
    if bits == 4:
        zero = torch.round(zero)
    best = 1e4
    for _ in range(iters):
        q = torch.round(x * scale + zero).clamp(0, 2**bits - 1)
        r = (q - zero) / scale
        e = x - r
        e = torch.sign(e) * torch.nn.functional.relu(e.abs() - (1 / beta) * e.abs().pow(lp_norm - 1))
        zero = torch.mean(q - (x - e) * scale, dim=1, keepdim=True)
        beta *= kappa
        error = float((x - r).abs().mean())
        if error < best:
            best = error
        else:
            break
    return torch.round(x * scale + zero).clamp(0, 2**bits - 1), scale, zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_scales_and_zeros_are_those_of_the_official_method(bits):
    matrix = 0.02 * torch.randn(16, 192, generator=torch.Generator().manual_seed(0))
    matrix[::3, ::17] *= 6
    codes, scale, zero = official(matrix.view(-1, 64), bits)
    found = HQQ(bits=bits).solve(Dense(matrix), NO_STATISTICS)
    assert (found.codes().view(-1, 64) == codes).float().mean() > 0.999  # sums in another order
    wanted = ((codes - zero) / scale).view(matrix.shape)
    # steps and minima are stored in two bytes: 2^-11 of each, and minima are large where there are outliers
    assert (found.dense() - wanted).norm() <= 2e-3 * wanted.norm()


def test_outliers_cost_it_less_of_what_is_not_an_outlier():
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    matrix[:, ::64] *= 8
    plain, found = (HQQ(bits=3, iterations=n).solve(Dense(matrix), NO_STATISTICS) for n in (0, 20))
    missed = [(one.dense().detach() - matrix).abs() for one in (found, plain)]
    assert float(missed[0].pow(0.7).mean()) < 0.98 * float(missed[1].pow(0.7).mean())


def test_groups_of_one_value_and_short_last_groups_are_exact_where_they_can_be():
    matrix = torch.ones(3, 70)
    matrix[1, :64] = torch.arange(64) % 4
    found = HQQ(bits=2, group_size=64, iterations=0).solve(Dense(matrix), NO_STATISTICS)
    assert torch.equal(found.dense(), matrix)
    assert HQQ(bits=2, group_size=64).solve(Dense(matrix[:, :65]), NO_STATISTICS).error(matrix[:, :65]) < 0.5


def test_what_does_not_fit_is_refused_with_the_remedy():
    with pytest.raises(OptionError, match=r"quantize.hqq: lp_norm = 2 is out of range; give between 0.1 and 1"):
        make("quantize.hqq", {"lp_norm": 2})
    with pytest.raises(FormError, match=r"quantize.nf4: scale: 1 of 2 values are NaN or infinite"):
        NF4(double=False).solve(Dense(torch.tensor([[1e6], [1.0]])), NO_STATISTICS)
    with pytest.raises(FormError, match="the weight is quantized already"):
        HQQ().solve(HQQ().solve(Dense(torch.randn(4, 64)), NO_STATISTICS), NO_STATISTICS)


# --- scales searched, with errors weighted by what the inputs are


@pytest.mark.parametrize("lever", [RTN, GPTQ], ids=lambda lever: lever.lever_name)
def test_weighting_by_the_inputs_lowers_the_error_of_outputs(lever):
    total = {"plain": 0.0, "searched": 0.0, "weighted": 0.0}
    for seed in range(8):
        matrix, statistics = problem(24, 64, seed=seed)
        for name, options in {
            "plain": {}, "searched": {"search": 16}, "weighted": {"search": 16, "importance": "inputs"},
        }.items():  # fmt: skip
            found = lever(bits=3, group_size=16, **options).solve(Dense(matrix), statistics)
            total[name] += objective(found.dense(), matrix, statistics.second_moment)
    if lever is RTN:
        assert total["weighted"] < 0.95 * total["searched"]
    # error feedback knows of the inputs by itself: little is left to win
    assert total["weighted"] < (0.97 if lever is RTN else 0.99) * total["plain"]


@needs(assets.SMOLLM2, assets.GENSIM)
def test_on_a_model_off_its_grid_a_weighted_search_beats_minimum_and_maximum_at_four_bits():
    from pennyweight import calibrate, data
    from pennyweight.model import load

    found = load("smollm2-135m-permuted")
    windows = [
        data.windows("wiki", found.tokenizer, part=part, length=64, count=8, seed=0)
        for part in ("calibration", "heldout")
    ]
    names = [m.name for m in found.anatomy.layers() if m.block == 0]
    seen = []
    for ids in windows:
        moments = {}

        def keep(layer, weight, statistics, moments=moments):
            moments[layer.name] = statistics

        calibrate.walk(found, ids, keep, only=names, dtype=torch.float32)
        seen.append(moments)
    for layer in found.anatomy.layers()[1:8]:
        weight = Dense(anatomy.matrix(found.module, layer).float())
        plain, weighted = (
            RTN(bits=4, group_size=64, **options).solve(weight, seen[0][layer.name])
            for options in ({}, {"search": 16, "importance": "inputs"})
        )
        errors = [one.error(weight.matrix, seen[1][layer.name].second_moment) for one in (weighted, plain)]
        assert errors[0] < 0.97 * errors[1], layer.name
        assert weighted.cost() == plain.cost()
