"""Writes the metrics of a run to TensorBoard and Weights & Biases."""

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from codiemb_jax.config import Settings
from codiemb_jax.errors import UserError
from codiemb_jax.training.run_folder import RunFolder


class Tracker(Protocol):
    """Shows the metrics of runs."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes metrics by name. Steps never decrease."""

    def flush(self) -> None:
        """Waits until everything is on disk, if this tracker writes to disk."""

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files."""

    def __init__(self, folder: Path, done: int):
        """Opens a new event file.

        Args:
          folder: The folder of event files.
          done: Number of steps done at the checkpoint; 0 for a new run.
        """
        self._writer = EventFileWriter(str(folder))
        # Makes TensorBoard discard the events that a killed run wrote after its checkpoint.
        self._add(done, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(step, summary=Summary(value=values))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends metrics to Weights & Biases, or keeps them in the folder `wandb` for `wandb sync`.

    All starts of a run belong to one run there, which ignores what it has already seen.
    """

    def __init__(self, folder: RunFolder, settings: Settings):
        """Starts or continues a run.

        Args:
          folder: The folder of the run, in which the folder `wandb` is created.
          settings: The settings of the run, which are also shown as its configuration.

        Raises:
          UserError: If Weights & Biases cannot be reached, or nobody is logged in.
        """
        import wandb  # an extra, and slow to import

        try:
            self._run = wandb.init(
                project=settings.tracking.wandb.project,
                mode=settings.tracking.wandb.mode,
                dir=str(folder.path),
                id=folder.run_id,
                resume="allow",
                name=folder.location.name,
                config=settings.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except wandb.Error as error:
            raise UserError(
                f"tracking.wandb: Weights & Biases cannot be started ({error}); if nobody is logged in, run "
                "`wandb login`; or set tracking.wandb.mode to offline"
            ) from error
        self._failed = False

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._try(lambda: self._run.log(dict(scalars), step=step))

    def flush(self) -> None:
        """Does nothing: metrics are sent in the background."""

    def close(self) -> None:
        self._try(self._run.finish)

    def _try(self, work: Callable[[], object]) -> None:
        """Gives up after an error, because metrics.jsonl has everything, and a run must not end for this."""
        if self._failed:
            return
        try:
            work()
        except Exception as error:
            self._failed = True
            note = f"note: Weights & Biases gets no more metrics: {error}"
            Console(stderr=True).print(note, soft_wrap=True, markup=False, highlight=False)


def open_trackers(settings: Settings, folder: RunFolder, done: int) -> Iterator[Tracker]:
    """Opens the trackers of a run after `done` steps.

    Raises:
      UserError: If Weights & Biases cannot be reached.
    """
    if settings.tracking.tensorboard:
        yield TensorBoard(folder.tensorboard, done)
    if settings.tracking.wandb.project is not None:
        yield WeightsAndBiases(folder, settings)


def check_tracking(settings: Settings) -> None:
    """Checks that the trackers of a run can be used.

    Raises:
      UserError: If Weights & Biases is not installed, or would lose what it keeps.
    """
    if settings.tracking.wandb.project is None:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder of that name, which wandb itself creates, is found as well
        raise UserError('tracking.wandb: Weights & Biases is not installed; run pip install "codiemb-jax[wandb]"')
    if settings.tracking.wandb.mode == "offline" and not isinstance(settings.output_dir, Path):
        raise UserError("tracking.wandb.mode: offline requires a local output_dir")
