"""Objectives are tested in float64, where formulas can be told from rounding."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield
