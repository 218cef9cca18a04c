"""The factor and the column solver that GPTQ and SparseGPT share."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers
from problems import problem

from pennyweight.solvers import factor as module
from pennyweight.solvers.columns import solve_columns
from pennyweight.solvers.factor import factor_of, factorize


@pytest.mark.parametrize("width", [1, 2, 31, 257, 600])
@pytest.mark.parametrize("order", ["given", "descending"])
def test_the_factor_is_that_of_the_inverse(width, order):
    moment = problem(1, width, dead=width // 10)[1].second_moment
    found = factorize(moment, damping=0.01, order=order)
    h = moment.double()
    h.diagonal()[h.diagonal() == 0] = 1
    h = h + 0.01 * h.diagonal().mean() * torch.eye(width)
    permutation = torch.arange(width) if found.order is None else found.order
    inverse = torch.linalg.inv(h)
    inverse = inverse if order == "given" else torch.linalg.inv(h[permutation][:, permutation])
    upper = (found.lower.double() * found.diagonal.double()).T
    assert torch.equal(found.lower, found.lower.tril())
    assert torch.equal(found.lower.diagonal(), torch.ones(width))
    assert float((upper.T @ upper - inverse).norm() / inverse.norm()) < 1e-4
    if order == "descending":
        assert (h.diagonal()[permutation].diff() <= 0).all()


class Recording:
    """Settles columns to the nearest whole number and notes what it was shown."""

    def __init__(self, stretch):
        self.stretch, self.shown, self.opened = stretch, [], []

    def open(self, start, stop, columns):
        self.opened.append((start, stop, columns.clone()))

    def settle(self, column, values):
        self.shown.append((column, values.clone()))
        values.sub_(values.round())


@given(width=integers(1, 150), stretch=integers(1, 160), seed=integers(0, 2**31))
def test_every_column_is_shown_once_with_all_earlier_errors_made_good(width, stretch, seed):
    g = torch.Generator().manual_seed(seed)
    matrix = 3 * torch.randn(width, 4, generator=g)
    lower = (0.1 * torch.randn(width, width, generator=g)).tril(-1) + torch.eye(width)
    rule, columns = Recording(stretch), matrix.clone()
    solve_columns(columns, lower, rule)
    assert [column for column, _ in rule.shown] == list(range(width))
    assert [(start, stop) for start, stop, _ in rule.opened] == [
        (start, min(start + stretch, width)) for start in range(0, width, stretch)
    ]
    # the plain loop, fed with the errors that were made: right-looking, in double
    current, errors = matrix.double(), columns.double()
    for column, values in rule.shown:
        for start, stop, opened in rule.opened:
            if start == column:
                torch.testing.assert_close(opened.double(), current[start:stop], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values.double(), current[column], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(errors[column], (values - values.round()).double(), rtol=0, atol=1e-6)
        current -= torch.outer(lower[:, column].double(), errors[column]) * (torch.arange(width) > column)[:, None]


def test_the_factor_is_remembered_while_its_tensor_lives_unchanged(monkeypatch):
    made = []
    plain = module.factorize
    monkeypatch.setattr(module, "factorize", lambda *args, **kwargs: made.append(1) or plain(*args, **kwargs))
    moment = problem(1, 8)[1].second_moment.clone()
    first = factor_of(moment, damping=0.01)
    assert factor_of(moment, damping=0.01) is first
    factor_of(moment, damping=0.02)
    assert factor_of(moment, damping=0.01) is first
    assert len(made) == 2
    moment.mul_(2)  # more calibration data came in
    assert factor_of(moment, damping=0.01) is not first
    with torch.inference_mode():
        untracked = moment.clone()
    assert factor_of(untracked, damping=0.01) is not factor_of(untracked, damping=0.01)
    twin = moment.clone()
    assert factor_of(twin, damping=0.01) is not factor_of(moment, damping=0.01)
    del moment
    gc.collect()
    assert not module._LATEST.factors
