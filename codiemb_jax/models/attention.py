"""Attention within segments."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Attention:
    """Softmax attention in which a token sees the tokens of its own segment only."""

    causal: bool
    """Whether it sees only those before it, itself included."""
    dropout_rate: float = 0.0

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """
        query: [rows, heads, tokens, head_dim]; key, value: [rows, kv_heads, tokens, head_dim], where kv_heads divides
        heads (grouped queries); segment_ids, positions: int [rows, tokens]; dropout_keys: one random key per token
        [rows, tokens], None for no dropout.  Scores and softmax are float32.

        Returns [rows, heads, tokens, head_dim] in the dtype of `value`.
        """
        rows, heads, tokens, head_dim = query.shape
        grouped = query.reshape(rows, key.shape[1], -1, tokens, head_dim)
        scores = jnp.einsum("rkgqd,rksd->rkgqs", grouped, key, preferred_element_type=jnp.float32)
        visible = segment_ids[:, :, None] == segment_ids[:, None, :]
        if self.causal:
            visible &= jnp.tril(jnp.ones((tokens, tokens), bool))
        # Padding is a segment of its own, so every row of scores has something to see.
        scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1)
        if dropout_keys is not None and self.dropout_rate > 0:
            kept = _kept(dropout_keys, positions, heads, 1 - self.dropout_rate).reshape(weights.shape)
            weights = jnp.where(kept, weights / (1 - self.dropout_rate), 0.0)
        attended = jnp.einsum("rkgqs,rksd->rkgqd", weights.astype(value.dtype), value)
        return attended.reshape(rows, heads, tokens, head_dim)


def _kept(dropout_keys: jax.Array, positions: jax.Array, heads: int, probability: float) -> jax.Array:
    """Which attention weights stay, bool [rows, heads, queries, keys].

    Drawn from the query's own random key and the key token's position in its text, so that it does not matter where in
    a row the text lies.
    """

    def of_pair(dropout_key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(dropout_key, position), probability, (heads,))

    of_row = jax.vmap(jax.vmap(of_pair, (None, 0)), (0, None))
    return jnp.moveaxis(jax.vmap(of_row)(dropout_keys, positions), -1, 1)
