"""AdamW as in the trainer of the original implementation (transformers)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from codiemb_jax.config import OptimizerSettings
from codiemb_jax.models.build import Params


def make_optimizer(settings: OptimizerSettings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Creates AdamW, preceded by gradient clipping if `clip_norm` is set. Norms and biases are not decayed.

    Expects float32 gradients, also for bfloat16 weights, and returns float32 updates.
    """

    def decay_mask(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(part in jax.tree_util.keystr(path) for part in ("norm", "bias")), params
        )

    adamw = optax.adamw(
        schedule, *settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, mask=decay_mask
    )
    clip = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
    return _in_float32(optax.chain(*clip, adamw), jnp.dtype(settings.moments_dtype or jnp.float32))


def _in_float32(optimizer: optax.GradientTransformation, moment_dtype: jnp.dtype) -> optax.GradientTransformation:
    """Makes AdamW compute in float32, whatever the dtype of the weights, and store its first moment in `moment_dtype`.

    optax computes moments and decay rates in the dtype of the moment. In bfloat16, a rate of 0.999 is 1.
    """

    def cast(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def cast_first_moment(state: optax.OptState, dtype: Any) -> optax.OptState:
        def cast_node(node: Any) -> Any:
            return node._replace(mu=cast(node.mu, dtype)) if is_adam(node) else node

        return jax.tree.map(cast_node, state, is_leaf=is_adam)

    def init(params: Params) -> optax.OptState:
        return cast_first_moment(optimizer.init(cast(params, jnp.float32)), moment_dtype)

    def update(gradients: Params, state: optax.OptState, params: Params | None = None) -> tuple[Any, optax.OptState]:
        state = cast_first_moment(state, jnp.float32)
        updates, state = optimizer.update(gradients, state, cast(params, jnp.float32))
        return updates, cast_first_moment(state, moment_dtype)

    return optax.GradientTransformation(init, update)
