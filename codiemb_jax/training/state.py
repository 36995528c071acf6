"""What training changes: parameters and the optimizer's state."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from codiemb_jax.config import ModelSettings, OptimizerSettings
from codiemb_jax.models.families.family import Family
from codiemb_jax.models.layers import Projection
from codiemb_jax.models.weights import Params
from codiemb_jax.training.mesh import replicated, weight_shardings


class TrainState(NamedTuple):
    params: Params
    opt_state: optax.OptState


def abstract_model(family: Family, config: Any, settings: ModelSettings, mesh: jax.sharding.Mesh) -> tuple[Any, Params]:
    """The model's graph, and shape, type and sharding of each parameter; nothing is allocated."""
    model = nnx.eval_shape(lambda: family.model(config, settings, nnx.Rngs(0)))
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


def make_optimizer(settings: OptimizerSettings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, after clipping if asked for.  Norms and biases are not decayed, as in transformers' trainer."""

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(part in jax.tree_util.keystr(path) for part in ("norm", "bias")), params
        )

    adamw = optax.adamw(schedule, *settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, mask=decayed)
    clip = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
    return optax.chain(*clip, adamw)


def abstract_opt_state(optimizer: optax.GradientTransformation, params: Params) -> optax.OptState:
    """Shape, type and sharding of the optimizer's state: moments lie as their parameters do."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return optax.tree_map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
    )


def initial_opt_state(optimizer: optax.GradientTransformation, params: Params) -> optax.OptState:
    """The optimizer's state before the first step, laid out as `abstract_opt_state` says."""
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_opt_state(optimizer, abstract))
    return jax.jit(optimizer.init, out_shardings=shardings)(params)
