"""Rows of tokens -> one vector per text: encode, pool, project."""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

from codiemb_jax.batch import Array, TokenRows
from codiemb_jax.models.layers import TextModel
from codiemb_jax.models.pooling import pool


def embed(model: TextModel, rows: TokenRows, slots: int = 1, dropout_keys: jax.Array | None = None) -> jax.Array:
    """Vectors, float32 [rows * slots, dim], in row order, not normalized; a row holds at most `slots` texts.

    dropout_keys: [rows, tokens], see `token_keys`; None: no dropout.
    """
    with _precision(model):
        hidden, _ = model(rows, 0, lambda _: (), dropout_keys)
        return _vectors(model, hidden, rows, slots)


def embed_with_middle(
    model: TextModel, rows: TokenRows, slots: int = 1, dropout_keys: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """As `embed`, and the vectors of the middle layer: pooled after layer (layers + 1) // 2."""
    with _precision(model):
        middle_layer = (model.number_of_layers + 1) // 2
        hidden, middle = model(rows, middle_layer, lambda hidden: _vectors(model, hidden, rows, slots), dropout_keys)
        return _vectors(model, hidden, rows, slots), middle


def token_keys(key: jax.Array, rows: TokenRows, text_ids: Array) -> jax.Array:
    """A random key for each token [rows, tokens], made of its text's number and its position in the text.

    key: a step's random key; text_ids: int32 [rows, slots].
    """
    slots = jnp.maximum(jnp.asarray(rows.segment_ids) - 1, 0)
    ids = jnp.take_along_axis(jnp.asarray(text_ids), slots, axis=1)

    def of_token(text_id: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, text_id), position)

    return jax.vmap(jax.vmap(of_token))(ids, jnp.asarray(rows.positions))


def _vectors(model: TextModel, hidden: jax.Array, rows: TokenRows, slots: int) -> jax.Array:
    vectors = pool(hidden, rows, slots, model.pooling).reshape(-1, hidden.shape[-1])
    # The original projects every token before pooling.  A pooling's weights add up to 1, so that this is the same
    # vector for less work; sentence-transformers has this order, too.
    return model.projection(vectors) if model.projection is not None else vectors


def _precision(model: TextModel) -> AbstractContextManager:
    # Otherwise "float32" products would run as bfloat16 on TPU and as TF32 on GPU.
    return jax.default_matmul_precision("highest" if model.compute_dtype == jnp.float32 else "default")
