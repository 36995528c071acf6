"""Rows of tokens -> one vector a text: encode, pool, normalise."""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

from codiemb_jax.batch import Rows
from codiemb_jax.models.decoder import Decoder
from codiemb_jax.models.pooling import mean_pool, unit


def embed(model: Decoder, rows: Rows, slots: int = 1) -> jax.Array:
    """Unit vectors, float32 [rows * slots, dim], row by row; a row holds at most `slots` texts."""
    with _precision(model):
        hidden, _ = model(rows, 0, lambda _: ())
        return _vectors(hidden, rows, slots)


def embed_with_middle(model: Decoder, rows: Rows, slots: int = 1) -> tuple[jax.Array, jax.Array]:
    """As `embed`, and the unit vectors of the middle layer: pooled after layer (layers + 1) // 2."""
    with _precision(model):
        middle_layer = (model.config.layers + 1) // 2
        hidden, middle = model(rows, middle_layer, lambda hidden: _vectors(hidden, rows, slots))
        return _vectors(hidden, rows, slots), middle


def _vectors(hidden: jax.Array, rows: Rows, slots: int) -> jax.Array:
    return unit(mean_pool(hidden, rows, slots)).reshape(-1, hidden.shape[-1])


def _precision(model: Decoder) -> AbstractContextManager:
    # Otherwise "float32" products would run as bfloat16 on TPU and as TF32 on GPU.
    return jax.default_matmul_precision("highest" if model.compute_dtype == jnp.float32 else "default")
