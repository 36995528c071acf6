"""A single Orbax checkpoint, of a run or a converted model. Only this module and `run_checkpoints` import Orbax.

A checkpoint is a folder with the parameters, the passthrough weights, in a run also the optimizer state, and a
manifest: the model's blueprint and the dtype, shape and checksum of every array. It is written under a temporary name
and renamed when complete; on remote storage, a last file says that it is.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from codiemb_jax.checkpoints.blueprint import Blueprint
from codiemb_jax.checkpoints.folder import ModelFolder, prefix_errors
from codiemb_jax.checkpoints.manifest import (
    MANIFEST_KEYS,
    Arrays,
    describe_array,
    describe_tree,
    digest,
    leaves_by_path,
    make_manifest,
    read_arrays,
    tree_path,
)
from codiemb_jax.checkpoints.safetensors import LazyArray, weight_names
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import new_folder
from codiemb_jax.models.build import Params
from codiemb_jax.remote import Location, list_names

BLOCKS_PER_AXIS, MIN_BLOCK_SIZE = 16, 128
"""A converted weight is stored in blocks: each of its last two axes is split into 16, but not below 128 elements.
A device reads whole blocks, so it reads only its own shard if the size of the mesh axis divides 16."""

MANIFEST = "blueprint"
"""The item with the manifest. It is written after the arrays, or by Orbax together with them."""

REQUIRED_ITEMS = ("_CHECKPOINT_METADATA", MANIFEST, "params")
"""Files and folders in every complete checkpoint."""
COMMITTED = "commit_success.txt"
"""File that Orbax writes last into a remote checkpoint: there, folders cannot be renamed."""

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
            self.arrays = read_arrays(manifest["arrays"])
        self.step = manifest["step"]
        self.config = self.blueprint.config
        self._read_config()
        self.prefix, self.dtypes = self.blueprint.prefix, self.blueprint.dtypes
        self.files, self.code = self.blueprint.files, self.blueprint.code
        self.stored_settings = self.blueprint.encoding
        self.text = self.blueprint.prompt or self.blueprint.sentence
        self.max_tokens = self.blueprint.max_tokens

    def check(self, abstract: Params) -> None:
        expected = {path: list(leaf.shape) for path, leaf in leaves_by_path(abstract).items()}
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
        return jax.tree_util.tree_map_with_path(lambda keys, _: self._lazy("params", tree_path(keys)), abstract)

    def stream_passthrough(self) -> dict[str, LazyArray]:
        return {name: self._lazy("passthrough", name) for name in self.arrays.get("passthrough", {})}

    def _lazy(self, item: str, path: str) -> LazyArray:
        expected = dtype, shape, _ = self.arrays[item][path]
        keys = [path] if item == "passthrough" else path.split(".")

        def read() -> np.ndarray:
            value = _restore_one(self.path / item, keys)
            if describe_array(value) != expected:
                raise damaged(self.path, f"{item}: {path} does not match its checksum")
            return value

        return LazyArray(tuple(shape), np.dtype(dtype), read)


def absolute(path: Location) -> Location:
    """Returns a location as Orbax needs it."""
    return path.absolute() if isinstance(path, Path) else path


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
                checkpointer.save(new / MANIFEST, args=ocp.args.JsonSave(make_manifest(blueprint, arrays, None)))
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
            self._arrays[infos[i].name] = describe_array(array)
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
    paths = leaves_by_path(abstract)
    if missing := [path for path in paths if path not in arrays]:
        raise damaged(folder, f"{item}: {', '.join(missing[:5])} missing")

    def stored(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Checksums are of the stored dtype, so cast only after comparing them.
        return jax.ShapeDtypeStruct(leaf.shape, np.dtype(arrays[tree_path(keys)][0]), sharding=leaf.sharding)

    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(jax.tree_util.tree_map_with_path(stored, abstract))})
    with _readable(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(absolute(folder), args=args)[item]
    found = describe_tree(restored)
    if mismatched := [path for path in paths if found[path] != arrays[path]]:
        raise damaged(folder, f"{item}: {', '.join(mismatched[:5])} does not match its checksum")
    return jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), restored, abstract)


def _read_manifest(folder: Location) -> dict[str, Any]:
    with _readable(folder), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        manifest = checkpointer.restore(absolute(folder / MANIFEST))
    if not isinstance(manifest, dict) or set(manifest) != MANIFEST_KEYS:
        raise UserError(f"{folder}: was written by another version of codiemb_jax")
    if manifest.pop("digest") != digest(manifest):
        raise damaged(folder, "the manifest does not match its digest")
    return manifest


def damaged(folder: Location, reason: str) -> DamagedCheckpoint:
    """Returns the error for a damaged checkpoint."""
    return DamagedCheckpoint(f"{folder}: the checkpoint is damaged: {reason}")


@contextmanager
def writable(folder: Location) -> Iterator[None]:
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
    silence_late_errors()
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


def silence_late_errors() -> None:
    """Hides errors of reads and writes that are still pending when another one fails."""
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
            absolute(folder), args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        )
    return jax.tree.leaves(restored)[0]
