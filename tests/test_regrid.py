"""quantize.regrid: every grid a checkpoint may have come from is found again, bit for bit, and nothing else is."""

import pytest
import torch
from assets_here import needs
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from

from pennyweight.errors import FormError, OptionError
from pennyweight.lever import make
from pennyweight.levers.quantize.nf4 import NF4
from pennyweight.levers.quantize.regrid import Regrid
from pennyweight.model import anatomy, assets
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Codebook, Dense, GridCoded, Quantized, rebuild, structure


def drawn(rows, columns, bits, group_size, kind, dtype, seed):
    """Values on a grid as a plain loop de-quantizes them, in single precision; the ends of each range occur."""
    g = torch.Generator().manual_seed(seed)
    codes = (torch.randn(rows, columns, generator=g) * 2 ** (bits - 2) + 2 ** (bits - 1)).round().clamp(0, 2**bits - 1)
    groups = columns // group_size
    codes[:, ::group_size] = 0
    codes[:, 1::group_size] = 2**bits - 1
    step = (0.003 + 0.02 * torch.rand(rows, groups, generator=g)).to(dtype).float()
    zero = torch.randint(1, 2**bits - 1, (rows, groups), generator=g).float()
    low = (-0.05 + 0.01 * torch.randn(rows, groups, generator=g)).to(dtype).float()
    found = torch.empty(rows, columns)
    for column in range(columns):
        group = column // group_size
        if kind == "float":
            found[:, column] = step[:, group] * codes[:, column] + low[:, group]
        elif kind == "integer":
            found[:, column] = step[:, group] * (codes[:, column] - zero[:, group])
        else:
            found[:, column] = step[:, group] * (codes[:, column] - 2 ** (bits - 1))
    return found, codes


@settings(max_examples=12)
@given(
    bits=sampled_from([2, 3, 4, 8]),
    group_size=sampled_from([16, 32, 64]),
    kind=sampled_from(["none", "integer", "float"]),
    dtype=sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=integers(0, 2**31),
)
def test_every_grid_is_found_again_bit_for_bit(bits, group_size, kind, dtype, seed):
    dtype = torch.float16 if kind == "float" and dtype == torch.float32 else dtype
    matrix, codes = drawn(6, 192, bits, group_size, kind, dtype, seed)
    found = Regrid().solve(Dense(matrix), NO_STATISTICS)
    assert isinstance(found, Quantized)
    assert torch.equal(found.dense(), matrix)
    options = {"symmetric": True} if kind == "none" else {"zero_kind": kind}
    plain = Quantized.nearest(matrix, bits=bits, group_size=group_size, **options)
    scales = (plain.cost().bytes - 6 * 192 * bits // 8) * (dtype.itemsize // 2)
    if kind == "integer" and dtype == torch.float32:  # zeros do not widen with the scales
        scales = plain.cost().bytes - 6 * 192 * bits // 8 + 2 * 6 * (192 // group_size)
    # never more than that grid takes; groups whose zero was in the middle do with less
    assert found.cost().bytes <= 6 * 192 * bits // 8 + scales
    if kind != "none":
        assert (found.bits, found.group_size) == (bits, group_size)
        if kind == "float":
            assert torch.equal(found.codes().float(), codes)
    coded = Regrid(entropy=True).solve(Dense(matrix), NO_STATISTICS)
    assert isinstance(coded, GridCoded)
    assert torch.equal(coded.dense(), matrix)


@pytest.mark.parametrize(
    ("kind", "target"),
    [(kind, torch.float16) for kind in ("none", "integer", "float")]
    + [(kind, torch.bfloat16) for kind in ("none", "integer")],
)
def test_values_that_a_sixteen_bit_checkpoint_rounded_come_back_in_its_dtype(kind, target):
    matrix, _ = drawn(4, 128, 4, 32, kind, torch.float16, 3)
    rounded = matrix.to(target)
    found = Regrid().solve(Dense(rounded), NO_STATISTICS)
    assert torch.equal(found.dense().to(target), rounded)
    assert 8 * found.cost().bytes / rounded.numel() < 9.1


def test_codes_of_uneven_frequency_are_coded_in_fewer_bits():
    g = torch.Generator().manual_seed(0)
    codes = (2.5 * torch.randn(64, 1024, generator=g)).round().clamp(-8, 7)
    codes[:, 0] = -8
    matrix = 0.01 * codes
    found = {entropy: Regrid(entropy=entropy).solve(Dense(matrix), NO_STATISTICS) for entropy in (False, True)}
    share = torch.bincount((codes + 8).long().flatten(), minlength=16) / codes.numel()
    entropy = float(-(share[share > 0] * share[share > 0].log2()).sum())
    rate = 8 * (found[True].words.numel() + found[True].lanes.numel()) / codes.numel()
    assert entropy <= rate < entropy + 0.03
    assert found[True].cost().bytes < 0.9 * found[False].cost().bytes
    assert torch.equal(found[True].dense(), matrix)
    again = rebuild(structure(found[True]), found[True].state_dict())
    assert torch.equal(again.dense(), matrix)
    spoilt = found[True].state_dict()
    spoilt["words"] = spoilt["words"].clone()
    spoilt["words"][:64] ^= 255
    with pytest.raises(FormError, match="the coded words do not fit their tables"):
        rebuild(structure(found[True]), spoilt)


def test_normal_floats_are_found_again():
    source = NF4(double=False).solve(
        Dense(torch.randn(8, 128, generator=torch.Generator().manual_seed(0))), NO_STATISTICS
    )
    matrix = source.dense().detach()
    found = Regrid().solve(Dense(matrix), NO_STATISTICS)
    assert isinstance(found, Codebook)
    assert torch.equal(found.dense(), matrix)
    assert found.cost().bytes == source.cost().bytes
    wide = NF4().solve(Dense(torch.randn(8, 128)), NO_STATISTICS).dense().detach()  # scales of single precision
    assert torch.equal(Regrid().solve(Dense(wide), NO_STATISTICS).dense(), wide)


def test_rows_of_zeros_and_of_one_value_and_whole_rows():
    matrix = torch.zeros(4, 48)
    matrix[1] = 0.125
    matrix[2, ::2] = -0.125
    found = Regrid().solve(Dense(matrix), NO_STATISTICS)
    assert torch.equal(found.dense(), matrix)
    assert found.bits == 1


@pytest.mark.parametrize("seed", range(3))
def test_what_lies_on_no_grid_is_refused_or_left_alone(seed):
    weight = Dense(0.02 * torch.randn(12, 96, generator=torch.Generator().manual_seed(seed)))
    with pytest.raises(
        FormError, match=r"no grid of up to 8 bits holds this 12x96 matrix in groups of 16, 32; round it"
    ):
        Regrid().solve(weight, NO_STATISTICS)
    assert Regrid(strict=False).solve(weight, NO_STATISTICS) is weight


def test_one_value_off_the_grid_is_enough_to_refuse():
    matrix, _ = drawn(40, 64, 4, 32, "float", torch.float16, 0)
    matrix[17, 33] = torch.nextafter(matrix[17, 33], torch.tensor(1.0))
    with pytest.raises(FormError, match="no grid of up to 8 bits"):
        Regrid(group_size=32).solve(Dense(matrix), NO_STATISTICS)


def test_narrower_limits_and_group_sizes_that_do_not_fit_are_refused():
    matrix, _ = drawn(6, 192, 4, 32, "float", torch.float16, 0)
    with pytest.raises(FormError, match="no grid of up to 3 bits"):
        Regrid(bits=3).solve(Dense(matrix), NO_STATISTICS)
    with pytest.raises(OptionError, match="group_size 50 does not divide 192 inputs"):
        Regrid(group_size=50).solve(Dense(matrix), NO_STATISTICS)
    with pytest.raises(OptionError, match="bits = 9 is out of range"):
        make("quantize.regrid", {"bits": 9})


@needs(assets.SMOLLM2)
def test_a_model_that_came_as_q4_1_is_stored_in_its_own_five_bits():
    from pennyweight.model import load

    found = load("smollm2-135m")
    block = [m for m in found.anatomy.layers() if m.block == 11]
    for layer in block[:4]:
        matrix = anatomy.matrix(found.module, layer)
        weight = Regrid().solve(Dense(matrix), NO_STATISTICS)
        assert (weight.bits, weight.group_size, weight.zero_kind) == (4, 32, "float")
        assert torch.equal(weight.dense(), matrix)
        assert 8 * weight.cost().bytes == 5 * matrix.numel()
        coded = Regrid(entropy=True).solve(Dense(matrix), NO_STATISTICS)
        assert torch.equal(coded.dense(), matrix)
        assert 8 * coded.cost().bytes < 4.9 * matrix.numel()
    moved = anatomy.matrix(load("smollm2-135m-permuted").module, block[0])
    with pytest.raises(FormError, match="no grid"):
        Regrid().solve(Dense(moved), NO_STATISTICS)
