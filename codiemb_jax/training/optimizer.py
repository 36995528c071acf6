"""AdamW as in the trainer of the original implementation (transformers)."""

from typing import Any

import jax
import optax

from codiemb_jax.config import OptimizerSettings
from codiemb_jax.models.build import Params


def make_optimizer(settings: OptimizerSettings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Creates AdamW, preceded by gradient clipping if `clip_norm` is set. Norms and biases are not decayed."""

    def decay_mask(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(part in jax.tree_util.keystr(path) for part in ("norm", "bias")), params
        )

    adamw = optax.adamw(
        schedule,
        *settings.betas,
        eps=settings.eps,
        mu_dtype=settings.moments_dtype,
        weight_decay=settings.weight_decay,
        mask=decay_mask,
    )
    clip = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
    return optax.chain(*clip, adamw)
