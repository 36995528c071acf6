"""Objectives by name, and what each needs."""

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
    """How an objective is computed for one task."""

    compute: Compute
    """A device's examples -> the global batch's loss, a scalar, and its unweighted parts."""
    needs_middle: Callable[[ObjectiveSettings], bool] = lambda _: False
    """Whether it reads the vectors of the middle layer."""
    needs_negatives: bool = False
    """Whether examples without negatives teach it nothing."""


OBJECTIVES: dict[str, dict[Task, TaskObjective]] = {
    "info_nce": {"ir": TaskObjective(info_nce_ir), "sts": TaskObjective(info_nce_sts)},
    "codi": {"sts": TaskObjective(codi_sts, needs_middle=lambda settings: settings.mid_info_nce_weight > 0)},
    "cosent": {"ir": TaskObjective(cosent_ir, needs_negatives=True), "sts": TaskObjective(cosent_sts)},
}
"""Each for the tasks that it is defined for; `objective.ir` and `objective.sts` choose."""
