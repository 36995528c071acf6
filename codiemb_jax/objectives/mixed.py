"""Objective of the mixed-batch ablation (`sampler: mixed`), where each device has examples of a single task."""

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
    """Computes on each device the loss of its own task over its own examples, without gathering anything.

    Args:
      examples: The examples of one device. An STS pair is a query whose first passage is its second text and whose
        other passages are padding.
      settings: The objective settings.
      objectives: The objective of each task.
      sizes: The group size of each task; None means all examples of a device.
      axes: Mesh axes over which the global batch is split.

    Returns:
      The mean loss over devices, and the parts of each task averaged over the devices with that task (NaN if none).
      Counts are summed.
    """
    is_ir = jnp.isnan(examples.scores[0])  # all examples of a device are of the same task
    # NaN scores would make the gradient of the STS loss NaN even where `jnp.where` does not select that loss.
    examples = examples._replace(scores=jnp.nan_to_num(examples.scores))
    all_devices = Groups(None, axes)
    total, parts = jnp.zeros((), examples.queries.dtype), {}
    for task, objective in objectives.items():
        loss, task_parts = objective.compute(examples, settings, Groups(sizes[task]))
        has_task = is_ir if task == "ir" else ~is_ir
        total += jnp.where(has_task, loss, 0)
        share = all_devices.mean(has_task.astype(loss.dtype))
        for name, part in task_parts.items():
            name = name if name not in parts else f"{task}_{name}"
            part = jnp.where(has_task, part, 0)
            is_count = jnp.issubdtype(part.dtype, jnp.integer)
            parts[name] = all_devices.sum(part) if is_count else all_devices.mean(part) / share
    return all_devices.mean(total), parts
