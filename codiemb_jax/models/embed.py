"""Computes one embedding per text: encode, pool, project."""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

from codiemb_jax.batch import Array, TokenRows
from codiemb_jax.models.layers import TextModel
from codiemb_jax.models.pooling import pool


def embed(model: TextModel, rows: TokenRows, slots: int = 1, dropout_keys: jax.Array | None = None) -> jax.Array:
    """Returns the embeddings of the texts in `rows`, float32 [rows * slots, dim], in row order and not normalized.

    Args:
      model: The model.
      rows: The tokens, with at most `slots` texts per row.
      slots: Number of embeddings per row.
      dropout_keys: [rows, tokens], see `token_keys`; None disables dropout.
    """
    with _matmul_precision(model):
        hidden, _ = model(rows, 0, lambda _: (), dropout_keys)
        return _pool_and_project(model, hidden, rows, slots)


def embed_with_middle(
    model: TextModel, rows: TokenRows, slots: int = 1, dropout_keys: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the embeddings of `embed` and those of the middle layer, pooled after layer (num_layers + 1) // 2."""

    def tap(hidden: jax.Array) -> jax.Array:
        return _pool_and_project(model, hidden, rows, slots)

    with _matmul_precision(model):
        middle_layer = (model.num_layers + 1) // 2
        hidden, middle = model(rows, middle_layer, tap, dropout_keys)
        return _pool_and_project(model, hidden, rows, slots), middle


def token_keys(key: jax.Array, rows: TokenRows, text_ids: Array) -> jax.Array:
    """Returns a random key per token, [rows, tokens], derived from the id of its text and its position in the text.

    Args:
      key: The random key of a step.
      rows: The tokens.
      text_ids: int32 [rows, slots], see `Batch`.
    """
    slots = jnp.maximum(jnp.asarray(rows.segment_ids) - 1, 0)
    ids = jnp.take_along_axis(jnp.asarray(text_ids), slots, axis=1)

    def token_key(text_id: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, text_id), position)

    return jax.vmap(jax.vmap(token_key))(ids, jnp.asarray(rows.positions))


def _pool_and_project(model: TextModel, hidden: jax.Array, rows: TokenRows, slots: int) -> jax.Array:
    vectors = pool(hidden, rows, slots, model.pooling).reshape(-1, hidden.shape[-1])
    # The original projects every token before pooling. Pooling weights sum to 1, so projecting the pooled vector gives
    # the same result for less work. sentence-transformers also projects after pooling.
    return model.projection(vectors) if model.projection is not None else vectors


def _matmul_precision(model: TextModel) -> AbstractContextManager:
    # By default, float32 matrix products use bfloat16 on TPUs and TF32 on GPUs.
    return jax.default_matmul_precision("highest" if model.compute_dtype == jnp.float32 else "default")
