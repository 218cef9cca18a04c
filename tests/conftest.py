"""Fixtures that every test may use; randomness is fixed throughout."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# the same examples on every machine and every run; a slow machine is not a failure
settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers of the test's own."""
    return torch.Generator().manual_seed(0)
