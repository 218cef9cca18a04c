"""Runs trained as one stack: the losses of each are those of the run alone."""

from dataclasses import replace

import numpy as np
import pytest

from pennyweight.errors import DataError, OptionError
from pennyweight.laws import bench, stack

BASE = bench.Run(width=8, depth=2, steps=12, batch=3, length=9, held_out=8, warmup=3, evaluations=3, windows=20)


@pytest.mark.parametrize("change", [{}, {"schedule": "constant", "weight_decay": 0.3}], ids=["cosine", "constant"])
def test_each_run_of_a_stack_is_the_run_alone(change):
    """Against `bench.train`, which shares neither optimizer nor loop nor clipping with it; 36 of 20 windows."""
    runs = bench.grid(replace(BASE, **change), lr=(2e-3, 5e-2), seed=(0, 7))
    alone = [bench.train(run) for run in runs]
    together = stack.train(runs)
    assert [record.run for record in together] == runs
    assert [[step for step, _ in record.curve] for record in together] == [[4, 8, 12]] * 4
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose([x for _, x in other.curve], [x for _, x in one.curve], rtol=2e-4)
        np.testing.assert_allclose(other.train, one.train, rtol=2e-4)
    # what they differ in is far more than what they agree to
    assert np.ptp([record.loss for record in alone]) > 0.05


def test_runs_that_cannot_be_stacked_are_refused():
    with pytest.raises(OptionError, match=r"differs from .* in more than lr and seed"):
        stack.train([BASE, replace(BASE, steps=13)])
    with pytest.raises(OptionError, match="schedule = 'wsd'; give cosine or constant"):
        stack.train([replace(BASE, schedule="wsd")])
    with pytest.raises(DataError, match="held_out = 99999999 were asked for"):
        stack.train([replace(BASE, held_out=99999999)])
    with pytest.raises(OptionError, match="no runs"):
        stack.train([])
