"""The laws of every lever of reach "weight"; a new one is found by itself."""

import dataclasses

import pytest
import torch
from problems import problem

from pennyweight.errors import DataError
from pennyweight.lever import candidates_of, levers, make, needs_of, options_of
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense, Weight, rebuild, stored_bytes, structure

SHAPE = (24, 96)
CARDS = [card for card in levers() if card.reach == "weight"]
CASES = [
    pytest.param(lever, id=f"{card.name}({', '.join(f'{k}={v}' for k, v in options_of(lever).items())})")
    for card in CARDS
    for lever in candidates_of(card, SHAPE)
]


@pytest.fixture(scope="module")
def case():
    return problem(*SHAPE, dead=2)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_offers_distinct_candidates_that_recipes_can_write_down(card):
    found = list(candidates_of(card, SHAPE))
    assert found or not hasattr(card.cls, "candidates")
    assert len(set(found)) == len(found)
    assert all(make(card.name, options_of(lever)) == lever for lever in found)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_options_are_described_and_frozen(card):
    assert all(option.text and option.range for option in card.options)
    for lever in candidates_of(card, SHAPE):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(lever, card.options[0].name, 1)


@pytest.mark.parametrize("lever", CASES)
def test_solves_into_a_weight_that_survives_a_file_and_changes_nothing_else(lever, case):
    matrix, statistics = case
    weight, before = Dense(matrix.clone()), {k: v.clone() for k, v in vars(statistics).items() if torch.is_tensor(v)}
    found = lever.solve(weight, statistics)
    assert isinstance(found, Weight)
    assert found.shape == SHAPE
    assert torch.equal(weight.matrix, matrix)
    assert all(torch.equal(getattr(statistics, name), value) for name, value in before.items())
    assert found.cost().bytes == stored_bytes(found) < 4 * matrix.numel()
    again = rebuild(structure(found), found.state_dict())
    assert torch.equal(again.dense(), found.dense())
    assert 0 < found.error(matrix, statistics.second_moment) < 1


@pytest.mark.parametrize("lever", CASES)
def test_solves_the_same_twice_and_in_a_group(lever, case):
    matrix, statistics = case
    alone = lever.solve(Dense(matrix), statistics).dense()
    assert torch.equal(lever.solve(Dense(matrix), statistics).dense(), alone)
    if hasattr(lever, "solve_group"):
        parts = [matrix[:5], matrix[5:]]
        together = lever.solve_group([Dense(part) for part in parts], statistics)
        for part, found in zip(parts, together, strict=True):
            expected = lever.solve(Dense(part), statistics).dense()
            # sums of other lengths are rounded otherwise: a weight beside a boundary may fall to its other side
            assert (expected == found.dense()).float().mean() > 0.99


@pytest.mark.parametrize("lever", CASES)
def test_says_what_data_it_lacks(lever, case):
    if needs_of(lever):
        with pytest.raises(DataError, match=rf"{lever.lever_name}: needs calibration data"):
            lever.solve(Dense(case[0]), NO_STATISTICS)
    else:
        lever.solve(Dense(case[0]), NO_STATISTICS)


@pytest.mark.parametrize("lever", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_takes_weights_of_other_dtypes(lever, dtype, case):
    matrix, statistics = case
    rounded = matrix.to(dtype)
    expected = lever.solve(Dense(rounded.float()), statistics).dense()
    assert torch.equal(lever.solve(Dense(rounded), statistics).dense(), expected)
