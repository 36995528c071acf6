"""Attention in plain JAX, for every platform and dtype, with dropout."""

from functools import partial

import jax
import jax.numpy as jnp

DENSE_TOKENS = 1024
"""Longest rows whose scores are computed at once; longer ones are split into blocks of queries."""
BLOCK_TOKENS = 256
"""Queries per block."""


def attend(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, *, causal: bool) -> jax.Array:
    """Computes attention, see `Attention`. For long rows, memory grows linearly with their length."""
    tokens = query.shape[2]
    if tokens <= DENSE_TOKENS:
        return _attend_block(query, segment_ids, jnp.arange(tokens), key, value, segment_ids, causal=causal)
    padding = -tokens % BLOCK_TOKENS

    def split(x: jax.Array, axis: int) -> jax.Array:  # moves blocks of queries to a new leading axis
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
        shape = (*x.shape[:axis], -1, BLOCK_TOKENS, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    # The backward pass computes the scores of a block again, so that only one block is in memory at a time.
    block = jax.checkpoint(partial(_attend_block, causal=causal), prevent_cse=False)
    blocks = (split(query, 2), split(segment_ids, 1), split(jnp.arange(tokens), 0))
    attended = jax.lax.map(lambda block_inputs: block(*block_inputs, key, value, segment_ids), blocks)
    attended = jnp.moveaxis(attended, 0, 2)  # [rows, heads, blocks, BLOCK_TOKENS, head_dim]
    return attended.reshape(*query.shape[:2], -1, query.shape[3])[:, :, :tokens]


def attend_with_dropout(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    dropout_keys: jax.Array,
    *,
    causal: bool,
    rate: float,
) -> jax.Array:
    """Computes attention, see `Attention`, and drops attention weights with probability `rate`."""
    rows, heads, tokens, _ = query.shape
    keep = _keep_mask(dropout_keys, positions, heads, 1 - rate)
    keep = keep.reshape(rows, key.shape[1], -1, tokens, tokens)
    return _attend_block(
        query, segment_ids, jnp.arange(tokens), key, value, segment_ids, keep / (1 - rate), causal=causal
    )


def _attend_block(
    query: jax.Array,
    query_segments: jax.Array,
    query_indices: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_segments: jax.Array,
    factors: jax.Array | None = None,
    *,
    causal: bool,
) -> jax.Array:
    """Attends from a block of queries to whole rows. Scores and softmax are float32.

    Args:
      query: [rows, heads, queries, head_dim].
      query_segments: int [rows, queries].
      query_indices: int [queries], their indices in the rows.
      key: [rows, kv_heads, tokens, head_dim].
      value: [rows, kv_heads, tokens, head_dim].
      key_segments: int [rows, tokens].
      factors: Factors applied to the attention weights, [rows, kv_heads, heads / kv_heads, queries, tokens], or None.
      causal: Whether a token attends only to itself and earlier tokens.

    Returns:
      [rows, heads, queries, head_dim] in the dtype of `value`.
    """
    rows, heads, queries, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, queries, head_dim)
    scores = jnp.einsum("rkgqd,rksd->rkgqs", grouped, key, preferred_element_type=jnp.float32)
    visible = query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        visible &= query_indices[:, None] >= jnp.arange(key.shape[2])
    # Padding is a segment, too, so no row of the scores is fully masked.
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if factors is not None:
        weights *= factors
    attended = jnp.einsum("rkgqs,rksd->rkgqd", weights.astype(value.dtype), value)
    return attended.reshape(rows, heads, queries, head_dim)


def _keep_mask(dropout_keys: jax.Array, positions: jax.Array, heads: int, keep_prob: float) -> jax.Array:
    """Returns which attention weights to keep, bool [rows, heads, queries, keys].

    Each is drawn from the random key of the query token and the position of the key token in its text, so the mask does
    not depend on where the text is in its row.
    """

    def draw(dropout_key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(dropout_key, position), keep_prob, (heads,))

    draw_row = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
    return jnp.moveaxis(jax.vmap(draw_row)(dropout_keys, positions), -1, 1)
