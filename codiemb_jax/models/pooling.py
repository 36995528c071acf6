"""Per-text pooling over segments."""

import jax
import jax.numpy as jnp

from codiemb_jax.batch import TokenRows


def pool(hidden: jax.Array, rows: TokenRows, slots: int, pooling: str) -> jax.Array:
    """A weighted mean over the tokens of each text.

    hidden: [rows, tokens, dim].  A row holds at most `slots` texts.  Returns float32 [rows, slots, dim];
    an empty slot gives zeros.

    pooling: `mean` and `weighted_mean` weigh the pooled tokens alike, or 1, 2, 3 … in their order (SGPT,
    arXiv 2202.08904); `cls` and `last_token` take the first or last of all tokens.
    """
    weights = _weights(rows, slots, pooling).astype(jnp.float32)
    total = jnp.einsum("rts,rtd->rsd", weights, hidden.astype(jnp.float32), precision="highest")
    return total / jnp.maximum(weights.sum(axis=1), 1.0)[..., None]


def _weights(rows: TokenRows, slots: int, pooling: str) -> jax.Array:
    """What each token counts for each text, int [rows, tokens, slots]."""
    own = (rows.segment_ids[..., None] == jnp.arange(1, slots + 1)).astype(jnp.int32)
    if pooling == "cls":
        return own * (jnp.cumsum(own, axis=1) == 1)
    if pooling == "last_token":
        return own * (jnp.cumsum(own, axis=1) == own.sum(axis=1, keepdims=True))
    content = own * rows.pooling_mask[..., None]
    return content * jnp.cumsum(content, axis=1) if pooling == "weighted_mean" else content


def unit(vectors: jax.Array) -> jax.Array:
    """Scales the last axis to length 1; zeros stay zeros, with a finite gradient."""
    squares = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
