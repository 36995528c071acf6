"""Chooses the best checkpoint of a run by the evaluations during training, and decides when to stop early."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from codiemb_jax.config import EvaluationSettings
from codiemb_jax.errors import UserError
from codiemb_jax.training.run_folder import HeldOutMetrics

MAIN_METRICS = ("nDCG@10", "Spearman")
"""The metric of retrieval and that of similarity by which models are compared, as in MTEB."""


class Evaluation(NamedTuple):
    """The held-out metrics of a run after some steps."""

    step: int
    """Number of steps done."""
    metrics: HeldOutMetrics
    data: str
    """Digest of the held-out data."""


class Selection:
    """The evaluations of a run so far, and what follows from them.

    Everything follows from the evaluations and the settings alone, so a run that is continued decides as before.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        steps: int,
        evaluations: Sequence[Evaluation],
        data: str,
        saved: Collection[int],
    ):
        """Takes over the evaluations of earlier starts of the run.

        Args:
          settings: When to evaluate, and how to compare evaluations.
          steps: Number of steps of the whole run.
          evaluations: Evaluations so far, in order.
          data: Digest of the held-out data of the evaluations to come.
          saved: The steps of the checkpoints so far.

        Raises:
          UserError: If earlier evaluations were on other data, or lack the metric.
        """
        self._settings, self._steps = settings, steps
        self._evaluations = list(evaluations) if settings.every_steps else []
        self._scores: list[float] = []
        for evaluation in self._evaluations:
            if evaluation.data != data:
                raise UserError(
                    f"evaluation: the held-out data has changed since the evaluation after {evaluation.step} steps; "
                    "continue with the same data, or start over in another output_dir"
                )
            try:
                self._scores.append(score(evaluation.metrics, settings.metric))
            except KeyError as error:
                raise UserError(
                    f"metrics.jsonl: the evaluation after {evaluation.step} steps has no {error.args[0]}; restore the "
                    "file, or start over in another output_dir"
                ) from error
        self._lost = {evaluation.step for evaluation in self._evaluations} - set(saved)

    def is_due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps: at the interval of the settings, and after the last one."""
        every = self._settings.every_steps
        if not every or not done or any(evaluation.step == done for evaluation in self._evaluations):
            return False
        return done % every == 0 or done == self._steps

    def add(self, evaluation: Evaluation) -> None:
        """Adds the next evaluation."""
        self._scores.append(score(evaluation.metrics, self._settings.metric))
        self._evaluations.append(evaluation)

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation, and of equally good ones the first; None before the first one."""
        return self._evaluations[int(np.argmax(self._scores))] if self._evaluations else None

    @property
    def kept(self) -> int | None:
        """The checkpoint to keep, and to export at the end; None if that is the newest one.

        It is the best one that exists. The best of all exists, unless the settings have changed or it was removed.
        """
        if not self._settings.keep_best:
            return None
        found = [i for i, evaluation in enumerate(self._evaluations) if evaluation.step not in self._lost]
        return self._evaluations[max(found, key=self._scores.__getitem__)].step if found else None

    @property
    def should_stop(self) -> bool:
        """Whether the last evaluations were no improvement, as many of them as the settings allow."""
        if not self._settings.patience or not self._evaluations:
            return False
        return len(self._scores) - 1 - int(np.argmax(self._scores)) >= self._settings.patience

    def metrics_after(self, step: int) -> HeldOutMetrics | None:
        """Returns the metrics after `step` steps, None if they are unknown."""
        return next((evaluation.metrics for evaluation in self._evaluations if evaluation.step == step), None)

    def describe(self) -> str:
        """Returns a line about the last evaluation, for the log of a run."""
        last, best = self._evaluations[-1], int(np.argmax(self._scores))
        name = self._settings.metric or "mean of main metrics"
        text = f"after {last.step} steps: {name} {self._scores[-1]:.4f}"
        if self._evaluations[best] == last:
            return f"{text}, the best so far"
        return f"{text}; the best so far is {self._scores[best]:.4f} after {self._evaluations[best].step} steps"


def score(metrics: HeldOutMetrics, metric: str | None) -> float:
    """Returns the number by which evaluations are compared; larger is better.

    Args:
      metrics: The metrics of an evaluation.
      metric: One of them; or the name of a metric, which is averaged over all data that has it; or None for the mean of
        the main metrics of all data.

    Raises:
      KeyError: If there is no such metric.
    """
    if metric in metrics:
        return metrics[metric]
    wanted = MAIN_METRICS if metric is None else (metric,)
    values = [value for name, value in metrics.items() if name.rpartition(" ")[2] in wanted]
    if not values:
        raise KeyError(" or ".join(wanted))
    return float(np.mean(values))
