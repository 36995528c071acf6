"""Runs the tests of objectives in float64, where formulas can be compared to within rounding errors."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield
