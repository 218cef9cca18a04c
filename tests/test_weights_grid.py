"""Grids, packing and quantized weights, against NumPy, torch's own 8-bit floats and least squares."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import FormError, OptionError, ShapeError
from pennyweight.weights import Codebook, Dense, Grid, Quantized, doubled, normal_float
from pennyweight.weights.codebook import k_means
from pennyweight.weights.grid import float_levels
from pennyweight.weights.packing import pack, packed_width, unpack, unpack_words

SIZES = {"m": st.integers(1, 6), "n": st.integers(1, 70), "seed": st.integers(0, 2**32 - 1)}
#: Every kind of integer grid.
KINDS = [
    {"zero_kind": "integer"},
    {"zero_kind": "float"},
    {"symmetric": True},
    {"symmetric": True, "format": "unsigned"},
]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted_loss(grid: Grid, matrix: torch.Tensor, weight: torch.Tensor) -> float:
    return float((weight * (matrix - grid.values(grid.codes(matrix))).double() ** 2).sum())


# --- packing


@given(bits=st.integers(1, 8), **SIZES)
def test_packed_codes_are_the_bits_that_numpy_reads(bits, m, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (m, n))
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (m, -(-n * bits // 8))
    stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : n * bits].reshape(m, n, bits)
    np.testing.assert_array_equal((stream << np.arange(bits)).sum(-1), codes)
    np.testing.assert_array_equal(unpack(packed, bits, n).numpy(), codes)
    if bits < 8:
        np.testing.assert_array_equal(unpack_words(packed, bits, n).numpy(), codes)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(FormError, match=r"codes from 0 to 8 do not fit 3 bits"):
        pack(torch.tensor([0, 8]), 3)
    with pytest.raises(FormError, match="codes from -1"):
        pack(torch.tensor([0, -1]), 3)
    with pytest.raises(FormError, match="whole numbers"):
        pack(torch.tensor([0.0]), 3)
    with pytest.raises(ShapeError, match="give uint8 rows of 4"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 3, 10)


# --- floating formats


@pytest.mark.parametrize(("format", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_those_of_torch(format, dtype):
    patterns = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(float_levels(format), patterns.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    grid = Grid(8, None, torch.ones(1, 1), None, "none", format)
    largest = torch.finfo(dtype).max
    levels = float_levels(format)
    finite = levels[levels.isfinite()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    values = torch.cat([normal(0, 3000) * largest / 4, normal(1, 3000), normal(2, 3000) / 500, ties, finite])
    values = values[values.abs() <= largest]  # torch goes to NaN or infinity beyond, a grid stays at its largest
    wanted = values.to(dtype).float()
    assert torch.equal(grid.values(grid.codes(values[None]))[0], wanted)
    beyond = torch.tensor([[2 * largest, -2 * largest]])
    assert grid.values(grid.codes(beyond)).tolist() == [[largest, -largest]]


def test_four_bit_floats_are_those_of_the_microscaling_standard():
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert float_levels("e2m1").tolist() == positive + [-value for value in positive]
    grid = Grid(4, None, torch.full((1, 1), 2.0), None, "none", "e2m1")
    x = torch.tensor([[0.4, 0.5, 1.4, 5.0, 7.0, 100.0, -3.5]])
    assert grid.values(grid.codes(x)).tolist() == [[0, 0, 1, 4, 8, 12, -4]]  # ties to the even pattern


def test_a_code_that_is_no_number_is_refused():
    grid = Grid(8, None, torch.ones(1, 1), None, "none", "e4m3")
    with pytest.raises(FormError, match="some codes are the NaN or infinity of e4m3"):
        Quantized.from_codes(torch.tensor([[0x7F]]), grid)


# --- fitting


@given(bits=st.integers(1, 8), group_size=st.sampled_from([None, 1, 3, 16, 100]), kind=st.sampled_from(KINDS), **SIZES)
def test_the_error_is_at_most_half_a_step(bits, group_size, kind, m, n, seed):
    matrix = normal(seed, m, n)
    if "format" in kind:
        matrix = matrix.abs()
    grid = Grid.fit(matrix, bits=bits, group_size=group_size, scale_dtype=torch.float32, **kind)
    error = (grid.values(grid.codes(matrix)) - matrix).abs()
    step = grid.columns(0, n)[0].abs()
    inside = torch.ones_like(matrix, dtype=torch.bool)
    if kind == {"symmetric": True}:  # the side opposite to the largest value has one step less
        inside = matrix / grid.columns(0, n)[0] <= 2 ** (bits - 1) - 1
    assert (error <= 0.5001 * step + 1e-6)[inside].all()


@given(bits=st.integers(1, 8), group_size=st.sampled_from([None, 2, 3, 16]), kind=st.sampled_from(KINDS), **SIZES)
@settings(max_examples=50)
def test_a_matrix_on_its_grid_is_kept_exactly(bits, group_size, kind, m, n, seed):
    """Exact at no further compression: rounding twice is rounding once."""
    matrix = normal(seed, m, n)
    once = Quantized.nearest(matrix.abs() if "format" in kind else matrix, bits=bits, group_size=group_size, **kind)
    again = Quantized.from_codes(once.grid.codes(once.dense().detach()), once.grid)
    assert torch.equal(again.codes(), once.codes())
    assert torch.equal(again.dense(), once.dense())


@pytest.mark.parametrize("kind", [*KINDS, {"format": "e4m3"}, {"format": "e5m2"}, {"format": "e2m1"}], ids=str)
@pytest.mark.parametrize("search", [0, 5])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-9, 60000.0])
def test_constant_groups_survive(kind, search, value):
    value = abs(value) if kind.get("format") == "unsigned" else value
    matrix = torch.full((3, 10), value)
    bits = {"e4m3": 8, "e5m2": 8}.get(str(kind.get("format")), 4)
    weight = Quantized.nearest(matrix, bits=bits, group_size=4, search=search, **kind)
    assert weight.dense().isfinite().all()
    assert (weight.scale.dense() != 0).all()  # engines divide by it
    # 1e-9 is below the smallest half-precision scale: at worst it becomes zero
    assert ((weight.dense() - matrix).abs() <= max(1e-3 * abs(value), 2e-9)).all()


@pytest.mark.parametrize("search", [0, 6])
@pytest.mark.parametrize("kind", [*KINDS, {"format": "e2m1"}], ids=str)
def test_a_short_last_group_is_fitted_to_itself_alone(kind, search):
    matrix, importance = normal(2, 4, 21) + 9, normal(3, 21).exp()
    whole = Grid.fit(matrix, bits=4, group_size=8, importance=importance, search=search, **kind)
    tail = Grid.fit(matrix[:, 16:], bits=4, importance=importance[16:], search=search, **kind)
    assert torch.equal(whole.scale[:, 2:], tail.scale)
    assert whole.zero is tail.zero is None or torch.equal(whole.zero[:, 2:], tail.zero)


@pytest.mark.parametrize("kind", [*KINDS, {"format": "e2m1"}], ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_search_lowers_the_weighted_error_of_every_group(kind, bits):
    if kind.get("format") == "e2m1":
        bits = 4
    matrix = normal(3, 16, 90)
    if kind.get("format") == "unsigned":
        matrix = matrix.abs()
    importance = normal(4, 90).exp()
    plain, searched = (
        Grid.fit(matrix, bits=bits, group_size=32, importance=importance, search=search, **kind) for search in (0, 20)
    )
    loss = [
        (importance * (matrix - grid.values(grid.codes(matrix))) ** 2).split(32, dim=1) for grid in (plain, searched)
    ]
    for before, after in zip(*loss, strict=True):
        assert (after.sum(1) <= before.sum(1) * (1 + 1e-5)).all()
    assert weighted_loss(searched, matrix, importance) < 0.97 * weighted_loss(plain, matrix, importance)


@pytest.mark.parametrize("rows", [False, True])
def test_importance_moves_the_error_to_where_it_matters_less(rows):
    matrix = normal(5, 8, 64)
    importance = torch.where(torch.arange(64) < 16, 100.0, 1.0)
    importance = importance.expand(8, 64) if rows else importance
    even = Grid.fit(matrix, bits=2, zero_kind="float", search=30)
    uneven = Grid.fit(matrix, bits=2, zero_kind="float", search=30, importance=importance)
    assert weighted_loss(uneven, matrix[:, :], importance) < 0.95 * weighted_loss(even, matrix, importance)
    assert weighted_loss(uneven, matrix, torch.ones(64)) > weighted_loss(even, matrix, torch.ones(64))


def test_the_refit_is_the_least_squares_solution():
    matrix, importance = normal(6, 5, 24), normal(7, 24).exp()
    plain = Grid.fit(matrix, bits=3, zero_kind="float", scale_dtype=torch.float32)
    codes = plain.codes(matrix)
    found = Grid.fit(matrix, bits=3, zero_kind="float", importance=importance, search=1, scale_dtype=torch.float32)
    assert found.zero is not None
    changed = 0
    for row in range(5):
        design = np.stack([codes[row].numpy(), np.ones(24)], 1) * importance.sqrt().numpy()[:, None]
        wanted = np.linalg.lstsq(design, (matrix[row] * importance.sqrt()).numpy().astype(np.float64), rcond=None)[0]
        if found.scale[row] != plain.scale[row]:  # a row that the refit did not help keeps its range
            changed += 1
            np.testing.assert_allclose([float(found.scale[row, 0]), float(found.zero[row, 0])], wanted, rtol=1e-4)
    assert changed >= 3


def test_nothing_that_matters_is_still_fitted():
    matrix = normal(8, 2, 8)
    importance = torch.zeros(8)
    even = Grid.fit(matrix, bits=3, search=4)
    assert torch.equal(Grid.fit(matrix, bits=3, search=4, importance=importance).scale, even.scale)


def test_one_outlier_of_importance_does_not_break_the_fit():
    matrix, importance = normal(9, 4, 32), torch.zeros(32)
    importance[3] = 1e30
    grid = Grid.fit(matrix, bits=2, zero_kind="float", search=8, importance=importance)
    assert grid.values(grid.codes(matrix)).isfinite().all()


def test_one_scale_for_the_whole_matrix():
    matrix = normal(10, 6, 20)
    weight = Quantized.nearest(matrix, bits=8, per_tensor=True)
    assert weight.scale.shape == (1, 1)
    assert weight.cost().bytes == 6 * 20 + 2 + 1
    assert weight.error(matrix) < 0.02
    assert torch.equal(weight.rows(torch.tensor([4])), weight.dense()[[4]])


# --- what column solvers use


@given(group_size=st.sampled_from([None, 1, 3, 7, 64]), kind=st.sampled_from(KINDS), start=st.integers(0, 69), **SIZES)
def test_a_slice_of_columns_is_rounded_as_in_the_whole(group_size, kind, start, m, n, seed):
    matrix = normal(seed, m, n).abs()
    start = start % n
    stop = n - (seed % (n - start))
    grid = Grid.fit(matrix, bits=4, group_size=group_size, **kind)
    codes = grid.codes(matrix)
    assert torch.equal(grid.codes(matrix[:, start:stop], start), codes[:, start:stop])
    assert torch.equal(grid.values(codes[:, start:stop], start), grid.values(codes)[:, start:stop])
    scale, zero = grid.columns(start, stop)
    size = group_size or n
    for column in range(start, stop):
        assert torch.equal(scale[:, column - start], grid.scale[:, column // size].float())
        if grid.zero is not None and zero is not None:
            assert torch.equal(zero[:, column - start], grid.zero[:, column // size].float())


def test_what_a_solver_sees_is_what_is_stored():
    matrix = normal(11, 8, 100)
    for grid in (
        Grid.fit(matrix, bits=4, group_size=32, zero_kind="float", search=4),
        doubled(Grid.fit(matrix, bits=3, group_size=8, zero_kind="float", search=4), bits=6, group_size=8),
        doubled(Grid.fit(matrix, bits=3, group_size=8, symmetric=True), bits=8),
    ):
        codes = grid.codes(matrix)
        assert torch.equal(Quantized.from_codes(codes, grid).dense(), grid.values(codes))


# --- double quantization


def test_scales_quantized_in_turn_cost_less_and_hurt_little():
    matrix = normal(12, 32, 512)
    grid = Grid.fit(matrix, bits=4, group_size=16, zero_kind="float", search=8)
    plain = Quantized.from_codes(grid.codes(matrix), grid)
    second = doubled(grid, bits=6)
    twice = Quantized.from_codes(second.codes(matrix), second)
    assert isinstance(twice.scale, Quantized)
    assert twice.scale.format == "unsigned"
    assert plain.cost().bytes == 32 * 512 // 2 + 2 * 32 * 32 * 2
    assert twice.cost().bytes == 32 * 512 // 2 + 2 * 32 * 32 * 6 // 8 + 2 * 32 * 2
    assert twice.error(matrix) < 1.1 * plain.error(matrix)


# --- codebooks


def test_the_normal_float_table_is_the_published_one():
    # T. Dettmers et al., QLoRA, appendix E
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    published += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    published += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    published += [0.7229568362236023, 1.0]
    torch.testing.assert_close(normal_float(4), torch.tensor(published), rtol=0, atol=2e-6)


def test_a_given_table_takes_the_nearest_value():
    matrix = normal(13, 6, 70)
    weight = Codebook.nearest(matrix, bits=4, table=normal_float(4), group_size=32, dtype=torch.float32)
    for row in range(6):
        for first in range(0, 70, 32):
            group = matrix[row, first : first + 32]
            values = normal_float(4) * group.abs().max()
            wanted = (group[:, None] - values).abs().min(1).values
            torch.testing.assert_close((weight.dense()[row, first : first + 32] - group).abs(), wanted)


@given(
    count=st.integers(1, 5),
    values=st.lists(st.integers(-9, 9), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_k_means_beside_the_best_of_all_partitions(count, values, seed):
    x = torch.tensor([sorted(values)], dtype=torch.float32)
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    center = k_means(x, weight, count, 30)[0]

    def loss(first: int, last: int) -> float:  # of one cell, by definition
        part, mass = x[0, first:last].double(), weight[0, first:last].double()
        return float((mass * (part - (mass * part).sum() / mass.sum()) ** 2).sum())

    best = [[0.0] + [np.inf] * len(values)]
    for _ in range(count):
        before = best[-1]
        best.append([0.0] + [min(before[i] + loss(i, j) for i in range(j)) for j in range(1, len(values) + 1)])
    optimum = min(row[len(values)] for row in best[1:])
    found = float((weight[0].double() * (x[0, :, None] - center).double().square().min(1).values).sum())
    assert found >= optimum - 1e-6
    if len(set(values)) <= count:
        assert found < 1e-9  # so is the optimum
    cell = (x[0, :, None] - center).abs().argmin(1)
    for place in cell.unique():  # a fixed point: every center is the mean of its cell
        mine = cell == place
        mean = (weight[0, mine] * x[0, mine]).sum() / weight[0, mine].sum()
        alone = (
            (x[0, :, None] - center).abs() - (x[0, :, None] - center).abs().min(1, keepdim=True).values < 1e-6
        ).sum(1)
        if (alone == 1).all():  # ties may go either way
            assert abs(float(mean) - float(center[place])) < 1e-4


def test_k_means_is_near_the_optimum_where_it_matters():
    x = normal(14, 1, 4096)
    center = k_means(x, torch.ones_like(x), 16, 200)[0]
    error = float((x[0, :, None] - center).square().min(1).values.mean())
    # J. Max, "Quantizing for minimum distortion", 1960: 0.009497 for 16 levels of a Gaussian
    assert error < 1.05 * 0.009497 * float(x.square().mean())


@pytest.mark.parametrize("tables", ["matrix", "row", "group"])
def test_a_matrix_of_few_values_is_kept_exactly(tables):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-4, 4, (5, 22), generator=generator) / 4
    weight = Codebook.nearest(values, bits=3, tables=tables, group_size=8 if tables == "group" else None)
    assert torch.equal(weight.dense(), values)


def test_few_values_are_kept_however_rare_and_close():
    # neither equal shares nor equal distances would find these
    values = torch.tensor([[0.0] * 100 + [0.125, 0.25, 64.0]])
    assert torch.equal(Codebook.nearest(values, bits=2).dense(), values)


def test_finer_tables_lower_the_error():
    matrix = normal(15, 16, 128) * normal(16, 16, 1).exp()
    errors = [
        Codebook.nearest(matrix, bits=2, tables=tables, group_size=size).error(matrix)
        for tables, size in (("matrix", None), ("row", None), ("group", 32))
    ]
    assert errors[0] > 1.1 * errors[1] > 1.1 * errors[2]


# --- words


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (OptionError, "9 bits; give 1 to 8", {"bits": 9}),
        (OptionError, "0 bits; give 1 to 8", {"bits": 0}),
        (OptionError, "unknown format 'int'; give one of integer", {"bits": 4, "format": "int"}),
        (OptionError, "format e4m3 has 8 bits, not 4", {"bits": 4, "format": "e4m3"}),
        (OptionError, "unknown zero_kind 'half'", {"bits": 4, "zero_kind": "half"}),
        (OptionError, "group_size 0; give at least 1", {"bits": 4, "group_size": 0}),
        (OptionError, "search -1", {"bits": 4, "search": -1}),
        (ShapeError, r"importance of shape \(3,\) for a matrix \(2, 4\)", {"bits": 4, "importance": torch.ones(3)}),
        (FormError, "importance has negative entries", {"bits": 4, "importance": -torch.ones(4)}),
        (FormError, "importance: 4 of 4 values are NaN", {"bits": 4, "importance": torch.full((4,), torch.nan)}),
    ],
)
def test_what_no_grid_can_be_is_refused_in_words(error, words, arguments):
    with pytest.raises(error, match=words):
        Grid.fit(torch.ones(2, 4), **arguments)


def test_values_that_no_scale_can_hold_are_refused():
    with pytest.raises(FormError, match=r"matrix: 1 of 8 values are NaN"):
        Grid.fit(torch.tensor([[1.0] * 7 + [torch.nan]]), bits=4)
    with pytest.raises(FormError, match=r"is beyond torch.float16; give another scale_dtype"):
        Grid.fit(torch.full((1, 8), 1e8), bits=2)
    assert Grid.fit(torch.full((1, 8), 1e8), bits=2, scale_dtype=torch.bfloat16).scale.isfinite().all()
    with pytest.raises(ShapeError, match=r"\(4,\) is not a matrix"):
        Grid.fit(torch.ones(4), bits=4)


def test_parts_that_do_not_fit_are_refused_in_words():
    packed = pack(torch.zeros(2, 10, dtype=torch.uint8), 3)
    with pytest.raises(ShapeError, match=r"scale \(2, 2\) for \(2, 10\) in groups of 4; give \(2, 3\)"):
        Quantized(packed, Dense(torch.ones(2, 2)), bits=3, columns=10, group_size=4)
    with pytest.raises(ShapeError, match=r"are not rows of 11 codes of 3 bits; give \(out, 5\)"):
        Quantized(packed, Dense(torch.ones(2, 1)), bits=3, columns=11)
    with pytest.raises(ShapeError, match=r"zero_kind float and scale .* but the zero is none"):
        Quantized(packed, Dense(torch.ones(2, 1)), bits=3, columns=10, zero_kind="float")
    with pytest.raises(FormError, match=r"packed codes are torch\.float32; give uint8"):
        Quantized(packed.float(), Dense(torch.ones(2, 1)), bits=3, columns=10)
    with pytest.raises(FormError, match="codes reach 3 in tables of 3 values"):
        Codebook(pack(torch.tensor([[3]]), 2), torch.ones(1, 1, 3), bits=2, columns=1)
    with pytest.raises(OptionError, match="a given table is for the matrix"):
        Codebook.nearest(torch.ones(2, 2), bits=4, table=normal_float(4), tables="row")


@given(bits=st.integers(1, 8), n=st.integers(1, 40))
def test_a_row_takes_whole_bytes_and_no_more(bits, n):
    weight = Quantized.nearest(torch.ones(3, n), bits=bits, group_size=16, zero_kind="float")
    assert weight.cost().bytes == 3 * packed_width(n, bits) + 3 * 2 * 2 * -(-n // 16)
