"""Random permutations of any size that are computed position by position, without storing them."""

import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 12
"""Number of rounds of the Feistel network. With 8, permutations of five items are visibly not uniform."""


def permute(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Returns the items at some positions of a random permutation of range(size).

    A generalized Feistel network (Black and Rogaway, 2002): an index is split into two digits, and each round adds to
    one digit a hash of the other, so it can be undone whatever the hash is. The two bases are about the square root of
    `size`; an index beyond the end is permuted again until it is in range (cycle walking), which is rare.

    Args:
      positions: int [n], each from 0 to size - 1.
      size: Number of items, from 1 and below 2**62.
      key: Nonnegative integers that choose the permutation.

    Returns:
      The items, int64 [n].
    """
    high_base = math.isqrt(size - 1) + 1
    low_base = -(-size // high_base)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    items = positions.astype(np.uint64)
    outside = np.arange(items.size)  # indices of the items that are not in range yet
    while outside.size:
        high, low = np.divmod(items[outside], np.uint64(low_base))
        for i in range(0, ROUNDS, 2):
            high = (high + _hash(low ^ round_keys[i])) % np.uint64(high_base)
            low = (low + _hash(high ^ round_keys[i + 1])) % np.uint64(low_base)
        items[outside] = high * np.uint64(low_base) + low
        outside = outside[items[outside] >= size]
    return items.astype(np.int64)


def _hash(values: np.ndarray) -> np.ndarray:
    """Mixes the bits of uint64 values (the finalizer of SplitMix64), below 2**63, so that sums do not overflow."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(1)
