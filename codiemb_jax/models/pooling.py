"""Pools the hidden states of each text into one vector."""

import jax
import jax.numpy as jnp

from codiemb_jax.batch import TokenRows


def pool(hidden: jax.Array, rows: TokenRows, slots: int, pooling: str) -> jax.Array:
    """Pools the hidden states of each text.

    Args:
      hidden: [rows, tokens, dim].
      rows: The tokens, with at most `slots` texts per row.
      slots: Number of pooled vectors per row.
      pooling: `mean` weights the tokens in `pooling_mask` equally, `weighted_mean` by 1, 2, 3, … in order (SGPT,
        arXiv 2202.08904). `cls` and `last_token` take the first or last token of the text regardless of the mask.

    Returns:
      float32 [rows, slots, dim]; zeros for empty slots.
    """
    weights = _weights(rows, slots, pooling).astype(jnp.float32)
    total = jnp.einsum("rts,rtd->rsd", weights, hidden.astype(jnp.float32), precision="highest")
    return total / jnp.maximum(weights.sum(axis=1), 1.0)[..., None]


def _weights(rows: TokenRows, slots: int, pooling: str) -> jax.Array:
    """Returns the weight of each token for each text, int [rows, tokens, slots]."""
    in_text = (rows.segment_ids[..., None] == jnp.arange(1, slots + 1)).astype(jnp.int32)
    if pooling == "cls":
        return in_text * (jnp.cumsum(in_text, axis=1) == 1)
    if pooling == "last_token":
        return in_text * (jnp.cumsum(in_text, axis=1) == in_text.sum(axis=1, keepdims=True))
    content = in_text * rows.pooling_mask[..., None]
    return content * jnp.cumsum(content, axis=1) if pooling == "weighted_mean" else content


def l2_normalize(vectors: jax.Array) -> jax.Array:
    """Scales the last axis to unit length; zero vectors stay zero and have a finite gradient."""
    squares = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
