"""Segment-masked attention."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Attention:
    """Softmax attention in which each token attends only to tokens of its own segment."""

    causal: bool
    """Whether a token attends only to itself and earlier tokens."""
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
        """Computes attention. Scores and softmax are float32.

        Args:
          query: [rows, heads, tokens, head_dim].
          key: [rows, kv_heads, tokens, head_dim], where kv_heads divides heads (grouped-query attention).
          value: [rows, kv_heads, tokens, head_dim].
          segment_ids: int [rows, tokens].
          positions: int [rows, tokens], the position of each token in its text.
          dropout_keys: One random key per token, [rows, tokens]; None disables dropout.

        Returns:
          [rows, heads, tokens, head_dim] in the dtype of `value`.
        """
        rows, heads, tokens, head_dim = query.shape
        grouped = query.reshape(rows, key.shape[1], -1, tokens, head_dim)
        scores = jnp.einsum("rkgqd,rksd->rkgqs", grouped, key, preferred_element_type=jnp.float32)
        visible = segment_ids[:, :, None] == segment_ids[:, None, :]
        if self.causal:
            visible &= jnp.tril(jnp.ones((tokens, tokens), bool))
        # Padding is a segment, too, so no row of the scores is fully masked.
        scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1)
        if dropout_keys is not None and self.dropout_rate > 0:
            keep = _keep_mask(dropout_keys, positions, heads, 1 - self.dropout_rate).reshape(weights.shape)
            weights = jnp.where(keep, weights / (1 - self.dropout_rate), 0.0)
        attended = jnp.einsum("rkgqs,rksd->rkgqd", weights.astype(value.dtype), value)
        return attended.reshape(rows, heads, tokens, head_dim)


def _keep_mask(dropout_keys: jax.Array, positions: jax.Array, heads: int, keep_prob: float) -> jax.Array:
    """Returns which attention weights to keep, bool [rows, heads, queries, keys].

    Each is drawn from the random key of the query token and the position of the key token in its text, so the mask does
    not depend on where the text is in its row.
    """

    def draw(dropout_key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(dropout_key, position), keep_prob, (heads,))

    draw_row = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
    return jnp.moveaxis(jax.vmap(draw_row)(dropout_keys, positions), -1, 1)
