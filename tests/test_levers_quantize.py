"""quantize.rtn, quantize.gptq and quantize.embedding against plain references, closed forms and each other."""

import pytest
import torch
from problems import objective, problem
from reference.gptq import gptq

from pennyweight.errors import DataError, FormError, OptionError, ShapeError
from pennyweight.lever import make
from pennyweight.levers.factorize.svd import SVD
from pennyweight.levers.prune.magnitude import Magnitude
from pennyweight.levers.quantize.embedding import Embedding
from pennyweight.levers.quantize.gptq import GPTQ
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.weights import Dense, Product, Quantized, Sparse, Sum

IDENTITY = {"act_order": False, "static_groups": False}


@pytest.mark.parametrize(
    ("ours", "official"),
    [
        # the official code leaves the errors of a block out of the grids of its later groups: a block is a group here
        ({"group_size": 128, **IDENTITY}, {"group_size": 128}),
        ({"group_size": 32, **IDENTITY}, {"group_size": 32, "block": 32}),
        ({"group_size": None, **IDENTITY}, {}),
        ({"group_size": None}, {"act_order": True}),
        ({"group_size": 64}, {"group_size": 64, "act_order": True, "static_groups": True}),
        ({"group_size": 100, "act_order": False}, {"group_size": 100, "static_groups": True}),
        (
            {"group_size": 64, "damping": 0.1},
            {"group_size": 64, "act_order": True, "static_groups": True, "damping": 0.1},
        ),
    ],
)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dead", [0, 9])
def test_gptq_agrees_with_the_official_algorithm(ours, official, bits, dead):
    matrix, statistics = problem(48, 256, dead=dead)
    moment = statistics.second_moment
    found = GPTQ(bits=bits, **ours).solve(Dense(matrix), statistics).dense()
    expected = gptq(matrix, moment, bits=bits, **official)
    assert objective(found, matrix, moment) == pytest.approx(objective(expected, matrix, moment), rel=1e-3)
    # weights beside a rounding boundary may fall to either side, and move those after them
    assert torch.isclose(found, expected, rtol=1e-5, atol=1e-8).float().mean() > 0.98


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero": "none"},
        {"zero": "float", "bits": 3},
        {"group_size": 40},
        {"group_size": None, "bits": 8},
        {"search": 6, "scale_bits": 8},
        {"bits": 4, "format": "e2m1", "zero": "none"},
    ],
)
def test_gptq_without_correlation_is_rounding_to_nearest(options, act_order):
    matrix, _ = problem(20, 96)
    statistics = Statistics(second_moment=3 * torch.eye(96))
    plain = RTN(**{"group_size": 32, **options}).solve(Dense(matrix), NO_STATISTICS)
    for static in [True] if act_order or "scale_bits" in options else [True, False]:
        lever = GPTQ(**{"group_size": 32, **options}, act_order=act_order, static_groups=static)
        assert torch.equal(lever.solve(Dense(matrix), statistics).dense(), plain.dense())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"zero": "float"}, {"zero": "none"}, {"bits": 2}, IDENTITY, {"search": 8}])
def test_gptq_beats_rounding_on_correlated_inputs(options, seed):
    matrix, statistics = problem(32, 128, seed=seed)
    settings = {"group_size": 32, **options}
    ours = GPTQ(**settings).solve(Dense(matrix), statistics)
    plain = {k: v for k, v in settings.items() if k not in IDENTITY}
    rounded = RTN(**plain).solve(Dense(matrix), statistics)
    errors = [objective(w.dense(), matrix, statistics.second_moment) for w in (ours, rounded)]
    assert errors[0] < 0.8 * errors[1]
    assert ours.cost() == rounded.cost()


def test_gptq_on_the_grid_is_exact():
    matrix, statistics = problem(8, 64)
    on_grid = RTN(group_size=16).solve(Dense(matrix), NO_STATISTICS).dense().detach()
    assert torch.equal(GPTQ(group_size=16).solve(Dense(on_grid), statistics).dense(), on_grid)


def test_importance_of_the_inputs_lowers_the_error_that_they_see():
    matrix, statistics = problem(64, 128)
    diagonal = torch.diag(torch.diag(statistics.second_moment))
    errors = [
        objective(
            RTN(bits=3, group_size=64, search=24, importance=kind).solve(Dense(matrix), statistics).dense(),
            matrix,
            diagonal,
        )
        for kind in ("none", "inputs")
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 33), (2, 129)])
@pytest.mark.parametrize("static", [True, False])
def test_gptq_of_small_and_odd_shapes(shape, static):
    matrix, statistics = problem(*shape)
    kept = matrix.clone()
    found = GPTQ(bits=8, group_size=16, act_order=False, static_groups=static).solve(Dense(matrix), statistics)
    assert found.shape == shape
    torch.testing.assert_close(found.dense(), matrix, rtol=0, atol=2e-3)
    assert torch.equal(matrix, kept)


def test_rtn_keeps_the_structure_of_what_it_rounds():
    matrix, statistics = problem(32, 64)
    sparse = Magnitude(sparsity=0.5).solve(Dense(matrix), NO_STATISTICS)
    found = RTN(group_size=32).solve(sparse, NO_STATISTICS)
    assert isinstance(found, Sparse)
    assert isinstance(found.values, Quantized)
    assert torch.equal(found.mask(), sparse.mask())
    patterned = Magnitude(pattern="2:4").solve(Dense(matrix), NO_STATISTICS)
    assert torch.equal(RTN(group_size=32).solve(patterned, NO_STATISTICS).mask(), patterned.mask())
    thin = SVD(rank=8).solve(Dense(matrix), statistics)
    found = RTN(bits=8, group_size=32).solve(thin, NO_STATISTICS)
    assert isinstance(found, Product)
    torch.testing.assert_close(found.dense(), thin.dense().float(), rtol=0.05, atol=1e-3)


def test_compact_weights_that_a_lever_cannot_keep_are_refused():
    matrix, statistics = problem(16, 32)
    rounded = RTN(group_size=16).solve(Dense(matrix), NO_STATISTICS)
    for lever in (RTN(), GPTQ(), Embedding(), SVD(rank=2), Magnitude(sparsity=0.5)):
        with pytest.raises(
            FormError, match=rf"{lever.lever_name}: the weight is quantized already, 16x32; give the dense"
        ):
            lever.solve(rounded, statistics)
    with pytest.raises(FormError, match="is sum already"):
        GPTQ().solve(Sum(Dense(matrix), Dense(matrix)), statistics)


def test_embedding_rounds_rows_and_weighs_them_by_the_head():
    matrix, statistics = problem(50, 24)
    found = Embedding(bits=8, group_size=8).solve(Dense(matrix), NO_STATISTICS)
    assert torch.equal(found.rows(torch.tensor([3, 49])), found.dense()[[3, 49]])
    torch.testing.assert_close(found.dense(), matrix, rtol=0, atol=float(matrix.abs().max()) / 100)
    diagonal = torch.diag(torch.diag(statistics.second_moment))
    errors = [
        objective(
            Embedding(bits=3, group_size=24, search=16, importance=kind).solve(Dense(matrix), statistics).dense(),
            matrix,
            diagonal,
        )
        for kind in ("none", "head")
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("quantize.rtn", {"bits": 9}, "quantize.rtn: bits = 9 is out of range; give between 1 and 8"),
        ("quantize.rtn", {"bits": 4.0}, "quantize.rtn: bits = 4.0 is a float"),
        ("quantize.rtn", {"importance": "inputs"}, "importance has no effect with search = 0; give search at least 1"),
        ("quantize.rtn", {"format": "e4m3", "bits": 4}, "bits = 4 for format e4m3; give bits = 8"),
        ("quantize.rtn", {"format": "e2m1"}, "zero = 'integer' for format e2m1, which has none; give zero = 'none'"),
        ("quantize.gptq", {"group_size": 0}, "quantize.gptq: group_size = 0 is out of range; give at least 1"),
        ("quantize.gptq", {"static_groups": False}, "set static_groups = True or act_order = False"),
        ("quantize.gptq", {**IDENTITY, "scale_bits": 8}, "scale_bits = 8 with static_groups = False"),
        ("quantize.gptq", {"damping": -1.0}, "damping = -1.0 is out of range"),
        ("quantize.embedding", {"importance": "head"}, "quantize.embedding: importance has no effect"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(name, options, words):
    with pytest.raises(OptionError, match=words.replace("(", r"\(")):
        make(name, options)


def test_bad_statistics_are_refused_with_the_remedy():
    matrix, statistics = problem(4, 8)
    with pytest.raises(ShapeError, match=r"quantize.gptq: a second moment of shape \(6, 6\) for 8 inputs"):
        GPTQ().solve(Dense(matrix), Statistics(second_moment=torch.eye(6)))
    with pytest.raises(DataError, match="every calibration input of this layer is zero"):
        GPTQ().solve(Dense(matrix), Statistics(second_moment=torch.zeros(8, 8)))
    with pytest.raises(DataError, match=r"not positive definite with damping 0.0; raise damping to 0.01"):
        GPTQ(damping=0.0).solve(Dense(matrix), Statistics(second_moment=torch.ones(8, 8) - 0.5 * torch.eye(8)))
    broken = statistics.second_moment.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(FormError, match=r"quantize.gptq: second moment: 1 of 64 values are NaN"):
        GPTQ().solve(Dense(matrix), Statistics(second_moment=broken))
