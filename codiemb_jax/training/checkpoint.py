"""Checkpoints: what is in them, saving, restoring.  The only file that knows Orbax.

A checkpoint is one folder that holds the parameters, the blueprint of the model, the weights that training does
not touch and, in a run, the optimizer's state.  It is written under another name and renamed when complete, so
a folder that is there is whole.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from codiemb_jax.config import CheckpointSettings
from codiemb_jax.errors import UserError
from codiemb_jax.models.blueprint import Blueprint
from codiemb_jax.models.weights import LazyArray, Params
from codiemb_jax.training.state import TrainState

PARTS, LEAST = 16, 128
"""A converted weight is stored in blocks, of its last two axes a 16th each, but not below 128: devices that share a
weight over a mesh read whole blocks, so no more than their own where their number divides 16."""

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of every save


class Checkpoints:
    """The checkpoints of a run, a folder for each number of steps done; saved in the background."""

    def __init__(self, folder: Path, settings: CheckpointSettings, steps_per_epoch: int):
        self._settings, self._steps_per_epoch = settings, steps_per_epoch
        options = ocp.CheckpointManagerOptions(max_to_keep=settings.keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def due(self, done: int) -> bool:
        """Whether to save when `done` steps are done."""
        steps, epochs = self._settings.every_steps, self._settings.every_epochs
        return bool((steps and done % steps == 0) or (epochs and done % (epochs * self._steps_per_epoch) == 0))

    def latest(self) -> int:
        """Steps done at the newest checkpoint; 0 if there is none."""
        return self._manager.latest_step() or 0

    def save(self, done: int, state: TrainState, untrained: Mapping[str, np.ndarray], blueprint: Blueprint) -> None:
        """Starts saving and returns once the state is copied."""
        items = _items(state.params, untrained, blueprint) | {"optimizer": ocp.args.StandardSave(state.opt_state)}
        self._manager.save(done, args=ocp.args.Composite(**items))

    def restore(self, done: int, abstract: TrainState) -> TrainState:
        """The state after `done` steps, in the shapes, types and shardings of `abstract`.

        UserError if the checkpoint is damaged.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params), optimizer=ocp.args.StandardRestore(abstract.opt_state)
        )
        with _readable(Path(self._manager.directory / str(done)), "; remove it to continue from the one before it"):
            restored = self._manager.restore(done, args=items)
        return TrainState(restored.params, restored.optimizer)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


@contextmanager
def _readable(folder: Path, mend: str = "") -> Iterator[None]:
    """UserError if what is done with a checkpoint fails."""
    try:
        yield
    except Exception as error:  # Orbax raises plain Exception where a file cannot be read
        reason = str(error)[:200]
        raise UserError(f"{folder}: the checkpoint cannot be read{mend} ({reason})") from error


def _items(params: Params, untrained: Mapping[str, np.ndarray], blueprint: Blueprint) -> dict[str, Any]:
    items = {"params": ocp.args.StandardSave(params), "blueprint": ocp.args.JsonSave(blueprint.to_json())}
    if untrained:
        items["untrained"] = ocp.args.StandardSave(dict(untrained))
    return items


def has_checkpoints(folder: Path) -> bool:
    """Whether a run's folder of checkpoints holds a complete one: unfinished ones have longer names."""
    return any(child.name.isdecimal() for child in folder.glob("*"))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint of ours."""
    return (folder / "blueprint").is_dir() and (folder / "params").is_dir()


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Saves `LazyArray`s one after another, so that only one at a time is in memory."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list[Any]:
        for i, value in enumerate(values):
            own_args = None if args is None else [args[i]]
            for future in await super().serialize([np.asarray(value)], [infos[i]], own_args):
                future.result()
        return []

    async def _open_and_write(self, value: np.ndarray, tspec: dict[str, Any], ts_context: Any) -> None:
        # Orbax cuts into equal parts only, and a vocabulary may be prime.
        blocks = list(value.shape)
        if value.ndim > 1:
            blocks[-2:] = [min(size, max(-(-size // PARTS), LEAST)) for size in value.shape[-2:]]
        tspec["metadata"]["chunks"] = blocks
        await super()._open_and_write(value, tspec, ts_context)


def save_model(folder: Path, params: Params, untrained: Mapping[str, Any], blueprint: Blueprint) -> None:
    """Writes a checkpoint without an optimizer's state; `params` and `untrained` hold `LazyArray`s."""
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler(deepcopy_host_arrays=False)))
    items: dict[str, Any] = {"blueprint": ocp.args.JsonSave(blueprint.to_json())}
    handlers: dict[str, Any] = {"blueprint": ocp.JsonCheckpointHandler()}
    for name, tree in {"params": params, "untrained": dict(untrained)}.items():
        if tree:
            items[name] = ocp.args.PyTreeSave(tree)
            handlers[name] = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.Composite(**items))


def stream_params(folder: Path) -> Params:
    """The parameters in a checkpoint as `LazyArray`s."""
    return _stream(folder / "params")


def stream_untrained(folder: Path) -> dict[str, LazyArray]:
    """The weights in a checkpoint that training does not touch, by their names in the Hugging Face folder."""
    return _stream(folder / "untrained") if (folder / "untrained").is_dir() else {}


def _stream(folder: Path) -> Any:
    with _readable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(folder.absolute()).item_metadata.tree

    def lazy(path: Any, leaf: Any) -> LazyArray:
        return LazyArray(leaf.shape, leaf.dtype, partial(_restore_one, folder, [key.key for key in path]))

    return jax.tree_util.tree_map_with_path(lazy, metadata, is_leaf=lambda leaf: hasattr(leaf, "shape"))


def _restore_one(folder: Path, path: Sequence[str]) -> np.ndarray:
    """One array of a saved tree."""
    item: Any = 0
    args: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(path):
        item, args = {key: item}, {key: args}
    with _readable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            folder.absolute(), args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        )
    return jax.tree.leaves(restored)[0]


def restore_blueprint(folder: Path) -> Blueprint:
    """The blueprint in a checkpoint."""
    if not is_checkpoint(folder):
        raise UserError(
            f"{folder} is not a checkpoint; give one that `convert.hf_to_orbax` wrote, or a run's checkpoints/STEP"
        )
    args = ocp.args.Composite(blueprint=ocp.args.JsonRestore())
    with _readable(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        fields = checkpointer.restore(folder.absolute(), args=args).blueprint
    try:
        return Blueprint.from_json(fields)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def restore_params(folder: Path, abstract: Params) -> Params:
    """The parameters in a checkpoint, in the shapes, types and shardings of `abstract`."""
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
    with _readable(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder.absolute(), args=args).params
