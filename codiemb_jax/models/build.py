"""Abstract models, and initial values for parameters that checkpoints do not have."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from codiemb_jax.config import ModelSettings
from codiemb_jax.models.attention import choose_backend
from codiemb_jax.models.layers import Projection, TextModel
from codiemb_jax.sharding import weight_shardings

Params = dict[str, Any]
"""A model's parameters: a nested dict of arrays."""


def abstract_model(
    model_class: Callable[..., TextModel], config: Any, settings: ModelSettings, mesh: jax.sharding.Mesh
) -> tuple[Any, Params]:
    """Returns the graph of a model and its abstract parameters (shape, dtype, sharding) without allocating memory.

    Raises:
      UserError: If the attention backend or the mesh cannot be used with the model.
    """
    backend = choose_backend(settings.attention_backend, mesh, settings.compute_dtype, config.kv_heads, config.head_dim)
    model = nnx.eval_shape(lambda: model_class(config, settings, backend, nnx.Rngs(0)))
    graph, variables = nnx.split(model)
    dtype = jnp.dtype(settings.param_dtype)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        nnx.to_pure_dict(variables),
        weight_shardings(mesh, variables),
    )
    return graph, params


def random_key(seed: int, purpose: Literal["projection", "dropout"]) -> jax.Array:
    """Returns the random key of a run for one purpose; the keys of different purposes are independent."""
    return jax.random.fold_in(jax.random.key(np.uint32(seed)), ("projection", "dropout").index(purpose))


def new_projection(abstract: Params, seed: int) -> Params:
    """Returns initial parameters of a projection with the shapes, dtypes and shardings of `abstract`."""
    size, projection_dim = abstract["kernel"].shape

    def init() -> Params:
        params = nnx.to_pure_dict(nnx.state(Projection(size, projection_dim, nnx.Rngs(random_key(seed, "projection")))))
        return jax.tree.map(lambda leaf, target: leaf.astype(target.dtype), params, abstract)

    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
