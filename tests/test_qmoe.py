"""quantize.qmoe and its code: lossless, of the official rate, and GPTQ as a plain loop does it."""

import itertools

import numpy as np
import pytest
import torch
from families import build, inputs
from hypothesis import given, settings
from hypothesis.strategies import floats, integers
from problems import objective, problem

from pennyweight import calibrate, model
from pennyweight.errors import FormError, OptionError, ShapeError
from pennyweight.lever import make
from pennyweight.levers.quantize.qmoe import QMoE
from pennyweight.model.experts import split_experts
from pennyweight.statistics import Statistics
from pennyweight.weights import Dense, DictionaryCoded, Quantized
from pennyweight.weights.dictionary import WORDS, _dictionary


def symbols(rows: int, columns: int, zeros: float, seed: int = 0) -> torch.Tensor:
    """Independent ternary symbols, 1 and 2 equally frequent."""
    u = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (u >= zeros).long() + (u >= zeros + (1 - zeros) / 2)


# --- the code


@given(rows=integers(1, 9), columns=integers(1, 90), zeros=floats(0, 1), seed=integers(0, 2**31))
def test_decoding_gives_the_codes_back(rows, columns, zeros, seed):
    codes = symbols(rows, columns, zeros, seed)
    for told in (None, 334, 885, 999):
        found = DictionaryCoded.encode(codes, torch.ones(rows, 2), zeros=told)
        assert torch.equal(found.codes().long(), codes)
        index = torch.tensor([rows - 1, 0, rows - 1])
        assert torch.equal(found.codes(index).long(), codes[index])


def test_decoding_agrees_with_reading_word_by_word():
    codes = symbols(5, 131, 0.8)
    coded, table = DictionaryCoded.encode(codes, torch.ones(5, 2)), _dictionary(800)
    words = iter((coded.words.long() & 0xFFFF).tolist())
    for row, count in enumerate(coded.counts.tolist()):
        read = [
            s for word in itertools.islice(words, count) for s in table.symbols[word, : table.lengths[word]].tolist()
        ]
        assert read[:131] == codes[row].tolist()


@pytest.mark.parametrize(
    ("zeros", "bits", "entropy"),
    [(0.85, 0.876, 0.760), (0.885, 0.735, 0.630), (0.9, 0.685, 0.569), (0.95, 0.590, 0.336)],
)
def test_rate_of_the_dictionary_of_the_source(zeros, bits, entropy):
    codes = symbols(60, 5600, zeros)
    coded = DictionaryCoded.encode(codes, torch.ones(60, 2), zeros=885)
    rate = 16 * coded.words.numel() / codes.numel()
    assert rate == pytest.approx(bits, abs=0.005)
    assert rate > max(entropy, 16 / 28)


def test_a_third_and_more_below_plain_packing_with_everything_counted():
    codes = symbols(100, 3072, 0.885)
    coded = DictionaryCoded.encode(codes, torch.ones(100, 2).half())
    five_in_a_byte = 8 / 5 * codes.numel() / 8 + coded.levels.nbytes
    assert five_in_a_byte / coded.cost().bytes >= 2  # the source's own 0.8 bits against 1.6


@pytest.mark.parametrize("zeros", [334, 885, 999])
def test_dictionary_is_the_most_probable_words_and_holds_every_prefix(zeros):
    table = _dictionary(zeros)
    words = {tuple(s[:n]) for s, n in zip(table.symbols.tolist(), table.lengths.tolist(), strict=True)}
    assert len(words) == WORDS
    assert all(word[:-2] in words or len(word) == 2 for word in words)
    assert {pair for pair in words if len(pair) == 2} == set(itertools.product(range(3), repeat=2))
    zero, other = np.log(zeros / 1000), np.log((1 - zeros / 1000) / 2)

    def worth(word):
        return sum(other if symbol else zero for symbol in word)

    least = min(worth(word) for word in words if len(word) > 2)
    for word in list(words)[::997]:
        for pair in itertools.product(range(3), repeat=2):
            longer = word + pair
            assert longer in words or len(longer) > 28 or worth(longer) <= least + 1e-4


def test_damaged_streams_are_refused():
    coded = DictionaryCoded.encode(symbols(3, 40, 0.9), torch.ones(3, 2))
    given_back = {"columns": 40, "zeros": coded.zeros}
    with pytest.raises(FormError, match="counts do not fit the words"):
        DictionaryCoded(coded.words[:-1], coded.counts, coded.levels, **given_back)
    with pytest.raises(FormError, match="some rows are no 40 symbols"):
        DictionaryCoded(torch.zeros_like(coded.words), coded.counts, coded.levels, **given_back)
    with pytest.raises(FormError, match="zeros = 3 in a thousand; give 334 to 999"):
        DictionaryCoded(coded.words, coded.counts, coded.levels, columns=40, zeros=3)
    with pytest.raises(FormError, match="whole numbers 0, 1 and 2"):
        DictionaryCoded.encode(torch.tensor([[3]]), torch.ones(1, 2))


@pytest.mark.parametrize(("columns", "dtype"), [(65534, torch.int16), (65535, torch.int32)])
def test_counts_would_hold_a_row_of_nothing_but_pairs(columns, dtype):
    codes = torch.zeros(1, columns, dtype=torch.int64)
    codes[0, -1] = 2
    found = DictionaryCoded.encode(codes, torch.ones(1, 2))
    assert found.counts.dtype == dtype
    assert -(-columns // 2) <= torch.iinfo(dtype).max
    assert torch.equal(found.codes().long(), codes)


# --- the solver


def gptq_loop(matrix, moment, levels, damping):
    """Column by column in double, from the inverse of the second moment of the columns left."""
    left, h = matrix.double().clone(), moment.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    out = torch.empty_like(left)
    for column in range(left.shape[1]):
        inverse = torch.linalg.inv(h[column:, column:])
        nearest = (left[:, column, None] - levels.double()).abs().argmin(1, keepdim=True)
        out[:, column] = levels.double().gather(1, nearest)[:, 0]
        error = (left[:, column] - out[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("width", [40, 150])  # 150: more than one block of columns
@pytest.mark.parametrize("bits", [1.5, 2])
def test_is_gptq_on_the_values_of_a_row(bits, width):
    matrix, statistics = problem(20, width)
    if bits == 2:
        values = Quantized.nearest(matrix, bits=2).grid
        levels = torch.stack([values.values(torch.full((20, 1), c, dtype=torch.uint8))[:, 0] for c in range(4)], 1)
    else:
        levels = torch.stack([matrix.amin(1), torch.zeros(20), matrix.amax(1)], 1).half().float()
    found = QMoE(bits=bits).solve(Dense(matrix), statistics).dense().detach()
    wanted = gptq_loop(matrix, statistics.second_moment, levels, 0.1).float()
    # a weight between two values may fall to either in single precision, and takes later ones with it
    assert ((found - wanted).abs() < 1e-6).float().mean() > 0.98


@pytest.mark.parametrize("bits", [1.5, 2])
def test_a_batch_of_experts_is_each_expert_alone(bits):
    cases = [problem(12, 48, seed=seed) for seed in range(3)]
    cases.append((cases[0][0], Statistics(second_moment=torch.eye(48))))  # nobody was sent to this one
    found = QMoE(bits=bits).solve_experts([Dense(m) for m, _ in cases], [s for _, s in cases])
    for one, (matrix, statistics) in zip(found, cases, strict=True):
        alone = QMoE(bits=bits).solve(Dense(matrix), statistics)
        assert (one.dense() == alone.dense()).float().mean() > 0.99


@settings(max_examples=20)
@given(seed=integers(0, 2**31))
def test_making_errors_good_beats_rounding_and_four_values_beat_three(seed):
    matrix, statistics = problem(24, 64, seed=seed)
    unknown = Statistics(second_moment=torch.eye(64))
    ternary, plain, wide = (
        objective(QMoE(bits=bits).solve(Dense(matrix), known).dense(), matrix, statistics.second_moment)
        for bits, known in ((1.5, statistics), (1.5, unknown), (2, statistics))
    )
    assert wide < ternary < plain


@pytest.mark.parametrize("moment", [torch.zeros(30, 30), torch.eye(30), torch.ones(30, 30)])
def test_without_tokens_or_with_a_singular_moment_it_rounds_to_nearest(moment):
    matrix, _ = problem(8, 30)
    low, high = (part.half().float()[:, None] for part in (matrix.amin(1), matrix.amax(1)))
    wanted = torch.where(matrix > high / 2, high, torch.where(matrix < low / 2, low, 0.0))
    damping = 0.0 if moment[0, 1] else 0.1  # a moment of rank one is singular without damping
    assert torch.equal(QMoE(damping=damping).solve(Dense(matrix), Statistics(second_moment=moment)).dense(), wanted)


def test_rows_of_one_sign_and_of_zeros():
    matrix = torch.stack([torch.linspace(0.1, 1, 20), -torch.linspace(0.1, 1, 20), torch.zeros(20)])
    found = QMoE().solve(Dense(matrix), Statistics(second_moment=torch.eye(20))).dense()
    assert set(found[0].tolist()) == {0.0, 1.0}
    assert set(found[1].tolist()) == {0.0, -1.0}
    assert not found[2].any()


@pytest.mark.parametrize("activation_bytes", [1 << 14, 1 << 28])
def test_experts_streamed_from_disk_are_those_solved_in_memory(activation_bytes, tmp_path):
    build("mixtral").save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    ids, passes = inputs("mixtral")["input_ids"], []

    def solve(found, weight, statistics):
        return QMoE().solve(Dense(weight.dense().float()), statistics) if "experts" in found.role else None

    options = {"activation_bytes": activation_bytes, "dtype": torch.float32}
    calibrate.stream(
        tmp_path / "checkpoint", tmp_path / "out", ids, solve, finished=lambda s: passes.append(s.passes), **options
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3  # a shard a block, and what lies outside
    assert (max(passes) > 1) == (activation_bytes == 1 << 14)  # little room: a block is run once more
    whole = model.load(tmp_path / "checkpoint")
    split_experts(whole.module)
    calibrate.walk(whole, ids, solve, **options)
    found, wanted = model.load(tmp_path / "out").module.state_dict(), whole.module.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    coded = [name for name in found if name.endswith("weight.words")]
    assert len(coded) == 2 * 4 * 3


def test_what_does_not_fit_is_refused_with_the_remedy():
    with pytest.raises(OptionError, match=r"zeros = 0.9 has no effect on 2-bit weights"):
        make("quantize.qmoe", {"bits": 2, "zeros": 0.9})
    with pytest.raises(OptionError, match=r"bits = 3 is out of range; give one of 1.5, 2"):
        make("quantize.qmoe", {"bits": 3})
    with pytest.raises(ShapeError, match="give weights of one shape, and statistics for each"):
        QMoE().solve_experts([Dense(torch.ones(2, 4))], [])
