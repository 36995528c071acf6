"""Per-text pooling over segments."""

import jax
import jax.numpy as jnp

from codiemb_jax.batch import Rows


def mean_pool(hidden: jax.Array, rows: Rows, slots: int) -> jax.Array:
    """Mean over the pooled tokens of each text.

    hidden: [rows, tokens, dim].  A row holds at most `slots` texts.  Returns float32 [rows, slots, dim];
    a slot without pooled tokens gives zeros.
    """
    slot = jnp.arange(1, slots + 1)
    mask = (rows.segments[..., None] == slot) & (rows.pooled[..., None] > 0)
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("rts,rtd->rsd", weights, hidden.astype(jnp.float32), precision="highest")
    return total / jnp.maximum(weights.sum(axis=1), 1.0)[..., None]


def unit(vectors: jax.Array) -> jax.Array:
    """Scales the last axis to length 1; zeros stay zeros, with a zero gradient."""
    squares = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
