"""Groups of examples that are compared with each other, gathered across devices where necessary.

Objectives run inside `jax.shard_map`. Device i of the mesh axes, in row-major order, has the b examples of the global
batch that start at i * b. Groups depend on the settings and not on the devices, so the loss and its gradient are the
same for any number of devices.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from codiemb_jax.batch import PassageTexts

Tree = TypeVar("Tree")
Parts = dict[str, jax.Array]
"""Unweighted parts of a loss by name, for logging. Integers are counts."""


class Examples(NamedTuple):
    """The examples of one device as an objective sees them. Embeddings have unit length."""

    queries: jax.Array
    """float32 [examples, dim]"""
    passages: jax.Array
    """float32 [examples, positives + negatives, dim]; an STS pair has its second text as its only passage"""
    present: jax.Array
    """bool [examples, negatives]; False for padding"""
    scores: jax.Array
    """float32 [examples]; NaN for examples without a score"""
    middle: tuple[jax.Array, jax.Array] | None = None
    """Queries and passages embedded by the middle layer; None unless the objective needs them"""
    texts: PassageTexts | None = None
    """Which passages have the same text; None unless the objective needs it"""


class Groups(NamedTuple):
    """Groups of consecutive examples of the global batch, whose examples are compared with each other."""

    size: int | None
    """Examples per group; None means the global batch."""
    axes: tuple[str, ...] = ()
    """Mesh axes over which the global batch is split; () means that it is on one device, without a mesh."""

    def _size(self, b: int) -> int:
        return self.size or (b * jax.lax.axis_size(self.axes) if self.axes else b)

    def _cross_devices(self, b: int) -> bool:
        return bool(self.axes) and b % self._size(b) != 0

    def gathered(self, b: int) -> int:
        """Returns the number of examples that `gather` returns for b examples per device."""
        return b * jax.lax.axis_size(self.axes) if self._cross_devices(b) else b

    def gather(self, tree: Tree, b: int) -> Tree:
        """Gathers the [b, …] examples of all devices if groups cross devices, otherwise returns `tree` unchanged."""
        return jax.lax.all_gather(tree, self.axes, tiled=True) if self._cross_devices(b) else tree

    def positions(self, b: int) -> jax.Array:
        """Returns the index of each of the b examples of this device among those of all gathered devices, int [b]."""
        return jnp.arange(b) + (b * jax.lax.axis_index(self.axes) if self._cross_devices(b) else 0)

    def together(self, first: jax.Array, second: jax.Array, b: int) -> jax.Array:
        """Returns which of two lists of `positions` are in the same group, bool [first, second]."""
        size = self._size(b)
        return first[:, None] // size == second // size

    def membership(self, b: int) -> tuple[jax.Array, jax.Array]:
        """Relates the b examples of this device to the gathered examples.

        Returns:
          The index of each example among the gathered ones, int [b], and which gathered examples are in its group,
          bool [b, gathered].
        """
        own = self.positions(b)
        return own, self.together(own, jnp.arange(self.gathered(b)), b)

    def ring_size(self, b: int) -> int:
        """Returns the number of devices that the examples of a device must visit to meet their whole group."""
        if not self._cross_devices(b):
            return 1
        return self._size(b) // b if self._size(b) % b == 0 else jax.lax.axis_size(self.axes)

    def rotate(self, tree: Tree, b: int) -> Tree:
        """Moves arrays to the next device of their ring of `ring_size` devices."""
        size = self.ring_size(b)
        if size == 1:
            return tree
        devices = range(jax.lax.axis_size(self.axes))
        return jax.lax.ppermute(tree, self.axes, [(i, i // size * size + (i + 1) % size) for i in devices])

    def split(self, tree: Tree, b: int) -> Tree:
        """Splits [b, …] examples into whole groups, [groups, size, …].

        If groups cross devices, every device gets all groups. This is cheap because list-wise losses need little data.
        """
        size = self._size(b)
        return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), self.gather(tree, b))

    def sum(self, tree: Tree) -> Tree:
        """Sums over devices."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def mean(self, tree: Tree) -> Tree:
        """Averages over devices."""
        return jax.lax.pmean(tree, self.axes) if self.axes else tree
