"""Shared parts of the decoder and the encoder: parameter initializers, dropout, and the scan over layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.config import ModelSettings
from codiemb_jax.models.attention.saved import SAVED


def normal(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    """Returns a normally initialized parameter. `axes` gives the name, used for sharding, and size of each axis."""
    value = std * jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32)
    return nnx.Param(value, axes=tuple(axes))


def ones(**axes: int) -> nnx.Param:
    return nnx.Param(jnp.ones(tuple(axes.values()), jnp.float32), axes=tuple(axes))


def zeros(**axes: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(tuple(axes.values()), jnp.float32), axes=tuple(axes))


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns x @ weight, for x of [rows, tokens, inputs] and weight of [inputs, outputs] in the same dtype.

    Rows and tokens are one axis of the product. With two of them, the gradient of the weight would sum over both, and
    for that XLA transposes an operand in memory on CPUs.
    """
    rows, tokens, inputs = x.shape
    return (x.reshape(rows * tokens, inputs) @ weight).reshape(rows, tokens, weight.shape[1])


class Projection(nnx.Module):
    """Linear layer, initialized as in PyTorch."""

    def __init__(self, size: int, projection_dim: int, rngs: nnx.Rngs):
        bound = size**-0.5
        kernel = jax.random.uniform(rngs.params(), (size, projection_dim), jnp.float32, -bound, bound)
        bias = jax.random.uniform(rngs.params(), (projection_dim,), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(kernel, axes=("embed", "projected"))
        self.bias = nnx.Param(bias, axes=("projected",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps […, size] to […, projection_dim]."""
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class TextModel(nnx.Module):
    """Base class of models: computes hidden states, and has the settings to turn them into embeddings (`embed.py`)."""

    def __init__(self, hidden_size: int, num_layers: int, settings: ModelSettings, rngs: nnx.Rngs):
        self.num_layers = num_layers
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
        """Computes hidden states.

        Args:
          rows: The tokens.
          tap_layer: The layer whose output is passed to `tap`; 0 means the token embeddings.
          tap: Function of the hidden states after layer `tap_layer`, before any final norm.
          dropout_keys: One random key per token, [rows, tokens]; None disables dropout. Keys depend only on the text of
            a token and its position there, so the same values are dropped however texts are laid out, sharded or split
            into chunks.

        Returns:
          The final hidden states, [rows, tokens, embed] in the compute dtype, and the result of `tap`.
        """
        raise NotImplementedError


MAX_UNROLLED_LAYERS = 4
"""Models with at most this many layers unroll the scan, unless they use rematerialization, which needs the loop.

The loop stacks the residuals for the backward pass, which takes 20% of the step time of a small model on a CPU.
"""


def run_layers(
    layers: nnx.Module,
    num_layers: int,
    x: jax.Array,
    *context: jax.Array,
    tap_layer: int | jax.Array,
    tap: Callable[[jax.Array], Any],
    dropout_keys: jax.Array | None,
    remat: str,
) -> tuple[jax.Array, Any]:
    """Runs `layers`, whose weights are stacked on a leading axis of size `num_layers`, in one `jax.lax.scan`.

    Each layer is called as layer(x, *context, dropout_keys=keys) with its own keys. `tap` runs inside the scan, so the
    hidden states of the tapped layer need not be kept.
    """
    graph, weights = nnx.split(layers)

    def layer(carry: tuple[jax.Array, Any], scanned: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
        (x, tapped), (weights, number) = carry, scanned
        x = nnx.merge(graph, weights)(x, *context, dropout_keys=fold_in(dropout_keys, number))
        return (x, jax.lax.cond(number == tap_layer, tap, lambda _: tapped, x)), None

    numbers = jnp.arange(1, num_layers + 1)
    (x, tapped), _ = jax.lax.scan(
        apply_remat(layer, remat),
        (x, tap(x)),
        (weights, numbers),
        unroll=remat == "none" and num_layers <= MAX_UNROLLED_LAYERS,
    )
    return x, tapped


def apply_remat(body: Callable, remat: str) -> Callable:
    """Wraps the body of a scan so that its backward pass rematerializes as `remat` (none, dots, full) specifies."""
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    save = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
    )
    return jax.checkpoint(body, policy=save if remat == "dots" else None, prevent_cse=False)


def fold_in(keys: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """Folds `number` into each random key of [rows, tokens]; None stays None."""
    return None if keys is None else jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, number)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes entries of x, [rows, tokens, …], with probability `rate` and scales up the rest. keys: [rows, tokens]."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[2:])))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))
