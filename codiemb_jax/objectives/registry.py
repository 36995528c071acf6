"""Registry of objectives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax

from codiemb_jax.batch import Task
from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.contrastive import info_nce_ir, info_nce_sts
from codiemb_jax.objectives.cosent import cosent_ir, cosent_sts
from codiemb_jax.objectives.groups import Examples, Groups, Parts
from codiemb_jax.objectives.ranking import codi_sts

Compute: TypeAlias = Callable[[Examples, ObjectiveSettings, Groups], tuple[jax.Array, Parts]]


@dataclass(frozen=True)
class TaskObjective:
    """An objective for one task."""

    compute: Compute
    """Maps the examples of a device to the loss of the global batch, a scalar, and its unweighted parts."""
    needs_middle: Callable[[ObjectiveSettings], bool] = lambda _: False
    """Whether the objective needs embeddings of the middle layer."""
    needs_texts: Callable[[ObjectiveSettings], bool] = lambda _: False
    """Whether the objective needs to know which passages have the same text."""
    needs_negatives: bool = False
    """Whether examples without negatives have zero loss and gradient."""


OBJECTIVES: dict[str, dict[Task, TaskObjective]] = {
    "info_nce": {
        "ir": TaskObjective(info_nce_ir, needs_texts=lambda settings: settings.mask_duplicates),
        "sts": TaskObjective(info_nce_sts),
    },
    "codi": {"sts": TaskObjective(codi_sts, needs_middle=lambda settings: settings.mid_info_nce_weight > 0)},
    "cosent": {"ir": TaskObjective(cosent_ir, needs_negatives=True), "sts": TaskObjective(cosent_sts)},
}
"""Objectives by name, for each task that they support. `objective.ir` and `objective.sts` select them."""
