"""Every form keeps every law, alone and in random expressions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import FORMS, LAWS, SQUARE, block_sparse_large, nested

from pennyweight.weights import forms


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("shape", [(6, 10), (1, 1), (7, 1), (1, 5), (4, 33)], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_keeps_every_law(form, shape, law, generator):
    law(*form(generator, *shape))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("form", SQUARE, ids=lambda form: form.__name__)
def test_every_square_form_keeps_every_law(form, size, law, generator):
    law(*form(generator, size, size))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_large_blocks_keep_every_law(law, generator):
    law(*block_sparse_large(generator, 3, 5))


@settings(max_examples=60)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    depth=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    square=st.booleans(),
)
def test_every_expression_keeps_every_law(m, n, depth, seed, square):
    weight, matrix = nested(torch.Generator().manual_seed(seed), m, m if square else n, depth)
    for law in LAWS:
        law(weight, matrix)


def test_the_table_holds_every_form(generator):
    drawn = {type(form(generator, 6, 6)[0]).form for form in FORMS + SQUARE}
    assert drawn | {"sum", "product", "hadamard"} == set(forms())
