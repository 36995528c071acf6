"""Which examples are compared with each other, and gathering them across devices.

Objectives run inside `jax.shard_map`: device i of the mesh axes, in row-major order, holds the b examples of the global
batch from i * b on.  Which examples form a group is a matter of the settings, not of the devices, so that neither a
loss nor its gradient depends on their number.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")
Parts = dict[str, jax.Array]


class Examples(NamedTuple):
    """What an objective sees of one device's examples.  Vectors have length 1."""

    queries: jax.Array
    """float32 [examples, dim]"""
    passages: jax.Array
    """float32 [examples, positives + negatives, dim]; the second text of an STS pair is its one passage"""
    present: jax.Array
    """bool [examples, negatives]: False where a place holds no negative"""
    scores: jax.Array
    """float32 [examples]; NaN: the example has no score"""
    middle: tuple[jax.Array, jax.Array] | None = None
    """Queries and passages as the middle layer sees them; None unless the objective needs them"""


class Groups(NamedTuple):
    """Groups of consecutive examples of the global batch: those of one group are compared with each other."""

    size: int | None
    """Examples per group; None: the global batch."""
    axes: tuple[str, ...] = ()
    """Mesh axes over which the global batch is split; (): it lies on this device, and there is no mesh."""

    def _size(self, b: int) -> int:
        return self.size or (b * jax.lax.axis_size(self.axes) if self.axes else b)

    def _across_devices(self, b: int) -> bool:
        return bool(self.axes) and b % self._size(b) != 0

    def gather(self, tree: Tree, b: int) -> Tree:
        """Whole groups of [b, …] examples: of all devices if any group lies across devices, else this device's."""
        return jax.lax.all_gather(tree, self.axes, tiled=True) if self._across_devices(b) else tree

    def comparable(self, b: int) -> tuple[jax.Array, jax.Array]:
        """Where this device's b examples are among the gathered ones, int [b], and which of those are in the group of
        each, bool [b, gathered]."""
        own, gathered = jnp.arange(b), b
        if self._across_devices(b):
            own, gathered = own + b * jax.lax.axis_index(self.axes), b * jax.lax.axis_size(self.axes)
        size = self._size(b)
        return own, own[:, None] // size == jnp.arange(gathered) // size

    def lists(self, tree: Tree, b: int) -> Tree:
        """[b, …] examples as whole groups [groups, size, …].

        If groups lie across devices every device gets them all, which is cheap for what little a list needs.
        """
        size = self._size(b)
        return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), self.gather(tree, b))

    def mean(self, tree: Tree) -> Tree:
        """Mean over devices."""
        return jax.lax.pmean(tree, self.axes) if self.axes else tree
