"""A checksum of an array that does not depend on how it is sharded, and notices any changed element."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 2**22
"""Elements of a NumPy array that are summed at a time."""


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer, uint32: different inputs give different outputs."""
    x ^= x >> 16
    x *= jnp.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _sums(words: jax.Array, offset: jax.Array | int = 0) -> jax.Array:
    """Two sums, uint32 [2], over words mixed with their indices in C order, which begin at `offset`.

    A sum modulo 2**32 is the same in any order, and so on any number of devices.
    """
    index = jnp.asarray(offset, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size % 2**32) if axis else index
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = _mix(words.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B9)))
    again = (mixed ^ (mixed >> 15)) * jnp.uint32(0x27D4EB2F)
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in (mixed, again ^ (again >> 13))])


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _of_arrays(tree: Any) -> Any:
    def of_array(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        return _sums(jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]))

    return jax.tree.map(of_array, tree)


_of_arrays_jitted = jax.jit(_of_arrays)
_sums_jitted = jax.jit(_sums)


def tree_checksums(tree: Any) -> Any:
    """The checksum of every array of a tree (elements of at most four bytes), wherever its parts are: hex digits."""
    return jax.tree.map(_hex, jax.device_get(_of_arrays_jitted(tree)))


def array_checksum(array: np.ndarray) -> str:
    """The same of a NumPy array; elements of eight bytes count as two."""
    array = np.ascontiguousarray(array).reshape(-1)
    words = array.view(np.uint32 if array.itemsize == 8 else _UNSIGNED[array.itemsize])
    total = np.zeros(2, np.uint32)
    for start in range(0, words.size, CHUNK):
        total += np.asarray(_sums_jitted(words[start : start + CHUNK], np.uint32(start % 2**32)))
    return _hex(total)


def _hex(sums: np.ndarray) -> str:
    return "".join(f"{int(part):08x}" for part in sums)
