"""Checksums of arrays that detect any changed element and do not depend on the sharding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 2**22
"""Number of elements of a NumPy array to sum at a time."""


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, uint32: a bijection."""
    x ^= x >> 16
    x *= jnp.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _sums(words: jax.Array, offset: jax.Array | int = 0) -> jax.Array:
    """Returns two sums, uint32 [2], over the words, each mixed with its index in C order plus `offset`.

    A sum modulo 2**32 does not depend on the order of its terms, and so not on the number of devices.
    """
    index = jnp.asarray(offset, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size % 2**32) if axis else index
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = _mix(words.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B9)))
    again = (mixed ^ (mixed >> 15)) * jnp.uint32(0x27D4EB2F)
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in (mixed, again ^ (again >> 13))])


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _tree_sums(tree: Any) -> Any:
    def array_sums(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        return _sums(jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]))

    return jax.tree.map(array_sums, jax.device_put(tree, jax.memory.Space.Device))  # it may be in host memory


_tree_sums_jitted = jax.jit(_tree_sums)
_sums_jitted = jax.jit(_sums)


def tree_checksums(tree: Any) -> Any:
    """Returns the checksum of each array in a tree, in hex. Elements may have at most four bytes."""
    return start_tree_checksums(tree)()


def start_tree_checksums(tree: Any) -> Callable[[], Any]:
    """Starts computing `tree_checksums` on the devices, and returns a function that waits for them."""
    sums = _tree_sums_jitted(tree)
    return lambda: jax.tree.map(_hex, jax.device_get(sums))


def array_checksum(array: np.ndarray) -> str:
    """Returns the checksum of a NumPy array, in hex. An element of eight bytes counts as two words."""
    array = np.ascontiguousarray(array).reshape(-1)
    words = array.view(np.uint32 if array.itemsize == 8 else _UNSIGNED[array.itemsize])
    total = np.zeros(2, np.uint32)
    for start in range(0, words.size, CHUNK):
        # A copy, because JAX keeps a reference to its arguments beyond this call, here to the whole array.
        total += np.asarray(_sums_jitted(words[start : start + CHUNK].copy(), np.uint32(start % 2**32)))
    return _hex(total)


def _hex(sums: np.ndarray) -> str:
    return "".join(f"{int(part):08x}" for part in sums)
