"""Steps whose loss or gradient is NaN or infinite, and weights that have become so."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from codiemb_jax.config import Settings
from codiemb_jax.data.sampler import StepPlan
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import Params

SHOWN_EXAMPLES = 16
"""Maximum number of examples that a message lists."""


class NonFiniteSteps:
    """Decides about steps with a NaN or infinite loss or gradient, whose updates have not been applied."""

    def __init__(self, settings: Settings, names: Sequence[str], skipped: int):
        """Starts counting.

        Args:
          settings: The settings.
          names: The names of the datasets.
          skipped: Number of steps that the run has skipped before.
        """
        self._settings, self._names, self._skipped = settings, names, skipped

    def check(self, plan: StepPlan, metrics: Mapping[str, float]) -> bool:
        """Returns whether a step was skipped.

        Raises:
          UserError: If the step ends the run.
        """
        if math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            return False
        problem = (
            f"step {plan.number} ({plan.task}): the loss is {metrics['loss']} and the gradient norm is "
            f"{metrics['grad_norm']}, with {describe_examples(plan, self._names)}"
        )
        if self._settings.non_finite == "stop":
            fix = (
                "lower optimizer.learning_rate or set optimizer.clip_norm, and use another output_dir; or set "
                "non_finite to skip"
                if plan.number
                else "the model has not been trained yet: check its weights and the objective settings for NaN, "
                "infinite or huge values"
            )
            raise UserError(f"{problem}; {fix}")
        self._skipped += 1
        if self._skipped > self._settings.non_finite_skips:
            raise UserError(f"{problem}; {self._skipped} steps would be skipped, more than non_finite_skips allows")
        return True


def count_skipped(metrics: Path) -> int:
    """Returns the number of skipped steps in a metrics.jsonl."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as lines:
        return sum(1 for line in lines if b'"skipped"' in line and json.loads(line).get("skipped"))


def describe_examples(plan: StepPlan, names: Sequence[str]) -> str:
    """Returns the examples of a step, numbered from 1 in the order of each file."""
    parts = zip(plan.sources, np.split(plan.examples, len(plan.sources)), strict=True)
    examples = sorted({(names[source], int(example) + 1) for source, part in parts for example in part})
    text = ""
    previous = None
    for name, number in examples[:SHOWN_EXAMPLES]:
        text += f", {number}" if name == previous else f"{'; ' if text else ''}examples of {name}: {number}"
        previous = name
    more = len(examples) - SHOWN_EXAMPLES
    return text + (f" and {more} more" if more > 0 else "")


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def check_weights(params: Params, done: int) -> None:
    """Checks the weights after `done` steps, because the metrics of a step are computed before its update.

    Raises:
      UserError: If any weight is NaN or infinite.
    """
    if not jax.device_get(_all_finite(params)):
        raise UserError(
            f"step {done - 1}: the update made weights NaN or infinite; lower optimizer.learning_rate or "
            "optimizer.weight_decay or set optimizer.clip_norm, and use another output_dir"
        )
