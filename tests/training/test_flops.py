"""Tests the count of operations against counts by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from codiemb_jax.models.layers import apply_remat, linear
from codiemb_jax.training.flops import count_flops

X, W = jnp.ones((7, 16)), jnp.ones((5, 16, 16))
PRODUCT = 2 * 7 * 16 * 16


def flops_of(function: Callable, *args: Any) -> int:
    return count_flops(jax.make_jaxpr(function)(*args))


def layers(w: jax.Array, x: jax.Array, remat: str, product: Callable = jnp.matmul) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.sin(product(x, w)), None

    return jnp.sum(jax.lax.scan(apply_remat(layer, remat), x, w)[0])


def test_batched_product():
    x, y = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert flops_of(jnp.matmul, x, y) == 2 * 3 * 4 * 5 * 6


def test_a_loop_counts_as_often_as_it_runs():
    assert flops_of(lambda: layers(W, X, "none")) == 5 * PRODUCT


@pytest.mark.parametrize("product", [jnp.matmul, linear])
@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("dots", 3), ("full", 4)])
def test_gradient_includes_recomputation(remat, passes, product):
    gradient = jax.grad(lambda w, x: layers(w, x, remat, product), argnums=(0, 1))
    assert flops_of(gradient, W, X[None]) == passes * 5 * PRODUCT


def test_a_conditional_counts_as_its_most_expensive_branch():
    def conditional(number: int) -> jax.Array:
        return jax.lax.switch(number, [lambda: X, lambda: X @ W[0], lambda: X @ W[0] @ W[1]])

    assert flops_of(conditional, 1) == 2 * PRODUCT


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    assert flops_of(product, jnp.ones((8, 16)), W[0]) == 2 * 8 * 16 * 16
