"""Tests that read a real asset run where its wheel is in the cache, and say so where it is not: tests fetch nothing."""

import pytest

from pennyweight.model import assets


def needs(*wheels: assets.Wheel) -> pytest.MarkDecorator:
    """Skip unless all of ``wheels`` were fetched before (`pennyweight assets fetch`)."""
    missing = [wheel.package for wheel in wheels if not (assets.cache() / "wheels" / wheel.file).is_file()]
    return pytest.mark.skipif(
        bool(missing), reason=f"not in the cache: {', '.join(missing)}; `pennyweight assets fetch`"
    )
