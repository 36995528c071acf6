"""A model's graph and abstract parameters, and the values of parameters that no checkpoint holds."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from codiemb_jax.config import ModelSettings
from codiemb_jax.models.layers import Projection, TextModel
from codiemb_jax.sharding import weight_shardings

Params = dict[str, Any]
"""A model's parameters: a nested dict of arrays."""


def abstract_model(
    kind: Callable[..., TextModel], config: Any, settings: ModelSettings, mesh: jax.sharding.Mesh
) -> tuple[Any, Params]:
    """Graph of a model of this kind, and shape, dtype and sharding of each parameter; nothing is allocated."""
    model = nnx.eval_shape(lambda: kind(config, settings, nnx.Rngs(0)))
    graph, variables = nnx.split(model)
    dtype = jnp.dtype(settings.param_dtype)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        nnx.to_pure_dict(variables),
        weight_shardings(mesh, variables),
    )
    return graph, params


def random_key(seed: int, purpose: Literal["projection", "dropout"]) -> jax.Array:
    """A run's random key for one purpose: those of two purposes have nothing in common."""
    return jax.random.fold_in(jax.random.key(np.uint32(seed)), ("projection", "dropout").index(purpose))


def new_projection(abstract: Params, seed: int) -> Params:
    """A projection's initial parameters, laid out as `abstract` says."""
    size, projected = abstract["kernel"].shape

    def initial() -> Params:
        params = nnx.to_pure_dict(nnx.state(Projection(size, projected, nnx.Rngs(random_key(seed, "projection")))))
        return jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), params, abstract)

    return jax.jit(initial, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
