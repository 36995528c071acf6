"""Shared by decoder and encoder: declaring parameters, dropout, and the scan over layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.config import ModelSettings


def normal(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    """A matrix with named axes: shape, sharding names and initial values in one place."""
    value = std * jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32)
    return nnx.Param(value, axes=tuple(axes))


def ones(**axes: int) -> nnx.Param:
    return nnx.Param(jnp.ones(tuple(axes.values()), jnp.float32), axes=tuple(axes))


def zeros(**axes: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(tuple(axes.values()), jnp.float32), axes=tuple(axes))


class Projection(nnx.Module):
    """A learned linear layer, with the initial values of PyTorch's."""

    def __init__(self, size: int, projected: int, rngs: nnx.Rngs):
        bound = size**-0.5
        kernel = jax.random.uniform(rngs.params(), (size, projected), jnp.float32, -bound, bound)
        bias = jax.random.uniform(rngs.params(), (projected,), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(kernel, axes=("embed", "projected"))
        self.bias = nnx.Param(bias, axes=("projected",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[…, size] -> […, projected]"""
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class TextModel(nnx.Module):
    """Token ids -> hidden states; and how they become vectors (`embed.py`)."""

    def __init__(self, hidden_size: int, layers: int, settings: ModelSettings, rngs: nnx.Rngs):
        self.number_of_layers = layers
        self.compute_dtype = jnp.dtype(settings.compute_dtype)
        self.remat = settings.remat
        self.pooling = settings.pooling
        self.projection = Projection(hidden_size, settings.projection_dim, rngs) if settings.projection_dim else None

    def __call__(
        self,
        rows: TokenRows,
        tap_layer: int | jax.Array,
        tap: Callable[[jax.Array], Any],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Final hidden states, [rows, tokens, embed] in the compute dtype, and what `tap` makes of the states after
        layer `tap_layer` (before any final norm; 0: the embeddings).

        dropout_keys: one random key per token, [rows, tokens]; None: no dropout.  They depend on a token's text and its
        position there alone, so that the same is dropped however texts are laid out, sharded or chunked.
        """
        raise NotImplementedError


UNROLLED = 4
"""Layers up to which the scan is unrolled, unless layers are rematerialized, which needs the loop.  It then need not
stack what the backward pass reads, which costs a small model a fifth of its time on a CPU."""


def run_layers(
    layers: nnx.Module,
    count: int,
    x: jax.Array,
    *context: jax.Array,
    tap_layer: int | jax.Array,
    tap: Callable[[jax.Array], Any],
    dropout_keys: jax.Array | None,
    remat: str,
) -> tuple[jax.Array, Any]:
    """Runs `layers`, whose weights are stacked on a leading axis of `count`, in one `jax.lax.scan`.

    A layer is called as layer(x, *context, dropout_keys=keys), the keys being its own.  `tap` runs inside the scan, so
    that no layer's states need to be kept for it.
    """
    graph, weights = nnx.split(layers)

    def layer(carry: tuple[jax.Array, Any], scanned: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
        (x, tapped), (weights, number) = carry, scanned
        x = nnx.merge(graph, weights)(x, *context, dropout_keys=fold(dropout_keys, number))
        return (x, jax.lax.cond(number == tap_layer, tap, lambda _: tapped, x)), None

    numbers = jnp.arange(1, count + 1)
    (x, tapped), _ = jax.lax.scan(
        rematerialized(layer, remat), (x, tap(x)), (weights, numbers), unroll=remat == "none" and count <= UNROLLED
    )
    return x, tapped


def rematerialized(body: Callable, remat: str) -> Callable:
    """Wraps a scan's body so that its backward pass recomputes what `remat` (none, dots, full) says."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def fold(keys: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """Each token's random key [rows, tokens] for the part of the model that `number` names."""
    return None if keys is None else jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, number)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes entries of x [rows, tokens, …] with probability `rate` and scales the rest; keys: [rows, tokens]."""
    if keys is None or rate == 0.0:
        return x
    kept = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[2:])))(keys)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))
