"""Logs metrics to metrics.jsonl and TensorBoard, and shows progress."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from codiemb_jax.data.sampler import StepPlan
from codiemb_jax.errors import UserError
from codiemb_jax.files import write_atomically

SECONDS_BETWEEN_LINES = 30
"""Interval of the progress lines if stderr is not a terminal."""


class MetricsLog:
    """Writes the metrics of each step to metrics.jsonl and TensorBoard, and shows a progress bar.

    A resumed run keeps the lines of the steps before its checkpoint and rewrites the others, so every step has exactly
    one line.
    """

    def __init__(self, path: Path, tensorboard: Path, names: Sequence[str], done: int, total: int, shown: str):
        """Opens the log.

        Args:
          path: The path of metrics.jsonl.
          tensorboard: The folder of TensorBoard event files.
          names: The names of the datasets.
          done: Number of steps done at the checkpoint; 0 for a new run.
          total: Number of steps of the whole run.
          shown: The path of metrics.jsonl in messages.

        Raises:
          UserError: If lines of steps before the checkpoint are missing or damaged.
        """
        _truncate(path, done, shown)
        self._names = names
        self._last = time.perf_counter()
        self._file = path.open("a", buffering=1, encoding="utf-8")  # line-buffered
        self._board = EventFileWriter(str(tensorboard))
        # Makes TensorBoard discard the events that a killed run wrote after its checkpoint.
        self._write_event(done, session_log=SessionLog(status=SessionLog.START))
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
        self._board.close()
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
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        self._write_event(plan.number, summary=summary)
        loss = "skipped" if skipped else f"loss {values['loss']:.4f}"
        status = f"{plan.task:>3} {loss}  {plan.tokens / seconds:,.0f} tokens/s"
        self._progress.update(self._task, completed=plan.number + 1, status=status)
        if not self._console.is_terminal and now - self._printed > SECONDS_BETWEEN_LINES:
            # The progress bar is not shown in log files.
            self._printed = now
            task = self._progress.tasks[self._task]
            left = timedelta(seconds=round(task.time_remaining or 0))
            self._console.print(f"step {plan.number + 1} of {task.total}  {status}  {left} left", soft_wrap=True)

    def _write_event(self, step: int, **content: Any) -> None:
        self._board.add_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        """Waits until all lines are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()


def _truncate(path: Path, done: int, shown: str) -> None:
    """Keeps the lines of steps 0 … done - 1 and removes those that a killed run wrote after its checkpoint."""
    lines = path.read_bytes().splitlines(keepends=True)[:done] if path.exists() else []
    valid = next((step for step, line in enumerate(lines) if not _is_line_of(line, step)), len(lines))
    if valid < done:
        raise UserError(
            f"{shown}: contains only {valid} of the {done} lines before the checkpoint; restore the file, or start "
            "over in another output_dir"
        )
    write_atomically(path, b"".join(lines).decode())


def _is_line_of(line: bytes, step: int) -> bool:
    """Whether a line is complete and belongs to a step."""
    try:
        return line.endswith(b"\n") and json.loads(line.decode("utf-8"))["step"] == step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
