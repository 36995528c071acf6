"""metrics.jsonl, TensorBoard and the progress bar."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from codiemb_jax.data.sampler import StepPlan
from codiemb_jax.errors import UserError
from codiemb_jax.files import write_atomically

SECONDS_BETWEEN_LINES = 30
"""How often progress is printed where no terminal shows the bar."""


class MetricsLog:
    """One line per step in metrics.jsonl, the same in TensorBoard, and a progress bar on the screen.

    A resumed run keeps the lines of the steps before its checkpoint and writes the rest again, so that each step
    has exactly one line.  `names` are the data sets' names.
    """

    def __init__(self, path: Path, tensorboard: Path, names: Sequence[str], done: int, total: int):
        _keep_lines(path, done)
        self._names = names
        self._last = time.perf_counter()
        self._file = path.open("a", buffering=1, encoding="utf-8")  # a line at a time
        self._board = EventFileWriter(str(tensorboard))
        # TensorBoard forgets what a killed run wrote beyond its checkpoint.
        self._write_event(done, session_log=SessionLog(status=SessionLog.START))
        self._console = Console(stderr=True)
        self._printed = self._last
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self._console, speed_estimate_period=3600, 
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=total, completed=done, shown="")
        self._progress.start()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._file.close()
        self._board.close()
        self._progress.stop()

    def write(self, plan: StepPlan, metrics: Mapping[str, jax.Array]) -> None:
        """Writes one step's line, once the step has run.

        Raises:
          UserError: the loss or the gradient is NaN or infinite.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        names = [self._names[source] for source in plan.sources]
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            fix = (
                "lower optimizer.learning_rate or set optimizer.clip_norm, in another output_dir"
                if plan.number
                else "nothing has been trained yet: look for weights in the model that are NaN, infinite or huge, and "
                "for such settings of the objective"
            )
            raise UserError(
                f"step {plan.number} ({plan.task}, {', '.join(names)}): the loss is {values['loss']}, the "
                f"gradient norm {values['grad_norm']}; {fix}"
            )
        # In a mixed step, the parts of a task that no device holds.
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        line = {
            "step": plan.number,
            "epoch": plan.epoch,
            "task": plan.task,
            "dataset": names if plan.task == "mixed" else names[0],
            **values,
            "tokens": plan.tokens,
            "computed_tokens": plan.computed_tokens,
            "seconds": seconds,
        }
        self._file.write(json.dumps(line) + "\n")
        scalars = {name if name == "learning_rate" else f"{plan.task}/{name}": value for name, value in values.items()}
        scalars["tokens_per_second"] = plan.tokens / seconds
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        self._write_event(plan.number, summary=summary)
        shown = f"{plan.task:>3} loss {values['loss']:.4f}  {plan.tokens / seconds:,.0f} tokens/s"
        self._progress.update(self._task, completed=plan.number + 1, shown=shown)
        if not self._console.is_terminal and now - self._printed > SECONDS_BETWEEN_LINES:
            # A log file shows no bar that moves.
            self._printed = now
            task = self._progress.tasks[self._task]
            left = timedelta(seconds=round(task.time_remaining or 0))
            self._console.print(f"step {plan.number + 1} of {task.total}  {shown}  left {left}", soft_wrap=True)

    def _write_event(self, step: int, **content: Any) -> None:
        self._board.add_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        """Returns once all lines are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()


def _keep_lines(path: Path, done: int) -> None:
    """Leaves the lines of steps 0 … done - 1; what a killed run wrote beyond its checkpoint goes."""
    lines = path.read_bytes().splitlines(keepends=True)[:done] if path.exists() else []
    whole = next((step for step, line in enumerate(lines) if not _is_line(line, step)), len(lines))
    if whole < done:
        raise UserError(
            f"{path}: holds {whole} of the {done} lines before the checkpoint to continue from; put the file back, or "
            "start over in another output_dir"
        )
    write_atomically(path, b"".join(lines).decode())


def _is_line(line: bytes, step: int) -> bool:
    """Whether a line is the complete one of a step."""
    try:
        return line.endswith(b"\n") and json.loads(line.decode("utf-8"))["step"] == step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
