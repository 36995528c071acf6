"""The mixed-batch ablation: each device has examples of one task, devices of different ones (`sampler: mixed`)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from codiemb_jax.batch import Task
from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.groups import Examples, Groups, Parts
from codiemb_jax.objectives.registry import TaskObjective


def mixed(
    examples: Examples,
    settings: ObjectiveSettings,
    objectives: Mapping[Task, TaskObjective],
    sizes: Mapping[Task, int | None],
    axes: tuple[str, ...],
) -> tuple[jax.Array, Parts]:
    """Each device's own task on its own examples alone: groups never cross devices, nothing is gathered.

    objectives, sizes: those of each task and the examples in its groups.  An STS pair is a query whose first passage is
    its second text and whose other passages are absent.
    Returns the mean over devices, and each task's parts as means over the devices that have it (NaN if none).
    """
    is_ir = jnp.isnan(examples.scores[0])  # alike on all of a device
    # A score that is NaN would make the gradient of the similarity loss NaN, chosen or not.
    examples = examples._replace(scores=jnp.nan_to_num(examples.scores))
    everywhere = Groups(None, axes)
    total, parts = jnp.zeros((), examples.queries.dtype), {}
    for task, objective in objectives.items():
        loss, own_parts = objective.compute(examples, settings, Groups(sizes[task]))
        own = is_ir if task == "ir" else ~is_ir
        total += jnp.where(own, loss, 0)
        share = everywhere.mean(own.astype(loss.dtype))
        for name, part in own_parts.items():
            name = name if name not in parts else f"{task}_{name}"
            parts[name] = everywhere.mean(jnp.where(own, part, 0)) / share
    return everywhere.mean(total), parts
