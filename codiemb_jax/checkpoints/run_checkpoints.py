"""The checkpoints of a run, one folder per saved step: saves, deletes and restores them."""

import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from codiemb_jax.checkpoints.blueprint import Blueprint
from codiemb_jax.checkpoints.manifest import describe_array, make_manifest, start_describing
from codiemb_jax.checkpoints.orbax import (
    COMMITTED,
    MANIFEST,
    DamagedCheckpoint,
    OrbaxCheckpoint,
    absolute,
    damaged,
    restore_item,
    silence_late_errors,
    writable,
)
from codiemb_jax.distributed import is_first_process
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import Params
from codiemb_jax.remote import Location, list_names, remote_errors, remove_folder

SAVED = re.compile(r"[1-9][0-9]*")
"""Name of a checkpoint. Names of unfinished ones have a suffix."""
LEFTOVER = re.compile(r"\.[1-9][0-9]*\.[0-9a-f]{8}\.deleted|[1-9][0-9]*\.orbax-checkpoint-tmp")
"""Name of a checkpoint while it is being deleted, or written."""


class RunCheckpoints:
    """The checkpoints of a run, one folder per saved step; saving runs in the background."""

    def __init__(self, folder: Location, keep: int, best: int | None = None):
        """Opens the checkpoints of a run.

        Args:
          folder: Their folder.
          keep: Number of newest checkpoints to keep.
          best: See the attribute.
        """
        self._folder, self._keep = absolute(folder), keep
        self.best = best
        """A saved step whose checkpoint is kept as well, however old it is."""
        silence_late_errors()  # a save in the background may fail at any time
        # Only these and the ones saved later are ever deleted, whatever else appears in the folder.
        self._steps = saved_steps(self._folder)
        if is_first_process():
            _remove_leftovers(self._folder)
        # Orbax does not delete atomically: if the run is killed meanwhile, half a checkpoint stays behind.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._deletions = ThreadPoolExecutor(1)

    def save(
        self,
        step: int,
        params: Params,
        optimizer: Any,
        passthrough: Mapping[str, np.ndarray],
        blueprint: Blueprint,
    ) -> None:
        """Starts saving the state after `step` steps; returns once it has been copied to the host.

        The checksums are computed, and everything is written, while training continues. If the previous checkpoint is
        still being written, this waits for it, so that the host has at most one copy of the state.

        Raises:
          UserError: If this or the previous checkpoint cannot be written, for example because the disk is full.
        """
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(params),
            "optimizer": ocp.args.StandardSave(optimizer),
        }
        if passthrough:
            items["passthrough"] = ocp.args.StandardSave(dict(passthrough))
        with writable(self._folder):
            self._manager.wait_until_finished()
            describe = {"params": start_describing(params), "optimizer": start_describing(optimizer)}

            def manifest() -> dict[str, Any]:
                arrays = {name: described() for name, described in describe.items()}
                if passthrough:
                    arrays["passthrough"] = {name: describe_array(value) for name, value in passthrough.items()}
                return make_manifest(blueprint, arrays, step)

            items[MANIFEST] = _ManifestSave(manifest)
            self._delete_old()
            self._manager.save(step, args=ocp.args.Composite(**items))
        self._steps.append(step)

    def _delete_old(self) -> None:
        """Deletes all but the newest checkpoints and the best one, in the background."""
        if not self._steps or self._steps[-1] not in saved_steps(self._folder):
            return  # the newest one could not be written, so all others stay
        for step in self._steps[: -self._keep]:
            if step == self.best:
                continue
            self._steps.remove(step)
            if is_first_process():
                with suppress(OSError, UserError):  # a checkpoint that cannot be deleted must not stop the run
                    self._deletions.submit(_remove, _invalidate(self._folder / str(step)))

    def close(self) -> None:
        """Waits until all checkpoints are on disk.

        Raises:
          UserError: If the last one cannot be written.
        """
        with writable(self._folder):
            self._manager.wait_until_finished()
        self._delete_old()
        self._deletions.shutdown()
        self._manager.close()


class _ManifestHandler(ocp.JsonCheckpointHandler):
    """Saves a manifest that is computed in the background, because it waits for the checksums."""

    async def _save_fn(self, x: Callable[[], dict[str, Any]], directory: Any) -> None:
        await super()._save_fn(x(), directory)


@ocp.args.register_with_handler(_ManifestHandler, for_save=True, for_restore=True)
@dataclass
class _ManifestSave(ocp.args.CheckpointArgs):
    item: Callable[[], dict[str, Any]]


def saved_steps(folder: Location) -> list[int]:
    """Returns the steps of the checkpoints in a run's checkpoint folder, in order.

    Raises:
      UserError: If the folder is remote and cannot be read.
    """
    if isinstance(folder, Path):
        return sorted(int(child.name) for child in folder.glob("*") if SAVED.fullmatch(child.name) and child.is_dir())
    return sorted(int(child.name) for child in _remote_steps(folder) if _is_committed(child))


def _remote_steps(folder: epath.Path) -> list[epath.Path]:
    """Returns the checkpoints in a remote folder, complete or not."""
    return [folder / name for name in list_names(folder) if SAVED.fullmatch(name)]


def _is_committed(checkpoint: epath.Path) -> bool:
    """Whether all of a remote checkpoint was written.

    The last file alone is left where another run has removed the others while they were being written.
    """
    names = list_names(checkpoint)
    return COMMITTED in names and names != [COMMITTED]


def _invalidate(checkpoint: Location) -> Location:
    """Makes a checkpoint count as deleted, at once; returns where its files are then."""
    if isinstance(checkpoint, Path):
        return checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.deleted"))
    with remote_errors(checkpoint):
        (checkpoint / COMMITTED).unlink()
    return checkpoint


def _remove(checkpoint: Location) -> None:
    if isinstance(checkpoint, Path):
        shutil.rmtree(checkpoint, ignore_errors=True)
    else:
        remove_folder(checkpoint)


def _remove_leftovers(folder: Location) -> None:
    """Removes checkpoints whose deletion or writing was interrupted."""
    if isinstance(folder, Path):
        for leftover in folder.glob("*"):
            if LEFTOVER.fullmatch(leftover.name) and not leftover.is_symlink():
                _remove(leftover)
        return
    for checkpoint in _remote_steps(folder):
        if not _is_committed(checkpoint):
            _remove(checkpoint)


def restore_run(folder: Location, step: int, params: Params, optimizer: Any) -> tuple[Params, Any]:
    """Restores parameters and optimizer state after `step` steps, in the shapes, dtypes and shardings given.

    Raises:
      UserError: If the checkpoint is damaged.
    """
    with _run_checkpoint(folder, step) as checkpoint:
        if "optimizer" not in checkpoint.arrays:
            raise damaged(checkpoint.path, "the optimizer state is missing")
        checkpoint.check(params)
        return checkpoint.load(params), restore_item(
            checkpoint.path, "optimizer", checkpoint.arrays["optimizer"], optimizer
        )


def restore_params(folder: Location, step: int, params: Params) -> Params:
    """Restores the parameters after `step` steps. See `restore_run`."""
    with _run_checkpoint(folder, step) as checkpoint:
        checkpoint.check(params)
        return checkpoint.load(params)


def restore_passthrough(folder: Location, step: int) -> dict[str, np.ndarray]:
    """Restores the passthrough weights from the checkpoint after `step` steps.

    Raises:
      UserError: If the checkpoint is damaged.
    """
    with _run_checkpoint(folder, step) as checkpoint:
        return {name: np.asarray(weight) for name, weight in checkpoint.stream_passthrough().items()}


@contextmanager
def _run_checkpoint(folder: Location, step: int) -> Iterator[OrbaxCheckpoint]:
    """Opens the checkpoint after `step` steps; the error for a damaged one names the previous checkpoint."""
    earlier = [saved for saved in saved_steps(folder) if saved < step]
    hint = f"; move it away to continue from the previous checkpoint, {folder / str(earlier[-1])}" if earlier else ""
    try:
        checkpoint = OrbaxCheckpoint(folder / str(step))
        if checkpoint.step != step:
            raise damaged(checkpoint.path, f"it was saved after {checkpoint.step} steps, and renamed")
        yield checkpoint
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}{hint}") from error
