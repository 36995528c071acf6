"""Tests of the product of a linear layer against NumPy, and of what XLA compiles for its gradient on CPUs."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codiemb_jax.models.layers import linear
from codiemb_jax.sharding import compiler_options, cpu_mesh


def test_product_and_gradients_match_numpy():
    rng = np.random.default_rng(0)
    x, weight, upstream = (rng.standard_normal(shape) for shape in ((2, 3, 5), (5, 4), (2, 3, 4)))
    y, backward = jax.vjp(linear, jnp.float32(x), jnp.float32(weight))
    expected = x @ weight, upstream @ weight.T, np.einsum("rti,rto->io", x, upstream)
    for actual, value in zip((y, *backward(jnp.float32(upstream))), expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("product", "transposes"), [(linear, False), (jnp.matmul, True)])
def test_gradient_transposes_no_operand_in_memory(product: Callable, transposes: bool):
    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(product(jnp.tanh(x), weight)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.ones((8, 64, 128)), jnp.ones((128, 32)))
    compiled = gradient.compile(compiler_options=compiler_options(cpu_mesh())).as_text()
    assert bool(re.search(r" transpose\(", compiled)) == transposes
