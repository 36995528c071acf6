"""Exact nearest-neighbor search on all devices, in memory that does not grow with the corpus."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEVICES = "devices"
"""Name of the mesh axis over which the vectors of a block are split."""
QUERIES_PER_BLOCK = 1024
"""Queries that are compared with a block at a time."""
VECTORS_PER_BLOCK = 16_384
"""Corpus vectors that a caller should give at a time."""


class TopK:
    """Collects the corpus vectors with the largest inner products with each query.

    Ties are broken by position: of two corpus vectors with the same score, the earlier one is nearer.
    """

    def __init__(self, queries: np.ndarray, k: int):
        """Prepares a search.

        Args:
          queries: float32 [queries, dim]
          k: Number of corpus vectors to find for each query.
        """
        self._k = k
        self._mesh = Mesh(np.array(jax.local_devices()), DEVICES)
        self._queries = [queries[i : i + QUERIES_PER_BLOCK] for i in range(0, len(queries), QUERIES_PER_BLOCK)]
        self._scores = np.full((len(queries), k), -np.inf, np.float32)
        self._indices = np.full((len(queries), k), -1, np.int64)
        self._seen = 0

    def add(self, block: np.ndarray, excluded: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Compares the next corpus vectors with all queries.

        Args:
          block: float32 [vectors, dim]
          excluded: Pairs that must not be found: the indices of queries, in ascending order, and the positions of
            vectors in the block, int64 [pairs].
        """
        excluded = excluded or (np.empty(0, np.int64), np.empty(0, np.int64))
        devices = self._mesh.size
        padded = -(-_round_up(len(block)) // devices) * devices
        rows = np.zeros((padded, block.shape[1]), np.float32)
        rows[: len(block)] = block
        vectors = jax.device_put(rows, NamedSharding(self._mesh, PartitionSpec(DEVICES)))
        k = min(self._k, padded // devices)
        start = 0
        for queries in self._queries:
            pairs = slice(*np.searchsorted(excluded[0], (start, start + len(queries))))
            rows, columns = excluded[0][pairs] - start, excluded[1][pairs]
            padding = (0, _round_up(len(rows)) - len(rows))
            with jax.set_mesh(self._mesh):  # training has set another one
                scores, positions = _nearest(
                    queries,
                    vectors,
                    np.int32(len(block)),
                    np.pad(rows, padding).astype(np.int32),
                    np.pad(columns, padding, constant_values=padded).astype(np.int32),  # outside the block
                    k,
                    self._mesh,
                )
            self._merge(slice(start, start + len(queries)), np.asarray(scores), np.asarray(positions) + self._seen)
            start += len(queries)
        self._seen += len(block)

    def _merge(self, rows: slice, scores: np.ndarray, indices: np.ndarray) -> None:
        # The vectors found earlier come first, and the sort is stable.
        scores = np.concatenate([self._scores[rows], scores], axis=1)
        indices = np.where(np.isneginf(scores), -1, np.concatenate([self._indices[rows], indices], axis=1))
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self._k]
        self._scores[rows] = np.take_along_axis(scores, order, axis=1)
        self._indices[rows] = np.take_along_axis(indices, order, axis=1)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores, float32 [queries, k], in descending order, and the indices in the corpus, int64.

        Where the corpus has fewer than k vectors, the rest is -inf and -1.
        """
        return self._scores, self._indices


def _round_up(size: int) -> int:
    """Returns a power of two that is at least `size`, because each new size compiles a program."""
    return 1 << max(size - 1, 0).bit_length()


@partial(jax.jit, static_argnums=(5, 6))
def _nearest(
    queries: jax.Array, vectors: jax.Array, valid: jax.Array, rows: jax.Array, columns: jax.Array, k: int, mesh: Mesh
) -> tuple[jax.Array, ...]:
    """Returns the scores and positions of the k nearest vectors of each device, [queries, devices x k].

    Only the first `valid` vectors count, and of these not the pairs of `rows` (queries) and `columns` (vectors).
    """

    def local(vectors: jax.Array) -> tuple[jax.Array, ...]:
        scores = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
        start = jax.lax.axis_index(DEVICES) * len(vectors)
        positions = start + jnp.arange(len(vectors))
        scores = jnp.where(positions < valid, scores, -jnp.inf)
        # Negative indices would count from the end.
        here = jnp.where(columns < start, len(vectors), columns - start)
        scores = scores.at[rows, here].set(-jnp.inf, mode="drop")
        scores, found = jax.lax.top_k(scores, k)
        return scores, positions[found]

    split = PartitionSpec(None, DEVICES)
    return jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(DEVICES), out_specs=(split, split))(vectors)


def search(queries: np.ndarray, blocks: Iterable[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k corpus vectors with the largest inner products with each query. See `TopK`.

    Args:
      queries: float32 [queries, dim]
      blocks: The corpus in blocks, float32 [vectors, dim], of at most about `VECTORS_PER_BLOCK` vectors.
      k: Number of corpus vectors to find for each query.
    """
    top = TopK(queries, k)
    for block in blocks:
        top.add(block)
    return top.result()
