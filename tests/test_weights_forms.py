"""What each form alone promises, against oracles that share no code with it."""

import itertools
from math import comb

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import FORMS, SQUARE, gradient_matches_dense, hash32_plain, matches_dense
from torch.utils.flop_counter import FlopCounterMode

from pennyweight.errors import FormError, OptionError, ShapeError, UserError
from pennyweight.weights import (
    BlockDiagonal,
    BlockSparse,
    Codebook,
    Dense,
    Diagonal,
    Hadamard,
    Hashed,
    Kronecker,
    LowRank,
    Monarch,
    NofM,
    Permutation,
    Product,
    Quantized,
    RandomBasis,
    Sparse,
    Sum,
    Transposed,
    Weight,
    by_rows,
    forms,
    hashed,
    rebuild,
)
from pennyweight.weights.hashed import hash32
from pennyweight.weights.pattern import Gaps, choice_rank, choices

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 4)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def rounded(matrix: torch.Tensor) -> Quantized:
    return Quantized.nearest(matrix.float(), bits=2)


def left_over(weight: Weight, matrix: torch.Tensor) -> float:
    return float((weight.dense().detach() - matrix).norm())


# --- nothing lost where nothing is compressed


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (Dense, 0),
        (lambda w: LowRank.nearest(w, 6), 1e-13),
        (lambda w: Sparse.keep(w, torch.ones_like(w, dtype=torch.bool)), 0),
        (Sparse.keep, 0),
        (lambda w: NofM.keep(w, torch.ones_like(w, dtype=torch.bool), n=4, m=4), 0),
        (lambda w: BlockSparse.keep(w, torch.ones(3, 2, dtype=torch.bool), block=(2, 4)), 0),
        (lambda w: BlockDiagonal.nearest(w, 1), 0),
        (lambda w: Monarch.nearest(w, blocks=1, rank=6), 1e-13),
        (lambda w: Monarch.nearest(w, blocks=2, rank=3), 1e-13),
        (lambda w: Kronecker.nearest(w, (1, 1)), 1e-13),
        (lambda w: Kronecker.nearest_sum(w, (3, 2), terms=6), 1e-13),
        (lambda w: Hashed.nearest(w, 48), 0),
        (lambda w: Hashed.nearest(w, 50), 0),
        (lambda w: RandomBasis.nearest(w, 48), 1e-10),
        (lambda w: Codebook.nearest(w, bits=6, dtype=torch.float64), 0),
        (lambda w: Product(Permutation(torch.tensor([1, 0, 5, 4, 3, 2])).T, Dense(w[[1, 0, 5, 4, 3, 2]])), 0),
        (lambda w: Product(Diagonal(torch.full((6,), 2.0).double()), Dense(w / 2)), 0),
        (lambda w: Hadamard(Dense(w), Dense(torch.ones_like(w))), 0),
        (lambda w: Sum(rounded(w), Dense(w - rounded(w).dense())), 1e-15),
    ],
)
def test_at_zero_compression_nothing_is_lost(make, tolerance):
    matrix = torch.from_numpy(
        np.random.default_rng(0).choice(np.linspace(-1, 1, 60).astype(np.float32), (6, 8))
    ).double()
    assert make(matrix).error(matrix) <= tolerance


# --- the dtype is read off, not computed


def test_the_dtype_needs_no_matrix(generator, monkeypatch):
    drawn = [form(generator, 4, 4)[0] for form in FORMS + SQUARE]
    mixed = Sum(Product(drawn[-1], LowRank(normal(0, 4, 2).bfloat16(), normal(1, 2, 4).bfloat16())), drawn[-1])
    assert mixed.dense().dtype == torch.bfloat16  # a permutation follows its neighbors
    wanted = [weight.dense().dtype for weight in [*drawn, mixed]]

    def refuse(*_: object) -> None:
        raise AssertionError("made the matrix to find its dtype")

    for cls in forms().values():
        monkeypatch.setattr(cls, "dense", refuse)
    assert [weight.dtype for weight in [*drawn, mixed]] == wanted


# --- products in pieces


@pytest.mark.parametrize("piece", [1, 10, 35])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_products_in_pieces_equal_the_plain_one(form, piece, generator, monkeypatch):
    weight, matrix = form(generator, 7, 5)
    monkeypatch.setattr(by_rows, "PIECE", piece)
    matches_dense(weight, matrix)
    gradient_matches_dense(weight, matrix)
    x, out = normal(2, 3, 5), by_rows.by_rows(weight, normal(2, 3, 5))
    torch.testing.assert_close(out, x @ matrix.T, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(by_rows.by_rows(weight, x), out)


# --- low rank


@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(0, 12), seed=SEEDS)
def test_low_rank_error_is_exactly_the_discarded_singular_values(m, n, rank, seed):
    matrix = exact(seed, m, n)
    discarded = scipy.linalg.svdvals(matrix.numpy())[rank:]
    # equality, not a bound (Eckart-Young): a merely good factorization fails here
    found = left_over(LowRank.nearest(matrix, rank), matrix)
    np.testing.assert_allclose(found, np.linalg.norm(discarded), rtol=1e-9, atol=1e-12)


def test_a_rank_below_zero_is_refused():
    with pytest.raises(OptionError, match=r"rank -1; give 0 \(nothing\) to 2 \(all of it\)"):
        LowRank.nearest(torch.ones(2, 3), -1)
    with pytest.raises(ShapeError, match=r"up \(2, 3\) and down \(2, 3\) share no rank"):
        LowRank(torch.ones(2, 3), torch.ones(2, 3))


# --- sparse patterns


def read_gaps(gaps: Gaps, size: int) -> list[bool]:
    """The mask that the documented code stands for, one code after the other."""
    bits = np.unpackbits(gaps.packed.numpy(), bitorder="little")[: gaps.length * gaps.bits].reshape(-1, gaps.bits)
    mask, place = [False] * size, 0
    for code in (bits << np.arange(gaps.bits)).sum(1):
        place += int(code)
        if code != 2**gaps.bits - 1:
            mask[place] = True
            place += 1
    return mask


@given(size=st.integers(1, 600), density=st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.5, 0.9, 1.0]), seed=SEEDS)
def test_gaps_say_which_places_are_kept(size, density, seed):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density
    gaps = Gaps.of(mask)
    assert read_gaps(gaps, size) == mask.tolist()
    assert gaps.places().tolist() == mask.nonzero()[:, 0].tolist()
    assert gaps.packed.numel() <= -(-size // 8)  # never more than a bitmap


@pytest.mark.parametrize("density", [0.5, 0.3, 0.2, 0.1, 0.05, 0.02])
def test_a_pattern_takes_little_more_than_its_entropy(density):
    mask = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) < density
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    assert 8 * Gaps.of(mask).packed.numel() < 1.12 * 200_000 * entropy
    if density < 0.1:  # column indices of 10 bits and more would take
        assert Gaps.of(mask).packed.numel() < 0.8 * mask.sum() * 10 / 8


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (2, 4), (4, 8), (3, 3), (1, 256)])
def test_choices_are_ranked_one_by_one(n, m):
    every = choices(n, m)
    assert sorted(map(tuple, every.tolist())) == sorted(itertools.combinations(range(m), n))
    assert choice_rank(every).tolist() == list(range(comb(m, n)))


def test_two_of_four_takes_three_bits_a_group():
    matrix = normal(0, 16, 64)
    top = matrix.abs().view(16, 16, 4).topk(2).indices
    mask = torch.zeros(16, 16, 4, dtype=torch.bool).scatter(2, top, True).flatten(1)
    weight = NofM.keep(matrix, mask, n=2, m=4)
    assert weight.cost().bytes == 16 * 32 * 4 + 16 * 16 * 3 // 8
    assert torch.equal(weight.mask(), mask)
    assert torch.equal(weight.places(), top.sort(-1).values)
    packed = weight.with_values(Quantized.nearest(weight.values.dense(), bits=4, group_size=32))
    assert packed.cost().bytes == 16 * (32 * 4 // 8 + 2 + 1 + 6)
    assert torch.equal(packed.mask(), mask)


def test_a_group_that_keeps_too_many_is_refused():
    with pytest.raises(FormError, match="the mask keeps 3 in some group of 4; give a mask that keeps 2 or fewer"):
        NofM.keep(torch.ones(1, 4), torch.tensor([[True, True, True, False]]), n=2, m=4)
    fewer = NofM.keep(torch.ones(1, 4), torch.tensor([[False, False, False, True]]), n=2, m=4)
    assert fewer.dense().tolist() == [[0, 0, 0, 1]]
    with pytest.raises(OptionError, match="5 of 4"):
        NofM.keep(torch.ones(1, 4), torch.ones(1, 4).bool(), n=5, m=4)


def test_patterns_that_do_not_fit_are_refused():
    weight = Sparse.keep(torch.eye(4))
    with pytest.raises(FormError, match="the pattern keeps 4 up to place 15, for 3 values of 16"):
        weight.with_values(Dense(torch.ones(1, 3)))
    with pytest.raises(FormError, match="for 4 values of 12"):
        Sparse(weight.pattern, weight.values, **(weight.settings() | {"rows": 3}))
    with pytest.raises(ShapeError, match=r"mask \(4,\) for a matrix \(4, 4\)"):
        Sparse.keep(torch.eye(4), torch.ones(4).bool())
    with pytest.raises(ShapeError, match=r"blocks \(3, 2\) do not divide \(4, 4\)"):
        BlockSparse.keep(torch.eye(4), torch.ones(1, 2).bool(), block=(3, 2))
    broken = NofM.keep(torch.ones(1, 16), torch.ones(1, 16).bool(), n=8, m=8)
    bad = NofM.keep(torch.ones(2, 32), torch.tensor([True, False]).repeat(2, 16), n=8, m=16)
    with pytest.raises(FormError, match="some groups of the pattern do not keep 8 of 16"):
        NofM(torch.zeros_like(bad.pattern), bad.values, **bad.settings())
    assert broken.cost().bytes == 64 + 1


def test_kept_is_what_is_there():
    weight = Sparse.keep(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    assert (weight.kept, weight.mask().tolist()) == (2, [[False, True], [True, False]])
    blocks = BlockSparse.keep(torch.ones(4, 4), torch.tensor([[True, False], [False, False]]), block=(2, 2))
    assert (blocks.kept, blocks.mask().tolist()) == (1, [[True, False], [False, False]])


# --- structured forms


@given(k=SIDES, into=SIDES, s=SIDES, p=SIDES, rank=SIDES, seed=SEEDS)
def test_monarch_error_is_exactly_what_its_sub_blocks_discard(k, into, s, p, rank, seed):
    matrix, rank = exact(seed, s * into, p * k), min(rank, s, p)
    weight = Monarch.nearest(matrix, blocks=(k, into), rank=rank)
    discarded = [
        scipy.linalg.svdvals(matrix.numpy()[part::into, block * p : (block + 1) * p])[rank:]
        for part, block in itertools.product(range(into), range(k))
    ]
    wanted = np.linalg.norm(np.concatenate(discarded))
    np.testing.assert_allclose(left_over(weight, matrix), wanted, rtol=1e-9, atol=1e-12)
    again = Monarch.nearest(weight.dense().detach(), blocks=(k, into), rank=rank)
    np.testing.assert_allclose(again.dense().detach(), weight.dense().detach(), atol=1e-9)


@pytest.mark.parametrize("n", [16, 64])
def test_the_discrete_cosine_sums_need_monarch_and_not_low_rank(n):
    """Cosines of the Fourier matrix, the digits of its columns reversed: sub-blocks of rank two, not one, as real."""
    side = int(n**0.5)
    index = torch.arange(n)
    fourier = torch.cos(2 * torch.pi * (index[:, None] * index % n).double() / n)
    dealt = fourier[:, index.view(side, side).T.reshape(-1)]
    monarch = Monarch.nearest(dealt, blocks=side, rank=2)
    same_size = LowRank.nearest(dealt, 2 * side // 2)
    assert same_size.cost().params <= monarch.cost().params
    assert monarch.error(dealt) < 1e-6 < 0.3 < same_size.error(dealt)
    assert Monarch.nearest(fourier, blocks=side, rank=2).error(fourier) > 0.3  # the order matters


@given(m1=SIDES, n1=SIDES, m2=SIDES, n2=SIDES, terms=st.integers(1, 5), seed=SEEDS)
def test_kronecker_error_is_exactly_the_discarded_singular_values(m1, n1, m2, n2, terms, seed):
    matrix = exact(seed, m1 * m2, n1 * n2)
    blocks = [matrix[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2].reshape(-1) for i in range(m1) for j in range(n1)]
    discarded = scipy.linalg.svdvals(torch.stack(blocks).numpy())
    weight = Kronecker.nearest_sum(matrix, (m1, n1), terms=terms)
    np.testing.assert_allclose(left_over(weight, matrix), np.linalg.norm(discarded[terms:]), rtol=1e-9, atol=1e-12)
    one = Kronecker.nearest(matrix, (m1, n1))
    np.testing.assert_allclose(left_over(one, matrix), np.linalg.norm(discarded[1:]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shapes", [((2, 9), (5, 3)), ((9, 2), (3, 5)), ((4, 4), (1, 8))])
def test_kronecker_takes_the_cheaper_side_first_both_ways(shapes):
    weight = Kronecker(normal(0, *shapes[0]), normal(1, *shapes[1]))
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        weight(normal(2, 1, weight.shape[1]))
    with torch.no_grad(), FlopCounterMode(display=False) as left:
        weight.left(normal(2, 1, weight.shape[0]))
    assert forward.get_total_flops() == weight.cost().flops
    assert left.get_total_flops() == weight.T.cost().flops


def test_the_nearest_block_diagonal_keeps_the_blocks():
    matrix = normal(0, 6, 9)
    wanted = torch.block_diag(matrix[:2, :3], matrix[2:4, 3:6], matrix[4:, 6:])
    assert torch.equal(BlockDiagonal.nearest(matrix, 3).dense(), wanted)


def test_an_armor_of_blocks_is_one_expression():
    """A(W * mask)B with block-diagonal sides: quantized core, trained sides, all laws by the parts."""
    mask = torch.tensor([True, True, False, False]).repeat(8, 2)
    core = NofM.keep(normal(0, 8, 8), mask, n=2, m=4)
    weight = Product(BlockDiagonal(normal(1, 2, 4, 4)), core, BlockDiagonal(normal(2, 4, 2, 2)))
    matrix = torch.block_diag(*normal(1, 2, 4, 4)) @ (normal(0, 8, 8) * mask) @ torch.block_diag(*normal(2, 4, 2, 2))
    matches_dense(weight, matrix)
    assert weight.cost().flops == 2 * (8 * 4 + 64 + 8 * 2)


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (
            ShapeError,
            r"\(2, 2\) does not divide the shape \(3, 4\)",
            lambda: BlockDiagonal.nearest(torch.ones(3, 4), 2),
        ),
        (ShapeError, "share no middle", lambda: Monarch(torch.ones(2, 3, 4), torch.ones(2, 4, 2))),
        (OptionError, r"rank 3 of sub-blocks \(2, 2\)", lambda: Monarch.nearest(torch.ones(4, 4), blocks=2, rank=3)),
        (ShapeError, r"\(2, 1\) does not divide", lambda: Kronecker.nearest(torch.ones(3, 4), (2, 1))),
        (OptionError, "0 terms", lambda: Kronecker.nearest_sum(torch.ones(4, 4), (2, 2), terms=0)),
        (FormError, "index is not each of 0 to 2 once", lambda: Permutation(torch.tensor([0, 2, 2]))),
        (FormError, "index is not each of 0 to 1 once", lambda: Permutation(torch.tensor([1, 2]))),
        (ShapeError, "a torch.float32 index", lambda: Permutation(torch.ones(3))),
        (ShapeError, r"shape \(2, 2\); give \(features,\)", lambda: Diagonal(torch.ones(2, 2))),
        (FormError, "diagonal is torch.int64", lambda: Diagonal(torch.ones(2, dtype=torch.long))),
        (FormError, "matrix is torch.int64; give 16, 32 or 64 bits", lambda: Dense(torch.ones(2, 2).long())),
        (FormError, "matrix is torch.float8_e4m3fn", lambda: Dense(torch.ones(2, 2).to(torch.float8_e4m3fn))),
        (
            FormError,
            "Dense: matrix: 2 of 4 values are NaN",
            lambda: Dense(torch.tensor([[0, torch.nan], [torch.inf, 0]])),
        ),
        (ShapeError, r"shape \(3,\) is not a matrix", lambda: Dense(torch.ones(3))),
        (ShapeError, r"\(0, 3\) is not \(out, in\)", lambda: Dense(torch.ones(0, 3))),
        (
            ShapeError,
            r"terms of shapes \(2, 2\), \(2, 3\)",
            lambda: Sum(Dense(torch.ones(2, 2)), Dense(torch.ones(2, 3))),
        ),
        (ShapeError, r"terms of shapes \(none\)", Hadamard),
        (ShapeError, r"\(2, 2\) @ \(3, 2\) do not", lambda: Product(Dense(torch.ones(2, 2)), Dense(torch.ones(3, 2)))),
        (FormError, "sum transposes term by term", lambda: Transposed(Sum(Dense(torch.ones(2, 2))))),
        (OptionError, "seed -1", lambda: Hashed(torch.ones(3), rows=1, columns=1, seed=-1)),
        (OptionError, "scale 0", lambda: Hashed(torch.ones(3), rows=1, columns=1, scale=0.0)),
        (ShapeError, "at least one", lambda: RandomBasis(torch.ones(0), rows=1, columns=1)),
        (ShapeError, r"shape \(0, 3\)", lambda: Hashed(torch.ones(3), rows=0, columns=3)),
    ],
)
def test_what_no_form_can_hold_is_refused_in_words(error, words, make):
    with pytest.raises(error, match=words):
        make()


# --- hashed forms


def test_the_hash_is_that_of_32_bit_words():
    x = np.random.default_rng(0).integers(0, 2**32, 10_000)
    np.testing.assert_array_equal(hash32(torch.from_numpy(x)).numpy(), hash32_plain(x))


@given(m=st.integers(1, 8), n=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 2**64 - 1))
def test_shared_values_are_used_equally_often_and_fitted_by_least_squares(m, n, count, seed):
    shown = Hashed(torch.arange(1.0, count + 1), rows=m, columns=n, seed=seed).dense().detach()
    uses = np.bincount(shown.abs().long().flatten().numpy() - 1, minlength=count)
    assert uses.max() - uses.min() <= 1
    matrix = exact(seed % 1000, m, n)
    design = np.zeros((m * n, count))
    design[np.arange(m * n), shown.abs().long().flatten() - 1] = shown.sign().flatten()
    best = np.linalg.lstsq(design, matrix.numpy().reshape(-1), rcond=None)[0]
    found = Hashed.nearest(matrix, count, seed=seed)
    np.testing.assert_allclose(found.dense().detach().numpy().reshape(-1), design @ best, atol=1e-9)


def test_layers_that_share_values_take_up_where_the_last_one_ended():
    values = torch.nn.Parameter(normal(0, 40))
    first, second = (Hashed(values, rows=4, columns=5, seed=9, offset=offset) for offset in (0, 20))
    both = Hashed(values, rows=8, columns=5, seed=9)
    assert torch.equal(torch.cat([first.dense(), second.dense()]), both.dense())
    assert first.values is second.values


def test_seeds_and_signs_differ():
    one, other = (Hashed(torch.arange(1.0, 2049), rows=64, columns=64, seed=seed).dense().detach() for seed in (0, 1))
    assert 0.45 < float((one > 0).float().mean()) < 0.55
    assert float((one == other).float().mean()) < 0.01
    flat = one.flatten()
    # the second stretch pairs places with those of the first in an order of its own
    assert (flat[:2048].abs() == flat[2048:].abs()).float().mean() < 0.01


def test_hashed_values_lie_where_they_lay_yesterday():
    """Places and signs are part of the file format: these figures may never change."""
    found = Hashed(torch.arange(1.0, 8), rows=2, columns=7, seed=2**40 + 3).dense().int().tolist()
    assert found == HASHED_PLACES


HASHED_PLACES = [[3, -2, 1, 7, 6, -5, -4], [-4, 7, 3, -6, -2, 5, -1]]


def basis_plain(seed: int, which: int, count: int, size: int) -> np.ndarray:
    """A random basis in 32-bit arithmetic."""
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)

    def mix(word: np.ndarray) -> np.ndarray:
        return hash32_plain(np.atleast_1d(word))

    with np.errstate(over="ignore"):
        add = mix(mix(mix(low + np.uint32(which)) ^ high))
        factor = (mix(add + np.uint32(0x9E3779B9)) | np.uint32(1)) & np.uint32(0x7FFFFFFF)
        words = mix(np.arange(size, dtype=np.uint32) * factor + add)
    return ((words >> np.uint32(8)) * 2.0**-23 - 1) / np.sqrt(count)


@given(seed=st.integers(0, 2**64 - 1), count=st.integers(1, 5))
@settings(max_examples=25)
def test_random_bases_are_the_documented_numbers(seed, count):
    weight = RandomBasis(torch.ones(count), rows=3, columns=5, seed=seed)
    wanted = np.stack([basis_plain(seed, which, count, 15) for which in range(count)]).reshape(count, 3, 5)
    np.testing.assert_allclose(weight.bases().numpy(), wanted, rtol=1e-6)


def test_random_bases_look_random():
    bases = RandomBasis(torch.ones(64), rows=64, columns=64).bases().flatten(1) * 8  # as if unscaled
    assert abs(float(bases.mean())) < 0.01
    assert abs(float(bases.var()) - 1 / 3) < 0.005
    overlap = (bases @ bases.T / 4096 * 3) - torch.eye(64)
    assert float(overlap.abs().max()) < 6 / 64  # six standard deviations of 2016 pairs
    shifted = (bases[:, 1:] * bases[:, :-1]).mean() * 3
    assert abs(float(shifted)) < 0.01


def test_random_bases_are_made_in_pieces_as_in_one(monkeypatch):
    weight = RandomBasis(normal(0, 9), rows=4, columns=5)
    whole = weight.dense()
    (gradient,) = torch.autograd.grad((whole * normal(1, 4, 5)).sum(), weight.coefficients)
    monkeypatch.setattr(hashed, "_CHUNK", 40)
    made, sizes = hashed.random_bases, []

    def watched(seed: int, start: int, stop: int, count: int, size: int, device: torch.device) -> torch.Tensor:
        sizes.append((stop - start) * size)
        return made(seed, start, stop, count, size, device)

    monkeypatch.setattr(hashed, "random_bases", watched)
    (in_pieces,) = torch.autograd.grad((weight.dense() * normal(1, 4, 5)).sum(), weight.coefficients)
    assert sizes == [40, 40, 40, 40, 20] * 2
    torch.testing.assert_close(weight.dense(), whole)
    torch.testing.assert_close(in_pieces, gradient)
    torch.testing.assert_close(gradient, torch.einsum("kmn,mn->k", weight.bases(), normal(1, 4, 5)))


@given(count=st.integers(1, 12), seed=SEEDS)
@settings(max_examples=20)
def test_coefficients_are_fitted_by_least_squares(count, seed):
    matrix = exact(seed, 2, 5)
    weight = RandomBasis.nearest(matrix, count, seed=seed)
    bases = np.stack([basis_plain(seed, which, count, 10) for which in range(count)]).T
    best = bases @ np.linalg.lstsq(bases, matrix.numpy().reshape(-1), rcond=None)[0]
    np.testing.assert_allclose(weight.dense().detach().numpy().reshape(-1), best, atol=1e-4)


# --- files that say anything


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=5) | st.sampled_from(list(forms())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["form", "tensors", "parts", "bits", "columns", "rows", "group_size", "zero_kind", "format", "n", "m", "block"]
KEYS += ["length", "seed", "offset", "scale", "step", "edges", "lowest"]


@settings(max_examples=300)
@given(form=st.sampled_from(list(forms())), found=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6), seed=SEEDS)
def test_any_structure_is_read_or_refused_in_words(form, found, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for cls in forms().values():
        for name in cls.tensors:
            shape = tuple(
                torch.randint(0, 4, (int(torch.randint(0, 4, (1,), generator=generator)),), generator=generator)
            )
            tensors[name] = torch.randint(0, 256, [int(side) for side in shape], generator=generator).to(torch.uint8)
            if seed % 2:
                tensors[name] = tensors[name].float()
    try:
        rebuild({"form": form, **found}, tensors, "layers.3")
    except UserError as error:
        assert str(error).startswith("layers.3")  # noqa: PT017


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_setting_of_another_kind_is_refused_in_words(form, generator):
    from pennyweight.weights import structure

    weight, _ = form(generator, 6, 10)
    shape = structure(weight)
    anything_goes = {"seed", "scale", "step", "lowest"}  # of numbers
    # nothing in the tensors contradicts these
    large_goes = anything_goes | {"group_size", "rows", "columns", "offset", "max_rows"}
    for key in weight.settings():
        for wrong in ("x", [], -7, 10**9):
            if wrong == shape[key] or (isinstance(wrong, int) and key in (anything_goes if wrong < 0 else large_goes)):
                continue
            with pytest.raises(UserError, match=r"^layers\.3"):
                rebuild({**shape, key: wrong}, weight.state_dict(), "layers.3")
