"""Range coding and the entropy-coded form and lever, against entropies and a plain column loop."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import FormError, OptionError
from pennyweight.levers.quantize.entropy import Entropy, Metric
from pennyweight.native import library
from pennyweight.statistics import Statistics
from pennyweight.weights import Dense, rans, rebuild, stored_bytes, structure
from pennyweight.weights.entropy import EntropyCoded, scale_bytes, scale_values


def scan(seed: int, count: int, contexts: int) -> tuple[rans.Bytes, rans.Bytes]:
    g = np.random.default_rng(seed)
    where = g.integers(0, contexts, count).astype(np.uint8)
    symbols = np.clip(np.rint(g.normal(size=count) * (1 + where)) + 30, 0, 60).astype(np.uint8)
    return symbols, where


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 30_000), contexts=st.integers(1, 16))
@settings(max_examples=25, deadline=None)
def test_coding_is_lossless_and_both_twins_agree(seed: int, count: int, contexts: int) -> None:
    symbols, where = scan(seed, count, contexts)
    tables = rans.tables_of(symbols, where, 61, contexts)
    plain = rans.encode(symbols, where, tables, native=False)
    np.testing.assert_array_equal(rans.decode(plain, where, tables, native=False), symbols)
    if library("rans") is not None:
        native = rans.encode(symbols, where, tables)
        for name in ("words", "states", "lengths"):
            np.testing.assert_array_equal(getattr(native, name), getattr(plain, name))
        np.testing.assert_array_equal(rans.decode(plain, where, tables), symbols)


@pytest.mark.parametrize("count", [16 * 8192, 37 * 8192 + 4097])
def test_many_lanes_decode_as_one_after_the_other(count: int) -> None:
    symbols, where = scan(5, count, 16)
    tables = rans.tables_of(symbols, where, 61, 16)
    coded = rans.encode(symbols, where, tables)
    for native in (False, True):
        np.testing.assert_array_equal(rans.decode(coded, where, tables, native=native), symbols)


def test_contexts_come_from_the_sum_of_a_row_and_a_column() -> None:
    g = np.random.default_rng(0)
    row, column = (g.integers(0, 128, n).astype(np.uint8) for n in (37, 53))
    of_sum = (np.arange(256) // 17).astype(np.uint8)
    wanted = (row[:, None].astype(int) + column) // 17
    for native in (False, True):
        np.testing.assert_array_equal(rans.contexts_of(row, column, of_sum, native=native), wanted.ravel())


@pytest.mark.parametrize("middle", [0, 20, -100, 1000, -3000])
@pytest.mark.parametrize("spread", [0.8, 30.0, 300.0])  # a small alphabet, codes about as wide as a byte, wider
def test_what_is_decoded_is_what_was_encoded(spread: float, middle: int) -> None:
    codes = codes_of(1, (96, 300), spread) + middle
    codes[3, 7], codes[90, 299] = 100_000, -70_000
    first = EntropyCoded.encode(codes, torch.ones(96), torch.ones(300), step=1.0)
    again = rebuild(structure(first), {name: getattr(first, name) for name in EntropyCoded.tensors})
    assert isinstance(again, EntropyCoded)
    for name in ("near", "far", "beyond"):
        assert torch.equal(getattr(again, name), getattr(first, name)), name
        assert getattr(again, name).dtype == getattr(first, name).dtype
    assert torch.equal(again.codes.int(), codes)


def test_the_stream_comes_within_half_a_percent_of_the_entropy() -> None:
    symbols, where = scan(0, 500_000, 8)
    tables = rans.tables_of(symbols, where, 61, 8)
    coded = rans.encode(symbols, where, tables)
    joint = np.zeros((8, 61))
    np.add.at(joint, (where, symbols), 1)
    share = joint / joint.sum(1, keepdims=True)
    entropy = -(joint[joint > 0] * np.log2(share[joint > 0])).sum()
    assert entropy <= 8 * (coded.words.nbytes + coded.states.nbytes) <= 1.005 * entropy
    assert rans.cost_bits(symbols, where, tables) == pytest.approx(8 * coded.words.nbytes, rel=2e-3)


@given(at=st.integers(0, 10**6), value=st.integers(0, 255), native=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_damaged_stream_is_found_or_decodes_to_something_without_a_crash(at: int, value: int, native: bool) -> None:
    symbols, where = scan(3, 20_000, 4)
    tables = rans.tables_of(symbols, where, 61, 4)
    coded = rans.encode(symbols, where, tables)
    words = coded.words.copy()
    words.view(np.uint8)[at % words.nbytes] = value
    damaged = rans.Coded(words, coded.states, coded.lengths)
    if (words == coded.words).all():
        return
    try:
        found = rans.decode(damaged, where, tables, native=native)
    except FormError:
        return
    # the code has no redundancy: other words may be another scan's, and telling them apart is the file's checksum's job
    assert (found != symbols).any()


def codes_of(seed: int, shape: tuple[int, int], spread: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    columns = torch.rand(shape[1], generator=g) * spread
    return (torch.randn(shape, generator=g) * columns).round().to(torch.int32)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 300.0, 40_000.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (65, 130), (40, 3)])
def test_codes_and_scales_survive_coding_and_a_file(spread: float, shape: tuple[int, int]) -> None:
    codes = codes_of(1, shape, spread)
    row, column = scale_bytes(torch.rand(shape[0]) + 0.5), scale_bytes(torch.rand(shape[1]) + 0.5)
    weight = EntropyCoded.encode(codes, row, column, step=0.01)
    expected = codes.double() * (scale_values(row).double()[:, None] * scale_values(column).double()) * 0.01
    torch.testing.assert_close(weight.dense().double(), expected, rtol=1e-6, atol=0)
    again = rebuild(json.loads(json.dumps(structure(weight))), weight.state_dict())
    assert torch.equal(again.dense(), weight.dense())
    assert weight.cost().bytes == stored_bytes(weight)
    x = torch.randn(4, shape[1])
    torch.testing.assert_close(
        weight(x), x @ weight.dense().T, rtol=1e-4, atol=1e-4 * float(weight.dense().abs().max() + 1)
    )
    torch.testing.assert_close(weight.T.dense(), weight.dense().T)
    torch.testing.assert_close(weight.T.T(x), weight(x))
    index = torch.tensor([[0, shape[0] - 1]])
    torch.testing.assert_close(weight.rows(index), weight.dense()[index])


def correlated(seed: int, m: int, n: int, tokens: int = 400) -> tuple[torch.Tensor, Statistics]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g) @ torch.randn(n, n, generator=g) / n**0.5
    gradient = torch.rand(m, generator=g).square() + 0.01
    return torch.randn(m, n, generator=g), Statistics(tokens, x.T @ x / tokens, gradient=gradient)


def test_rounding_equals_a_plain_loop_over_columns() -> None:
    matrix, statistics = correlated(0, 12, 100)
    found = Entropy(step=0.05, deadzone=0.0, damp=0.01, shrink=0.1).solve(Dense(matrix), statistics)
    assert isinstance(found, EntropyCoded)
    metric = Metric.of(statistics, (12, 100), damp=0.01, shrink=0.1)
    left, upper = matrix.double().clone(), metric.upper.double()
    steps = scale_values(found.row_scale).double()[:, None] * scale_values(found.column_scale).double() * found.step
    for j in range(100):
        rounded = (left[:, j] / steps[:, j]).round() * steps[:, j]
        left[:, j:] -= ((left[:, j] - rounded) / upper[j, j])[:, None] * upper[j, j:]
        left[:, j] = rounded
    same = (left - found.dense().double()).abs() < 1e-4
    assert same.double().mean() > 0.99  # a tie may fall the other way in float32, and is carried on


def damage(weight: object, matrix: torch.Tensor, statistics: Statistics) -> float:
    d = (weight.dense() - matrix).double()  # type: ignore[attr-defined]
    assert statistics.second_moment is not None
    assert statistics.gradient is not None
    return float(0.5 * (statistics.gradient.double() @ ((d @ statistics.second_moment.double()) * d).sum(1)))


def test_every_bit_asked_for_is_used_and_none_more() -> None:
    matrix, statistics = correlated(1, 256, 192)
    for bits in (1.5, 2.3, 4.0):
        used = 8 * Entropy(bits=bits).solve(Dense(matrix), statistics).cost().bytes / matrix.numel()
        assert 0.99 * bits <= used <= bits


def test_water_filling_beats_equal_steps_at_the_same_bytes() -> None:
    """The two ideas, each switched off in turn: row steps by gradient, column steps and feedback by second moment."""
    matrix, statistics = correlated(2, 256, 192)
    assert statistics.second_moment is not None
    plain_inputs = Statistics(statistics.count, torch.eye(192), gradient=statistics.gradient)
    plain_outputs = Statistics(statistics.count, statistics.second_moment, gradient=torch.ones(256))
    ours, no_inputs, no_outputs = (
        damage(Entropy(bits=3.0).solve(Dense(matrix), s), matrix, statistics)
        for s in (statistics, plain_inputs, plain_outputs)
    )
    assert ours < 0.7 * no_inputs
    assert ours < 0.9 * no_outputs


def test_a_matrix_on_the_grid_is_kept_exactly() -> None:
    statistics = Statistics(10, torch.eye(30))
    first = Entropy(step=0.1, deadzone=0.0).solve(Dense(torch.randn(20, 30)), statistics)
    again = Entropy(step=0.1, deadzone=0.0).solve(Dense(first.dense()), statistics)
    torch.testing.assert_close(again.dense(), first.dense())


def test_zero_inputs_and_zero_matrices_are_solved() -> None:
    statistics = Statistics(10, torch.zeros(30, 30), gradient=torch.zeros(20))
    assert Entropy(step=0.1).solve(Dense(torch.zeros(20, 30)), statistics).dense().abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"bits": 3.0, "step": 1.0}])
def test_bits_or_step_must_be_given(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="either bits or step"):
        Entropy(**options)


def test_an_impossible_rate_says_what_is_needed() -> None:
    with pytest.raises(FormError, match=r"bits 0.1 cannot be met for 8x8"):
        Entropy(bits=0.1).solve(Dense(torch.randn(8, 8)), Statistics(1, torch.eye(8)))


def test_nan_is_named() -> None:
    matrix = torch.ones(8, 8)
    matrix[0, 0] = float("nan")
    with pytest.raises(FormError, match="1 of 64 values"):
        Entropy(bits=4.0).solve(Dense(matrix), Statistics(1, torch.eye(8)))


def test_codes_beyond_a_byte_are_kept_apart() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-5, 6, (40, 24), generator=g)
    codes[3, 7], codes[3, 8], codes[39, 0] = 1000, -129, 40_000
    scales = torch.full((40,), 128, dtype=torch.uint8), torch.full((24,), 130, dtype=torch.uint8)
    weight = EntropyCoded.encode(codes, *scales, step=0.5)
    assert weight.near.dtype == torch.int8
    assert len(weight.far) == 3
    assert torch.equal(weight.codes, codes.int())
    dense = codes.float() * 0.5 * 2 ** (2 / 16)
    assert torch.allclose(weight.dense(), dense, rtol=1e-6)
    x = torch.randn(2, 5, 24, generator=g)
    assert torch.allclose(weight(x), x @ dense.T, rtol=1e-4, atol=1e-2)
    assert torch.allclose(weight.T(x @ dense.T), x @ dense.T @ dense, rtol=1e-4)
    index = torch.tensor([[3, 0], [39, 3]])
    assert torch.equal(weight.rows(index), weight.dense()[index])
    (again,) = [rebuild(structure(weight), weight.state_dict())]
    assert torch.equal(again.codes, weight.codes)
