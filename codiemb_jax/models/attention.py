"""Attention within segments."""

import jax
import jax.numpy as jnp

from codiemb_jax.models.layers import dropout


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    *,
    causal: bool,
    dropout_rate: float = 0.0,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention; a token sees the tokens of its own segment only.

    query: [rows, heads, tokens, head_dim]; key, value: [rows, kv_heads, tokens, head_dim], where
    kv_heads divides heads (grouped queries); segments: int [rows, tokens]; keys: random keys of dropout [rows].
    Scores and softmax are float32.  Returns [rows, heads, tokens, head_dim] in the type of `value`.
    """
    rows, heads, tokens, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, tokens, head_dim)
    scores = jnp.einsum("rkgqd,rksd->rkgqs", grouped, key, preferred_element_type=jnp.float32)
    visible = segments[:, :, None] == segments[:, None, :]
    if causal:
        visible &= jnp.tril(jnp.ones((tokens, tokens), bool))
    # Padding is a segment of its own, so every row of scores has something to see.
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, keys).astype(value.dtype)
    attended = jnp.einsum("rkgqs,rksd->rkgqd", weights, value)
    return attended.reshape(rows, heads, tokens, head_dim)
