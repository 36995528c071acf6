"""Monitors a run: logs its steps, evaluates it, and stops it if something goes wrong."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial

import jax

from codiemb_jax.checkpoints.run_checkpoints import saved_steps
from codiemb_jax.data.sampler import StepPlan
from codiemb_jax.distributed import first_value, is_first_process
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import Params
from codiemb_jax.training.finite import NonFiniteSteps, count_skipped
from codiemb_jax.training.log import MetricsLog, truncate_metrics
from codiemb_jax.training.run import Run
from codiemb_jax.training.run_folder import HeldOutMetrics, RunFolder
from codiemb_jax.training.selection import Evaluation, Selection
from codiemb_jax.training.step import Metrics
from codiemb_jax.training.trackers import open_trackers

Evaluate = Callable[[Params], HeldOutMetrics]
"""Computes the held-out metrics of parameters. All processes must call it together."""


class RunMonitor:
    """The metrics and evaluations of a run. All processes have one and decide alike; only the first one writes."""

    def __init__(
        self,
        run: Run,
        log: MetricsLog | None,
        earlier: Sequence[Evaluation],
        evaluate: Evaluate,
        data: str,
    ):
        """Takes over the state of earlier starts.

        Args:
          run: The run.
          log: The log, in the first process.
          earlier: The evaluations so far, in the first process.
          evaluate: Computes the held-out metrics of parameters.
          data: Digest of the held-out data.

        Raises:
          UserError: If earlier evaluations were on other data.
        """
        settings, self._folder = run.setup.settings, run.folder
        self._log, self._evaluate, self._data = log, evaluate, data
        skipped = first_value(count_skipped(self._folder.metrics) if log else 0)
        self._non_finite = NonFiniteSteps(settings, run.names, skipped)
        evaluations = [Evaluation(*found) for found in first_value(list(earlier))]
        saved = first_value(saved_steps(self._folder.checkpoints) if log else [])
        self.selection = Selection(settings.evaluation, run.steps, evaluations, data, saved)
        self._pending: tuple[StepPlan, Metrics] | None = None
        self._noted_masked = False

    def add(self, plan: StepPlan, metrics: Metrics) -> None:
        """Takes the metrics of a step that has been started, and logs those of the step before it.

        This waits until that one has run. So its metrics are fetched while the next step runs, and at most two steps
        are in flight.

        Raises:
          UserError: If the step before is one that ends the run.
        """
        self.finish()
        self._pending = plan, metrics

    def finish(self) -> None:
        """Waits until the last step has run, and logs it. See `add`."""
        if self._pending is None:
            return
        (plan, metrics), self._pending = self._pending, None
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        skipped = self._non_finite.check(plan, values)
        if self._log is not None:
            self._log.write(plan, values, skipped)
            if abs(values["loss"]) < 1e-5 and values.get("masked") and not self._noted_masked:
                self._noted_masked = True
                self._log.note(
                    f"step {plan.number} has a loss of 0, and {values['masked']} pairs of a query and a passage are "
                    "masked, because the passage has the text of a positive; if no negatives are left, add some, or "
                    "set objective.mask_duplicates to false"
                )

    def evaluate(self, params: Params, done: int) -> None:
        """Evaluates the parameters after `done` steps."""
        start = time.perf_counter()
        with self._log.paused() if self._log else nullcontext():
            metrics = first_value(self._evaluate(params))  # in other processes, the last bits may differ
        evaluation = Evaluation(done, metrics, self._data)
        self.selection.add(evaluation)
        if self._log is not None:
            self._log.write_evaluation(evaluation, time.perf_counter() - start, self.selection.describe())

    def flush(self) -> None:
        """Waits until everything logged so far is on disk, or in the remote folder."""
        if self._log is not None:
            self._log.flush()
            self._folder.publish_logs()


@contextmanager
def monitored(run: Run, done: int, evaluate: Evaluate, data: str) -> Iterator[RunMonitor]:
    """Monitors a run in this block, after `done` steps. See `RunMonitor`.

    Raises:
      UserError: If metrics.jsonl is damaged, or its evaluations were on other data.
    """
    with ExitStack() as stack:
        log: MetricsLog | None = None
        earlier: list[Evaluation] = []
        if is_first_process():
            folder = run.folder
            stack.push(partial(publish_after_failure, folder))
            earlier = truncate_metrics(folder.metrics, done, folder.shown(folder.metrics))
            trackers = [
                stack.enter_context(closing(tracker)) for tracker in open_trackers(run.setup.settings, folder, done)
            ]
            log = stack.enter_context(MetricsLog(folder.metrics, run.names, done, run.steps, trackers))
            if earlier and earlier[-1].step == done:  # TensorBoard discards it
                log.track_evaluation(earlier[-1])
        yield RunMonitor(run, log, earlier, evaluate, data)


def publish_after_failure(folder: RunFolder, error: type[BaseException] | None, *_: object) -> None:
    """Publishes the metrics of the steps since the last checkpoint after an error, if that is still possible."""
    if error is not None and folder.metrics.exists():
        with suppress(UserError, OSError):
            folder.publish_logs()
