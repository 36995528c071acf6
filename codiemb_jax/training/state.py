"""The training state: parameters and optimizer state."""

from typing import NamedTuple

import jax
import optax

from codiemb_jax.models.build import Params
from codiemb_jax.sharding import replicated

HOST_MEMORY = "pinned_host"
"""Name of the host memory that devices can copy from and to directly."""


class TrainState(NamedTuple):
    params: Params
    opt_state: optax.OptState


def abstract_state(optimizer: optax.GradientTransformation, params: Params, offload: bool = False) -> TrainState:
    """Returns the abstract state (shapes, dtypes, shardings) for abstract `params`; moments are sharded like params.

    Args:
      optimizer: The optimizer.
      params: Abstract parameters.
      offload: Whether the moments are in host memory.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh

    def moment(leaf: jax.ShapeDtypeStruct, param: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = param.sharding.with_memory_kind(HOST_MEMORY) if offload else param.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        optimizer,
        moment,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
    )
    return TrainState(params, opt_state)


def initial_state(optimizer: optax.GradientTransformation, params: Params, abstract: TrainState) -> TrainState:
    """Returns the state before the first step, with the shardings of `abstract`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    return TrainState(params, jax.jit(optimizer.init, out_shardings=shardings)(params))
