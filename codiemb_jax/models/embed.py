"""Rows of tokens -> one vector a text: encode, pool, project."""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

from codiemb_jax.batch import Rows
from codiemb_jax.models.layers import TextModel
from codiemb_jax.models.pooling import pool


def embed(model: TextModel, rows: Rows, keys: jax.Array | None = None, slots: int = 1) -> jax.Array:
    """Vectors, float32 [rows * slots, dim], row by row, not normalised; a row holds at most `slots` texts.

    keys: random keys of dropout [rows]; None: no dropout.
    """
    with _precision(model):
        hidden, _ = model(rows, 0, lambda _: (), keys)
        return _vectors(model, hidden, rows, slots)


def embed_with_middle(
    model: TextModel, rows: Rows, keys: jax.Array | None = None, slots: int = 1
) -> tuple[jax.Array, jax.Array]:
    """As `embed`, and the vectors of the middle layer: pooled after layer (layers + 1) // 2."""
    with _precision(model):
        middle_layer = (model.number_of_layers + 1) // 2
        hidden, middle = model(rows, middle_layer, lambda hidden: _vectors(model, hidden, rows, slots), keys)
        return _vectors(model, hidden, rows, slots), middle


def _vectors(model: TextModel, hidden: jax.Array, rows: Rows, slots: int) -> jax.Array:
    vectors = pool(hidden, rows, slots, model.pooling).reshape(-1, hidden.shape[-1])
    # The original projects every token before pooling.  A pooling's weights add up to 1, so that this is the same
    # vector for less work; sentence-transformers has this order, too.
    return model.projection(vectors) if model.projection is not None else vectors


def _precision(model: TextModel) -> AbstractContextManager:
    # Otherwise "float32" products would run as bfloat16 on TPU and as TF32 on GPU.
    return jax.default_matmul_precision("highest" if model.compute_dtype == jnp.float32 else "default")
