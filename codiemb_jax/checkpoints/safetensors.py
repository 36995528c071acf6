"""Converts between safetensors files and parameters, bitwise in both directions, with the table of a family.

Parameters are a nested dict of arrays. A path in the table is the keys of a parameter, joined by dots.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from codiemb_jax.checkpoints.families.family import Family, Weight
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import is_bare_name, read_json
from codiemb_jax.models.build import Params

INDEX = "model.safetensors.index.json"

SHARD_BYTES = 2 * 10**9
"""Maximum size of an exported file unless a single weight is larger. Writing a file takes twice its size in memory."""

MODEL_DTYPES = ("F32", "F16", "BF16")
"""Supported dtypes of a model's weights, as safetensors spells them."""

NUMPY_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
"""Supported dtypes of passthrough weights."""


class LazyArray:
    """An array that is read again on each access, so that a model can be converted one weight at a time."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = shape, np.dtype(dtype), read
        self.ndim = len(shape)
        self.size = math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self._read()
        return value if dtype is None else value.astype(dtype, copy=False)


class WeightFiles:
    """The safetensors files of a folder: a single file, or shards with an index.

    Files are open only during a read; the memory map of an open file would keep everything read so far in memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.dtypes: dict[str, str] = {}
        """Dtype of each weight by name, as safetensors spells it."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each weight by name."""
        self._paths: dict[str, Path] = {}
        weight_map = _weight_map(folder)
        for path in _weight_paths(folder, set(weight_map.values()) or {"model.safetensors"}):
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        if name in self._paths:
                            raise UserError(f"{path}: {name} is also in {self._paths[name].name}; remove one of them")
                        weight = file.get_slice(name)
                        self.dtypes[name], self.shapes[name] = weight.get_dtype(), tuple(weight.get_shape())
                        self._paths[name] = path
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: invalid safetensors file: {error}") from error
        if absent := sorted(weight_map.keys() - self.dtypes.keys()):
            raise UserError(f"{folder / INDEX}: weight_map: no file contains {', '.join(absent)}")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a weight, or only the block at `index`."""
        try:
            with safe_open(self._paths[name], framework="numpy") as file:
                return file.get_slice(name)[index] if index else file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._paths[name]}: {name} cannot be read: {error}") from error

    def lazy(self, name: str) -> LazyArray:
        """Returns a weight that is read on demand."""
        return LazyArray(self.shapes[name], NUMPY_DTYPES[self.dtypes[name]], partial(self.read, name))


def _weight_map(folder: Path) -> dict[str, str]:
    """Returns the file of each weight from the shard index; empty if there is no index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    index = read_json(path, dict)
    try:
        weight_map = index["weight_map"]
        names = sorted(set(weight_map.values()), key=str)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: expected a JSON object with `weight_map`") from error
    for name in names:
        if not is_bare_name(name):
            raise UserError(f"{path}: weight_map: {shorten(repr(name))} is not the name of a file in this folder")
    return weight_map


def _weight_paths(folder: Path, names: set[str]) -> list[Path]:
    existing = {path.name for path in folder.iterdir() if path.is_file()}
    if missing := sorted(names - existing):
        raise UserError(
            f"{folder}: {', '.join(missing)} not found; weights must be safetensors "
            "(a pickled pytorch_model.bin is not read: convert it with transformers' save_pretrained)"
        )
    return [folder / name for name in sorted(names)]


def find_prefix(names: Iterable[str], family: Family) -> str:
    """Returns the prefix of the family if any weight has it, as in language-model checkpoints; else an empty string."""
    return family.prefix if any(name.startswith(family.prefix) for name in names) else ""


def _leaf(params: Params, path: str) -> Any:
    for key in path.split("."):
        params = params[key]
    return params


def weight_names(weight: Weight, prefix: str, layers: int) -> list[str]:
    """Returns the checkpoint names of a weight: one per layer, or just one."""
    if "{layer}" not in weight.name:
        return [prefix + weight.name]
    return [prefix + weight.name.format(layer=layer) for layer in range(layers)]


def passthrough_names(names: Iterable[str], family: Family, prefix: str, layers: int) -> list[str]:
    """Returns the names that are not part of the model but that the family passes through."""
    wanted = {name for weight in family.weights for name in weight_names(weight, prefix, layers)}
    return [
        name
        for name in sorted(set(names) - wanted)
        if any(fnmatchcase(name.removeprefix(prefix), pattern) for pattern in family.passthrough)
    ]


def check_weights(
    files: WeightFiles, table: Sequence[Weight], prefix: str, abstract: Params, passthrough: Sequence[str] = ()
) -> None:
    """Compares the names, shapes and dtypes of stored weights with those of the model.

    Args:
      files: The stored weights.
      table: The table of the family.
      prefix: Prefix of the names in the table.
      abstract: The shapes of the parameters.
      passthrough: Additional names that are allowed (see `passthrough_names`).

    Raises:
      UserError: If they differ; the message lists all differences.
    """
    dtypes = files.dtypes
    missing, mismatched, wanted = [], [], set()
    for weight in table:
        leaf = _leaf(abstract, weight.path)
        stacked = "{layer}" in weight.name
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if weight.transpose else shape
        for name in weight_names(weight, prefix, leaf.shape[0]):
            wanted.add(name)
            if name not in dtypes:
                missing.append(f"missing: {name} {list(shape)}")
            elif files.shapes[name] != shape:
                mismatched.append(
                    f"shape: {name} is {list(files.shapes[name])}, expected {list(shape)} from config.json"
                )
            elif dtypes[name] not in MODEL_DTYPES:
                mismatched.append(f"dtype: {name} is {dtypes[name]}, expected one of {', '.join(MODEL_DTYPES)}")
    mismatched += [
        f"dtype: {name} is {dtypes[name]}, expected one of {', '.join(NUMPY_DTYPES)}"
        for name in passthrough
        if dtypes[name] not in NUMPY_DTYPES
    ]
    mismatched += [f"empty: {name} has no values; remove it" for name in passthrough if 0 in files.shapes[name]]
    unexpected = [
        f"unexpected: {name} {list(files.shapes[name])}"
        for name in sorted(set(dtypes) - wanted)
        if name not in passthrough
    ]
    if problems := missing + mismatched + unexpected:
        raise UserError(
            f"{files.folder}: weights do not match config.json:\n" + format_problems(problems, limit=len(problems))
        )


def read_weights(files: WeightFiles, table: Sequence[Weight], prefix: str, abstract: Params) -> Params:
    """Reads all weights in the shapes, dtypes and shardings of `abstract`; each device reads only its own blocks."""

    def read(weight: Weight) -> jax.Array:
        leaf = _leaf(abstract, weight.path)
        names = weight_names(weight, prefix, leaf.shape[0])
        block = _cached(partial(_read_block, files, weight, names, leaf.shape, leaf.dtype))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, block)

    return _tree(table, read)


def stream_weights(files: WeightFiles, table: Sequence[Weight], prefix: str, abstract: Params) -> Params:
    """Returns all weights as `LazyArray`s, in the shapes of `abstract` and their stored dtypes."""

    def lazy(weight: Weight) -> LazyArray:
        shape = _leaf(abstract, weight.path).shape
        names = weight_names(weight, prefix, shape[0])
        dtype = stacked_dtype(files.dtypes, names)
        whole = tuple(slice(0, size) for size in shape)
        return LazyArray(shape, dtype, partial(_read_block, files, weight, names, shape, dtype, whole))

    return _tree(table, lazy)


def stacked_dtype(dtypes: Mapping[str, str], names: Iterable[str]) -> np.dtype:
    """Returns a dtype that represents all of these weights exactly: their common dtype, or float32."""
    distinct = {NUMPY_DTYPES[dtypes[name]] for name in names}
    return distinct.pop() if len(distinct) == 1 else np.dtype(np.float32)


def round_to_stored_dtypes(params: Params, table: Sequence[Weight], prefix: str, dtypes: Mapping[str, str]) -> Params:
    """Returns the weights in the table, rounded to the dtypes in which `write_weights` writes them."""

    def rounded(weight: Weight) -> np.ndarray:
        leaf = np.asarray(_leaf(params, weight.path))
        names = weight_names(weight, prefix, leaf.shape[0])
        if "{layer}" not in weight.name:
            return leaf.astype(NUMPY_DTYPES[dtypes[names[0]]])
        layers = [layer.astype(NUMPY_DTYPES[dtypes[name]]) for layer, name in zip(leaf, names, strict=True)]
        return np.stack(layers, dtype=stacked_dtype(dtypes, names))

    return _tree(table, rounded)


def _tree(table: Sequence[Weight], leaf: Callable[[Weight], Any]) -> Params:
    """Builds the nested dict of parameters by calling `leaf` for each row of the table."""
    params: Params = {}
    for weight in table:
        *parents, last = weight.path.split(".")
        branch = params
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = leaf(weight)
    return params


def _cached(read: Callable[[tuple[slice, ...]], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Caches blocks, so that replicated ones are read only once."""
    blocks: dict[Any, np.ndarray] = {}

    def block(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in blocks:
            blocks[key] = read(index)
        return blocks[key]

    return block


def _read_block(
    files: WeightFiles, weight: Weight, names: list[str], shape: tuple[int, ...], dtype: Any, index: tuple[slice, ...]
) -> np.ndarray:
    """Reads the block at `index` of a weight that has the given shape in the parameters."""

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        value = files.read(name, index[::-1] if weight.transpose else index)
        return value.T if weight.transpose else value

    block = np.empty([len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)], dtype)
    if "{layer}" in weight.name:
        for layer, name in enumerate(names[index[0]]):
            block[layer] = read(name, index[1:])
    else:
        block[...] = read(names[0], index)
    return block


def named_weights(params: Params, table: Sequence[Weight], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields all weights under their checkpoint names, in the layout of the checkpoint."""
    for weight in table:
        leaf = np.asarray(_leaf(params, weight.path))
        names = weight_names(weight, prefix, leaf.shape[0])
        for name, value in zip(names, leaf if "{layer}" in weight.name else [leaf], strict=True):
            yield name, value.T if weight.transpose else value


def write_weights(
    folder: Path,
    params: Params,
    passthrough: Mapping[str, Any],
    table: Sequence[Weight],
    prefix: str,
    dtypes: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes model.safetensors, or shards and an index if it would exceed `shard_bytes`.

    Each weight is written in its original dtype, given by `dtypes`. `LazyArray`s are read one at a time.
    """
    shard: dict[str, np.ndarray] = {}
    paths: list[Path] = []
    weight_map: dict[str, Path] = {}
    total = 0

    def flush() -> None:
        paths.append(folder / f"shard-{len(paths) + 1}.safetensors")
        try:
            save_file(shard, paths[-1], metadata={"format": "pt"})
        except SafetensorError as error:  # not an OSError, even if the disk is full
            if code := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(paths[-1])) from error
            raise
        weight_map.update(dict.fromkeys(shard, paths[-1]))
        shard.clear()

    for name, value in chain(named_weights(params, table, prefix), passthrough.items()):
        value = np.ascontiguousarray(value, dtype=NUMPY_DTYPES[dtypes[name]])
        if shard and sum(weight.nbytes for weight in shard.values()) + value.nbytes > shard_bytes:
            flush()
        shard[name] = value
        total += value.nbytes
    flush()
    if len(paths) == 1:
        paths[0].rename(folder / "model.safetensors")
        return
    # Shard names contain the number of shards, which is known only now.
    final = {path: f"model-{i:05}-of-{len(paths):05}.safetensors" for i, path in enumerate(paths, 1)}
    for path, name in final.items():
        path.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[path] for name, path in sorted(weight_map.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
