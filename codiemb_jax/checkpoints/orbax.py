"""Saves and restores Orbax checkpoints. The only module that imports Orbax.

A checkpoint is a folder with the parameters, the passthrough weights, in a run also the optimizer state, and a
manifest: the model's blueprint and the dtype, shape and checksum of every array. It is written under a temporary name
and renamed when complete; on remote storage, a last file says that it is.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from codiemb_jax.checkpoints.blueprint import Blueprint
from codiemb_jax.checkpoints.checksums import array_checksum, start_tree_checksums
from codiemb_jax.checkpoints.folder import ModelFolder, prefix_errors
from codiemb_jax.checkpoints.safetensors import LazyArray, weight_names
from codiemb_jax.distributed import is_first_process
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import new_folder
from codiemb_jax.models.build import Params
from codiemb_jax.remote import Location, list_names, remote_errors, remove_folder

BLOCKS_PER_AXIS, MIN_BLOCK_SIZE = 16, 128
"""A converted weight is stored in blocks: each of its last two axes is split into 16, but not below 128 elements.
A device reads whole blocks, so it reads only its own shard if the size of the mesh axis divides 16."""

MANIFEST = "blueprint"
"""The item with the manifest. It is written after the arrays, or by Orbax together with them."""

SAVED = re.compile(r"[1-9][0-9]*")
"""Name of a checkpoint. Names of unfinished ones have a suffix."""
LEFTOVER = re.compile(r"\.[1-9][0-9]*\.[0-9a-f]{8}\.deleted|[1-9][0-9]*\.orbax-checkpoint-tmp")
"""Name of a checkpoint while it is being deleted, or written."""
REQUIRED_ITEMS = ("_CHECKPOINT_METADATA", MANIFEST, "params")
"""Files and folders in every complete checkpoint."""
COMMITTED = "commit_success.txt"
"""File that Orbax writes last into a remote checkpoint: there, folders cannot be renamed."""

Arrays = dict[str, tuple[str, list[int], str]]
"""Dtype, shape and checksum of each array of a tree, by path."""

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every save in detail, and errors that it also raises


class DamagedCheckpoint(UserError):
    """Part of a checkpoint is missing or does not match its checksum."""


class OrbaxCheckpoint(ModelFolder):
    """A single checkpoint, of a run or a converted model."""

    def __init__(self, path: Location):
        """Reads the manifest of a checkpoint.

        Raises:
          UserError: If the checkpoint is incomplete, damaged, or from another version of this project.
        """
        if missing := missing_items(path):
            raise DamagedCheckpoint(
                f"{path} is not a checkpoint ({', '.join(missing)} missing); give the output of convert.hf_to_orbax or "
                "checkpoints/STEP of a run"
            )
        self.path = path
        manifest = _read_manifest(path)
        with prefix_errors(path):
            self.blueprint = Blueprint.from_json(manifest["blueprint"])
            self.arrays = _read_arrays(manifest["arrays"])
        self.step = manifest["step"]
        self.config = self.blueprint.config
        self._read_config()
        self.prefix, self.dtypes = self.blueprint.prefix, self.blueprint.dtypes
        self.files, self.code = self.blueprint.files, self.blueprint.code
        self.stored_settings = self.blueprint.encoding
        self.text = self.blueprint.prompt or self.blueprint.sentence
        self.max_tokens = self.blueprint.max_tokens

    def check(self, abstract: Params) -> None:
        expected = {_path(keys): list(leaf.shape) for keys, leaf in _leaves(abstract)}
        found = {path: shape for path, (_, shape, _) in self.arrays["params"].items()}
        problems = [
            f"{path}: {found.get(path, 'missing')} in the checkpoint, {expected.get(path, 'unknown')} in its config"
            for path in sorted(expected.keys() | found.keys())
            if expected.get(path) != found.get(path)
        ]
        layers = self.model_config.layers
        wanted = {name for weight in self.family.weights for name in weight_names(weight, self.prefix, layers)}
        problems += [
            f"{name}: the checkpoint has no dtype for this weight" for name in sorted(wanted - set(self.dtypes))
        ]
        unused, passthrough = set(self.dtypes) - wanted, set(self.arrays.get("passthrough", {}))
        problems += [f"{name}: missing" for name in sorted(unused - passthrough)]
        problems += [f"{name}: the checkpoint has no dtype for this weight" for name in sorted(passthrough - unused)]
        if problems:
            raise UserError(f"{self.path}: the checkpoint is inconsistent:\n" + format_problems(problems))

    def load(self, abstract: Params) -> Params:
        saved = {path.split(".")[0] for path in self.arrays["params"]}  # without a new projection
        wanted = {name: leaf for name, leaf in abstract.items() if name in saved}
        return restore_item(self.path, "params", self.arrays["params"], wanted)

    def stream(self, abstract: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda keys, _: self._lazy("params", _path(keys)), abstract)

    def stream_passthrough(self) -> dict[str, LazyArray]:
        return {name: self._lazy("passthrough", name) for name in self.arrays.get("passthrough", {})}

    def _lazy(self, item: str, path: str) -> LazyArray:
        dtype, shape, checksum = self.arrays[item][path]
        keys = [path] if item == "passthrough" else path.split(".")

        def read() -> np.ndarray:
            value = _restore_one(self.path / item, keys)
            if [value.dtype.name, list(value.shape), array_checksum(value)] != [dtype, shape, checksum]:
                raise _damaged(self.path, f"{item}: {path} does not match its checksum")
            return value

        return LazyArray(tuple(shape), np.dtype(dtype), read)


class RunCheckpoints:
    """The checkpoints of a run, one folder per saved step; saving runs in the background."""

    def __init__(self, folder: Location, keep: int, best: int | None = None):
        """Opens the checkpoints of a run.

        Args:
          folder: Their folder.
          keep: Number of newest checkpoints to keep.
          best: See the attribute.
        """
        self._folder, self._keep = _absolute(folder), keep
        self.best = best
        """A saved step whose checkpoint is kept as well, however old it is."""
        _silence_late_errors()  # a save in the background may fail at any time
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
        with _writable(self._folder):
            self._manager.wait_until_finished()
            describe = {"params": start_describing(params), "optimizer": start_describing(optimizer)}

            def manifest() -> dict[str, Any]:
                arrays = {name: described() for name, described in describe.items()}
                if passthrough:
                    arrays["passthrough"] = {name: _describe(value) for name, value in passthrough.items()}
                return _manifest(blueprint, arrays, step)

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
        with _writable(self._folder):
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


def _absolute(path: Location) -> Location:
    return path.absolute() if isinstance(path, Path) else path


def restore_run(folder: Location, step: int, params: Params, optimizer: Any) -> tuple[Params, Any]:
    """Restores parameters and optimizer state after `step` steps, in the shapes, dtypes and shardings given.

    Raises:
      UserError: If the checkpoint is damaged.
    """
    with _run_checkpoint(folder, step) as checkpoint:
        if "optimizer" not in checkpoint.arrays:
            raise _damaged(checkpoint.path, "the optimizer state is missing")
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
            raise _damaged(checkpoint.path, f"it was saved after {checkpoint.step} steps, and renamed")
        yield checkpoint
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}{hint}") from error


def is_checkpoint(folder: Location) -> bool:
    """Whether a folder is a complete checkpoint of this project."""
    return not missing_items(folder)


def missing_items(folder: Location) -> list[str]:
    """Returns which files and folders of a complete checkpoint are missing.

    Raises:
      UserError: If the folder is remote and cannot be read.
    """
    if isinstance(folder, Path):
        try:
            return [name for name in REQUIRED_ITEMS if not (folder / name).exists()]
        except OSError as error:  # such as a name that is too long
            raise UserError(f"{shorten(str(folder))}: cannot be read: {error.strerror}") from error
    found = list_names(folder)
    return [name for name in (*REQUIRED_ITEMS, COMMITTED) if name not in found]


def save_model(folder: Path, params: Params, passthrough: Mapping[str, Any], blueprint: Blueprint) -> None:
    """Writes a checkpoint without optimizer state. Leaves of `params` and `passthrough` are `LazyArray`s.

    Raises:
      UserError: If the folder exists or cannot be written.
    """
    with new_folder(folder) as new:
        arrays: dict[str, Arrays] = {}
        items: dict[str, Any] = {}
        handlers: dict[str, Any] = {}
        for name, tree in {"params": params, "passthrough": dict(passthrough)}.items():
            if tree:
                handler = _LazyHandler(arrays.setdefault(name, {}))
                registry = ocp.type_handlers.create_type_handler_registry((LazyArray, handler))
                items[name] = ocp.args.PyTreeSave(tree)
                handlers[name] = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
                checkpointer.save(new, args=ocp.args.Composite(**items))
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
                checkpointer.save(new / MANIFEST, args=ocp.args.JsonSave(_manifest(blueprint, arrays, None)))
        except ValueError as error:  # from TensorStore, for example because the disk is full
            raise UserError(f"{folder}: the checkpoint cannot be written ({_library_reason(error)})") from error


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Saves `LazyArray`s one at a time, so that only one is in memory, and records each in `arrays`."""

    def __init__(self, arrays: Arrays):
        super().__init__(deepcopy_host_arrays=False)
        self._arrays = arrays

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list[Any]:
        for i, value in enumerate(values):
            own_args = None if args is None else [args[i]]
            array = np.asarray(value)
            self._arrays[infos[i].name] = _describe(array)
            for future in await super().serialize([array], [infos[i]], own_args):
                future.result()
            del array  # before the next one is read
        return []

    async def _open_and_write(self, value: np.ndarray, tspec: dict[str, Any], ts_context: Any) -> None:
        # Orbax itself splits only into equal parts, and a vocabulary size may be prime.
        blocks = list(value.shape)
        if value.ndim > 1:
            blocks[-2:] = [min(size, max(-(-size // BLOCKS_PER_AXIS), MIN_BLOCK_SIZE)) for size in value.shape[-2:]]
        tspec["metadata"]["chunks"] = blocks
        await super()._open_and_write(value, tspec, ts_context)


def restore_item(folder: Location, item: str, arrays: Arrays, abstract: Any) -> Any:
    """Restores a tree in the shapes, dtypes and shardings of `abstract`, and verifies its checksums.

    Raises:
      UserError: If it is damaged.
    """
    leaves = _leaves(abstract)
    if missing := [path for keys, _ in leaves if (path := _path(keys)) not in arrays]:
        raise _damaged(folder, f"{item}: {', '.join(missing[:5])} missing")

    def stored(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Checksums are of the stored dtype, so cast only after comparing them.
        return jax.ShapeDtypeStruct(leaf.shape, np.dtype(arrays[_path(keys)][0]), sharding=leaf.sharding)

    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(jax.tree_util.tree_map_with_path(stored, abstract))})
    with _readable(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(_absolute(folder), args=args)[item]
    found = describe_tree(restored)
    mismatched = [path for keys, _ in leaves if found[path := _path(keys)] != arrays[path]]
    if mismatched:
        raise _damaged(folder, f"{item}: {', '.join(mismatched[:5])} does not match its checksum")
    return jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), restored, abstract)


def describe_tree(tree: Any) -> Arrays:
    """Returns the dtype, shape and checksum of each array, by path."""
    return start_describing(tree)()


def start_describing(tree: Any) -> Callable[[], Arrays]:
    """Starts computing `describe_tree` on the devices, and returns a function that waits for it.

    The arrays may be donated meanwhile.
    """
    checksums = start_tree_checksums(tree)
    layout = [(_path(keys), leaf.dtype.name, list(leaf.shape)) for keys, leaf in _leaves(tree)]

    def describe() -> Arrays:
        found = [checksum for _, checksum in _leaves(checksums())]
        return {path: (dtype, shape, checksum) for (path, dtype, shape), checksum in zip(layout, found, strict=True)}

    return describe


def _describe(array: np.ndarray) -> tuple[str, list[int], str]:
    return (array.dtype.name, list(array.shape), array_checksum(array))


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _path(keys: Sequence[Any]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def _manifest(blueprint: Blueprint, arrays: Mapping[str, Arrays], step: int | None) -> dict[str, Any]:
    content = {"blueprint": blueprint.model_dump(mode="json"), "arrays": dict(arrays), "step": step}
    return content | {"digest": _digest(content)}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Location) -> dict[str, Any]:
    with _readable(folder), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        manifest = checkpointer.restore(_absolute(folder / MANIFEST))
    if not isinstance(manifest, dict) or set(manifest) != {"blueprint", "arrays", "step", "digest"}:
        raise UserError(f"{folder}: was written by another version of codiemb_jax")
    if manifest.pop("digest") != _digest(manifest):
        raise _damaged(folder, "the manifest does not match its digest")
    return manifest


def _read_arrays(arrays: Any) -> dict[str, Arrays]:
    def is_valid(entry: Any) -> bool:
        match entry:
            case [str(dtype), [*shape], str()]:
                return all(type(size) is int and size >= 0 for size in shape) and dtype in DTYPES
        return False

    if isinstance(arrays, dict) and "params" in arrays and set(arrays) <= {"params", "optimizer", "passthrough"}:
        trees = list(arrays.values())
        if all(isinstance(tree, dict) and all(map(is_valid, tree.values())) for tree in trees):
            return {item: {path: tuple(entry) for path, entry in tree.items()} for item, tree in arrays.items()}
    raise UserError("the manifest does not give the dtype, shape and checksum of each array")


DTYPES = {dtype.name for dtype in (*map(np.dtype, "?bhilBHILefd"), np.dtype(jax.numpy.bfloat16))}


def _damaged(folder: Location, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{folder}: the checkpoint is damaged: {reason}")


@contextmanager
def _writable(folder: Location) -> Iterator[None]:
    """Raises `UserError` if writing a checkpoint in this block fails."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # TensorStore raises ValueError if the disk is full
        reason = _library_reason(error)
        raise UserError(
            f"{folder}: the checkpoint cannot be written ({reason}); fix this and run the same command again to "
            "continue from the last complete one"
        ) from error


def _library_reason(error: Exception) -> str:
    """Returns the reason in an error of Orbax or TensorStore, and silences those that follow from it."""
    _silence_late_errors()
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return " ".join(str(error).partition("See full TensorStore details")[0][:200].split())


@contextmanager
def _readable(folder: Location) -> Iterator[None]:
    """Raises `DamagedCheckpoint` if reading a checkpoint in this block fails."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except PermissionError as error:
        raise UserError(f"{folder}: the checkpoint cannot be read: {error.strerror}") from error
    except Exception as error:  # Orbax raises plain Exception for unreadable files
        if "RESOURCE_EXHAUSTED" in str(error):  # out of device memory
            raise
        raise DamagedCheckpoint(f"{folder}: the checkpoint cannot be read ({_library_reason(error)})") from error


def _silence_late_errors() -> None:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _QuietLateErrors):
        sys.unraisablehook = _QuietLateErrors(sys.unraisablehook)


class _QuietLateErrors:
    """Ignores errors of reads and writes still pending when another fails: they only find the event loop closed."""

    def __init__(self, previous: Callable[[Any], object]):
        self._previous = previous

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._previous(unraisable)


def _restore_one(folder: Location, keys: Sequence[str]) -> np.ndarray:
    """Restores one array of a saved tree."""
    item: Any = 0
    args: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(keys):
        item, args = {key: item}, {key: args}
    with _readable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            _absolute(folder), args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        )
    return jax.tree.leaves(restored)[0]
