"""safetensors <-> our parameters, by a family's table, both ways and bitwise.

Our parameters are a nested dict of arrays; a weight's path in the table is its keys joined by dots.
"""

import json
import math
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
"""Largest weight file that an export writes, unless a single weight is larger: a file is held in memory twice."""

MODEL_TYPES = ("F32", "F16", "BF16")
"""In what a model's weights may be stored, in safetensors' spelling."""

NUMPY_TYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
"""All that can be carried along."""


class LazyArray:
    """An array that is read anew whenever it is asked for: lets a model pass through memory weight by weight."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = shape, np.dtype(dtype), read
        self.ndim = len(shape)
        self.size = math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self._read()
        return value if dtype is None else value.astype(dtype, copy=False)


class WeightFiles:
    """The safetensors files of a folder: one, or shards with an index.

    A file is open only while something is read, so that no more of it stays in memory than was asked for.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.dtypes: dict[str, str] = {}
        """Type of each weight by name, in safetensors' spelling."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each weight by name."""
        self._paths: dict[str, Path] = {}
        weight_map = _weight_map(folder)
        for path in _weight_paths(folder, set(weight_map.values()) or {"model.safetensors"}):
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():  # noqa: SIM118 (it is no dict)
                        if name in self._paths:
                            raise UserError(f"{path}: {name} is also in {self._paths[name].name}; remove one of them")
                        weight = file.get_slice(name)
                        self.dtypes[name], self.shapes[name] = weight.get_dtype(), tuple(weight.get_shape())
                        self._paths[name] = path
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a readable safetensors file: {error}") from error
        if absent := sorted(weight_map.keys() - self.dtypes.keys()):
            raise UserError(f"{folder / INDEX}: weight_map: no file holds {', '.join(absent)}")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A weight, or the block of it that `index` names; only that much is read."""
        try:
            with safe_open(self._paths[name], framework="numpy") as file:
                return file.get_slice(name)[index] if index else file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._paths[name]}: {name} cannot be read: {error}") from error

    def lazy(self, name: str) -> LazyArray:
        """A weight, read when it is asked for."""
        return LazyArray(self.shapes[name], NUMPY_TYPES[self.dtypes[name]], partial(self.read, name))


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each weight as the index of shards says; empty if there is no index."""
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
    there = {path.name for path in folder.iterdir() if path.is_file()}
    if missing := sorted(names - there):
        raise UserError(
            f"{folder}: {', '.join(missing)} not found; weights must be safetensors "
            "(a pickled pytorch_model.bin is not read: convert it with transformers' save_pretrained)"
        )
    return [folder / name for name in sorted(names)]


def find_prefix(names: Iterable[str], family: Family) -> str:
    """The family's prefix if any weight has it, as in the checkpoint of a language model; else nothing."""
    return family.prefix if any(name.startswith(family.prefix) for name in names) else ""


def _leaf(params: Params, path: str) -> Any:
    for key in path.split("."):
        params = params[key]
    return params


def weight_names(weight: Weight, prefix: str, layers: int) -> list[str]:
    """The checkpoint's names of one of our weights: one a layer, or just one."""
    if "{layer}" not in weight.theirs:
        return [prefix + weight.theirs]
    return [prefix + weight.theirs.format(layer=layer) for layer in range(layers)]


def passthrough_names(names: Iterable[str], family: Family, prefix: str, layers: int) -> list[str]:
    """The names that a folder holds beyond the model and that the family passes through."""
    wanted = {name for weight in family.weights for name in weight_names(weight, prefix, layers)}
    return [
        name
        for name in sorted(set(names) - wanted)
        if any(fnmatchcase(name.removeprefix(prefix), pattern) for pattern in family.passthrough)
    ]


def check_weights(
    files: WeightFiles, table: Sequence[Weight], prefix: str, abstract: Params, passthrough: Sequence[str] = ()
) -> None:
    """Compares names, shapes and types with what the model needs.

    passthrough: names that the files may hold beyond that, see `passthrough_names`.

    Raises:
      UserError: listing every difference.
    """
    dtypes = files.dtypes
    missing, misshaped, wanted = [], [], set()
    for weight in table:
        leaf = _leaf(abstract, weight.ours)
        stacked = "{layer}" in weight.theirs
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if weight.transpose else shape
        for name in weight_names(weight, prefix, leaf.shape[0]):
            wanted.add(name)
            if name not in dtypes:
                missing.append(f"missing: {name} {list(shape)}")
            elif files.shapes[name] != shape:
                misshaped.append(f"shape: {name} is {list(files.shapes[name])}, config.json makes it {list(shape)}")
            elif dtypes[name] not in MODEL_TYPES:
                misshaped.append(f"type: {name} is {dtypes[name]}, supported are {', '.join(MODEL_TYPES)}")
    beyond = sorted(set(dtypes) - wanted)
    misshaped += [
        f"type: {name} is {dtypes[name]}, supported are {', '.join(NUMPY_TYPES)}"
        for name in passthrough
        if dtypes[name] not in NUMPY_TYPES
    ]
    misshaped += [f"empty: {name} has no values; remove it" for name in passthrough if 0 in files.shapes[name]]
    extra = [f"left over: {name} {list(files.shapes[name])}" for name in beyond if name not in passthrough]
    if problems := missing + misshaped + extra:
        raise UserError(
            f"{files.folder}: weights do not fit config.json:\n" + format_problems(problems, limit=len(problems))
        )


def read_weights(files: WeightFiles, table: Sequence[Weight], prefix: str, abstract: Params) -> Params:
    """Reads every weight into the shape, type and sharding of `abstract`, block by block for each device."""

    def read(weight: Weight) -> jax.Array:
        leaf = _leaf(abstract, weight.ours)
        names = weight_names(weight, prefix, leaf.shape[0])
        block = _once_each(partial(_read_block, files, weight, names, leaf.shape, leaf.dtype))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, block)

    return _tree(table, read)


def stream_weights(files: WeightFiles, table: Sequence[Weight], prefix: str, abstract: Params) -> Params:
    """Every weight as a `LazyArray` in the shape of `abstract` and the type in which it came."""

    def lazy(weight: Weight) -> LazyArray:
        shape = _leaf(abstract, weight.ours).shape
        names = weight_names(weight, prefix, shape[0])
        dtype = stored_type(files.dtypes, names)
        whole = tuple(slice(0, size) for size in shape)
        return LazyArray(shape, dtype, partial(_read_block, files, weight, names, shape, dtype, whole))

    return _tree(table, lazy)


def stored_type(dtypes: Mapping[str, str], names: Iterable[str]) -> np.dtype:
    """A type that holds weights of one or several types, bit by bit."""
    several = {NUMPY_TYPES[dtypes[name]] for name in names}
    return several.pop() if len(several) == 1 else np.dtype(np.float32)


def as_stored(params: Params, table: Sequence[Weight], prefix: str, dtypes: Mapping[str, str]) -> Params:
    """Every weight of the table, rounded to the type in which `write_weights` writes it."""

    def stored(weight: Weight) -> np.ndarray:
        leaf = np.asarray(_leaf(params, weight.ours))
        names = weight_names(weight, prefix, leaf.shape[0])
        if "{layer}" not in weight.theirs:
            return leaf.astype(NUMPY_TYPES[dtypes[names[0]]])
        layers = [layer.astype(NUMPY_TYPES[dtypes[name]]) for layer, name in zip(leaf, names, strict=True)]
        return np.stack(layers, dtype=stored_type(dtypes, names))

    return _tree(table, stored)


def _tree(table: Sequence[Weight], leaf: Callable[[Weight], Any]) -> Params:
    """Our nested dict of parameters, each made by `leaf` of its line in the table."""
    params: Params = {}
    for weight in table:
        *parents, last = weight.ours.split(".")
        branch = params
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = leaf(weight)
    return params


def _once_each(read: Callable[[tuple[slice, ...]], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Reads each block once, however many devices hold it."""
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
    """The block of one of our weights, of `shape` as a whole, that `index` names."""

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        value = files.read(name, index[::-1] if weight.transpose else index)
        return value.T if weight.transpose else value

    block = np.empty([len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)], dtype)
    if "{layer}" in weight.theirs:
        for layer, name in enumerate(names[index[0]]):
            block[layer] = read(name, index[1:])
    else:
        block[...] = read(names[0], index)
    return block


def named_weights(params: Params, table: Sequence[Weight], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight under its checkpoint name, in the checkpoint's layout."""
    for weight in table:
        leaf = np.asarray(_leaf(params, weight.ours))
        names = weight_names(weight, prefix, leaf.shape[0])
        for name, value in zip(names, leaf if "{layer}" in weight.theirs else [leaf], strict=True):
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
    """Writes model.safetensors, or shards with an index where they would exceed `shard_bytes`.

    Each weight is written in the type that `dtypes` names, the one in which it came.  Of a `LazyArray`, only one at a
    time is in memory.
    """
    shard: dict[str, np.ndarray] = {}
    paths: list[Path] = []
    weight_map: dict[str, Path] = {}
    total = 0

    def flush() -> None:
        paths.append(folder / f"shard-{len(paths) + 1}.safetensors")
        save_file(shard, paths[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, paths[-1]))
        shard.clear()

    for name, value in chain(named_weights(params, table, prefix), passthrough.items()):
        value = np.ascontiguousarray(value, dtype=NUMPY_TYPES[dtypes[name]])
        if shard and sum(kept.nbytes for kept in shard.values()) + value.nbytes > shard_bytes:
            flush()
        shard[name] = value
        total += value.nbytes
    flush()
    if len(paths) == 1:
        paths[0].rename(folder / "model.safetensors")
        return
    # Their number, which every shard's name holds, is known only now.
    final = {path: f"model-{i:05}-of-{len(paths):05}.safetensors" for i, path in enumerate(paths, 1)}
    for path, name in final.items():
        path.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[path] for name, path in sorted(weight_map.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
