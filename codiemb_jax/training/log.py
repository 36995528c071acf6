"""Logs metrics to metrics.jsonl and trackers, and shows progress."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from codiemb_jax.data.sampler import StepPlan
from codiemb_jax.errors import UserError
from codiemb_jax.files import write_atomically
from codiemb_jax.training.run_folder import is_metrics
from codiemb_jax.training.selection import Evaluation
from codiemb_jax.training.trackers import Tracker

SECONDS_BETWEEN_LINES = 30
"""Interval of the progress lines if stderr is not a terminal."""


class MetricsLog:
    """Writes the metrics of each step to metrics.jsonl and trackers, and shows a progress bar.

    A resumed run keeps the lines up to its checkpoint and writes the others again (see `truncate_metrics`). So every
    step has exactly one line, and so has every evaluation, after those of the steps before it.
    """

    def __init__(self, path: Path, names: Sequence[str], done: int, total: int, trackers: Sequence[Tracker]):
        """Opens the log.

        Args:
          path: The path of metrics.jsonl, which contains the lines up to the checkpoint and no others.
          names: The names of the datasets.
          done: Number of steps done at the checkpoint; 0 for a new run.
          total: Number of steps of the whole run.
          trackers: Also receive the metrics.
        """
        self._names, self._trackers = names, trackers
        self._last = time.perf_counter()
        self._file = path.open("a", buffering=1, encoding="utf-8")  # line-buffered
        self._console = Console(stderr=True)
        self._printed = self._last
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"),
            console=self._console, speed_estimate_period=3600,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=total, completed=done, status="")
        self._progress.start()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._file.close()
        self._progress.stop()

    def write(self, plan: StepPlan, metrics: Mapping[str, float], skipped: bool = False) -> None:
        """Writes the metrics of one step.

        Args:
          plan: The plan of the step.
          metrics: Its metrics. Those that are NaN or infinite are left out: JSON has no such numbers, and loss parts
            are NaN in mixed steps in which no device has examples of their task.
          skipped: Whether the update of the step was not applied.
        """
        names = [self._names[source] for source in plan.sources]
        values = {name: value for name, value in metrics.items() if math.isfinite(value)}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        line = {
            "step": plan.number,
            "epoch": plan.epoch,
            "task": plan.task,
            "dataset": names if plan.task == "mixed" else names[0],
            **values,
            **({"skipped": True} if skipped else {}),
            "tokens": plan.tokens,
            "computed_tokens": plan.computed_tokens,
            "seconds": seconds,
        }
        self._file.write(json.dumps(line) + "\n")
        scalars = {name if name == "learning_rate" else f"{plan.task}/{name}": value for name, value in values.items()}
        scalars["tokens_per_second"] = plan.tokens / seconds
        self._track(plan.number, scalars)
        loss = "skipped" if skipped else f"loss {values['loss']:.4f}"
        status = f"{plan.task:>3} {loss}  {plan.tokens / seconds:,.0f} tokens/s"
        self._progress.update(self._task, completed=plan.number + 1, status=status)
        if not self._console.is_terminal and now - self._printed > SECONDS_BETWEEN_LINES:
            # The progress bar is not shown in log files.
            self._printed = now
            task = self._progress.tasks[self._task]
            left = timedelta(seconds=round(task.time_remaining or 0))
            self._console.print(f"step {plan.number + 1} of {task.total}  {status}  {left} left", soft_wrap=True)

    def note(self, text: str) -> None:
        """Prints a note above the progress bar."""
        self._console.print(f"note: {text}", soft_wrap=True, markup=False, highlight=False)

    def write_evaluation(self, evaluation: Evaluation, seconds: float, description: str) -> None:
        """Writes an evaluation.

        Args:
          evaluation: The evaluation.
          seconds: How long it took.
          description: What to show about it.
        """
        line = {"step": evaluation.step, "evaluation": evaluation.metrics, "data": evaluation.data, "seconds": seconds}
        self._file.write(json.dumps(line) + "\n")
        self.track_evaluation(evaluation)
        self._console.print(description, soft_wrap=True, markup=False, highlight=False)

    def track_evaluation(self, evaluation: Evaluation) -> None:
        """Gives an evaluation to the trackers."""
        self._track(evaluation.step, {f"evaluation/{name}": value for name, value in evaluation.metrics.items()})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hides the progress bar in this block, whose time does not count for the next step."""
        self._progress.live.transient = True  # otherwise the bar would stay on the screen
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.live.transient = False
            self._progress.start()
            self._last = time.perf_counter()

    def _track(self, step: int, scalars: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.write(step, scalars)

    def flush(self) -> None:
        """Waits until all lines are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for tracker in self._trackers:
            tracker.flush()


def truncate_metrics(path: Path, done: int, shown: str) -> list[Evaluation]:
    """Removes the lines that a killed run wrote after its checkpoint.

    Args:
      path: The path of metrics.jsonl.
      done: Number of steps done at the checkpoint.
      shown: The path in messages.

    Returns:
      The evaluations up to the checkpoint.

    Raises:
      UserError: If lines of steps before the checkpoint are missing or damaged.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    evaluations: list[Evaluation] = []
    steps = 0
    for line in lines:
        evaluation = _evaluation_of(line, steps)
        if evaluation is not None:
            evaluations.append(evaluation)
        elif steps < done and _is_line_of(line, steps):
            steps += 1
        else:
            break
    if steps < done:
        raise UserError(
            f"{shown}: contains only {steps} of the {done} lines before the checkpoint; restore the file, or start "
            "over in another output_dir"
        )
    write_atomically(path, b"".join(lines[: steps + len(evaluations)]).decode())
    return evaluations


def _is_line_of(line: bytes, step: int) -> bool:
    """Whether a line is complete and belongs to a step."""
    values = _parse(line)
    return values.get("step") == step and "evaluation" not in values


def _evaluation_of(line: bytes, step: int) -> Evaluation | None:
    """Parses the line of the evaluation after `step` steps; returns None for any other line."""
    if b'"evaluation"' not in line:
        return None
    values = _parse(line)
    metrics, data = values.get("evaluation"), values.get("data")
    if values.get("step") == step and is_metrics(metrics) and isinstance(data, str):
        return Evaluation(step, metrics, data)
    return None


def _parse(line: bytes) -> dict[str, Any]:
    """Returns the object of a complete line, {} if there is none."""
    try:
        values = json.loads(line.decode("utf-8")) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        values = None
    return values if isinstance(values, dict) else {}
