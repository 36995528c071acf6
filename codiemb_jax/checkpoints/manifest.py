"""The manifest of a checkpoint: the model's blueprint and the dtype, shape and checksum of every array."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from codiemb_jax.checkpoints.blueprint import Blueprint
from codiemb_jax.checkpoints.checksums import array_checksum, start_tree_checksums
from codiemb_jax.errors import UserError

MANIFEST_KEYS = {"blueprint", "arrays", "step", "digest"}

Arrays = dict[str, tuple[str, list[int], str]]
"""Dtype, shape and checksum of each array of a tree, by path."""

DTYPES = {dtype.name for dtype in (*map(np.dtype, "?bhilBHILefd"), np.dtype(jax.numpy.bfloat16))}


def make_manifest(blueprint: Blueprint, arrays: Mapping[str, Arrays], step: int | None) -> dict[str, Any]:
    """Returns a manifest. `step` is the number of steps after which a run has saved the checkpoint."""
    content = {"blueprint": blueprint.model_dump(mode="json"), "arrays": dict(arrays), "step": step}
    return content | {"digest": digest(content)}


def digest(content: Mapping[str, Any]) -> str:
    """Returns the checksum of all other parts of a manifest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_tree(tree: Any) -> Arrays:
    """Returns the dtype, shape and checksum of each array, by path."""
    return start_describing(tree)()


def start_describing(tree: Any) -> Callable[[], Arrays]:
    """Starts computing `describe_tree` on the devices, and returns a function that waits for it.

    The arrays may be donated meanwhile.
    """
    checksums = start_tree_checksums(tree)
    layout = {path: (leaf.dtype.name, list(leaf.shape)) for path, leaf in leaves_by_path(tree).items()}

    def describe() -> Arrays:
        return {path: (*layout[path], checksum) for path, checksum in leaves_by_path(checksums()).items()}

    return describe


def describe_array(array: np.ndarray) -> tuple[str, list[int], str]:
    """Returns the dtype, shape and checksum of an array."""
    return (array.dtype.name, list(array.shape), array_checksum(array))


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree, by path."""
    return {tree_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def tree_path(keys: Sequence[Any]) -> str:
    """Returns the path of a leaf, such as layers.norm, from its keys in JAX."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def read_arrays(arrays: Any) -> dict[str, Arrays]:
    """Returns the arrays of each tree from a manifest.

    Raises:
      UserError: If they have another form.
    """

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
