"""Tests permutations against a scalar implementation, and that they are bijective and uniform."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from codiemb_jax.data.permutation import permute

HYPOTHESIS = settings(derandomize=True, deadline=None, max_examples=60)
KEYS = st.lists(st.integers(0, 2**40), min_size=1, max_size=4)


def mix(value: int) -> int:
    """SplitMix64's finalizer, without the highest bit."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return (value ^ value >> 31) >> 1


def permute_one(position: int, size: int, key: list[int]) -> int:
    """The permutation of a single position, with Python's integers."""
    high_base = math.isqrt(size - 1) + 1
    low_base = -(-size // high_base)
    round_keys = np.random.SeedSequence(key).generate_state(12, np.uint64).tolist()
    item = position
    while True:
        high, low = divmod(item, low_base)
        for even, odd in zip(round_keys[::2], round_keys[1::2], strict=True):
            high = (high + mix(low ^ even)) % high_base
            low = (low + mix(high ^ odd)) % low_base
        item = high * low_base + low
        if item < size:
            return item


@HYPOTHESIS
@given(st.integers(1, 5000), KEYS)
def test_permutation_is_a_bijection(size, key):
    items = permute(np.arange(size), size, key)
    assert items.dtype == np.int64
    assert sorted(items.tolist()) == list(range(size))


@pytest.mark.parametrize("size", range(1, 40))
def test_permutations_of_few_items_are_bijections(size):
    for key in range(20):
        assert sorted(permute(np.arange(size), size, [key]).tolist()) == list(range(size))


@HYPOTHESIS
@given(st.integers(1, 2**61), KEYS, st.data())
def test_permutation_matches_the_scalar_implementation(size, key, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), max_size=9))
    expected = [permute_one(position, size, key) for position in positions]
    assert permute(np.array(positions, np.int64), size, key).tolist() == expected


@HYPOTHESIS
@given(st.integers(100, 5000), KEYS, st.integers(0, 3), st.integers(1, 2**40))
def test_keys_give_different_permutations(size, key, place, change):
    other = [*key]
    other[place % len(key)] += change
    same = (permute(np.arange(size), size, key) == permute(np.arange(size), size, other)).sum()
    assert same < 12  # one item is expected to be in the same place


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_items_are_equally_frequent(size):
    orders = {order: 0 for order in itertools.permutations(range(size))}
    for key in range(40 * max(len(orders), 24)):
        orders[tuple(permute(np.arange(size), size, [size, key]).tolist())] += 1
    assert chisquare(list(orders.values())).pvalue > 1e-3


@pytest.mark.parametrize("size", [7, 64, 101])
def test_every_item_is_equally_frequent_at_every_position(size):
    counts = np.zeros((size, size))
    for key in range(1500):
        counts[np.arange(size), permute(np.arange(size), size, [size, key])] += 1
    assert chisquare(counts.ravel(), ddof=2 * size - 2).pvalue > 1e-3  # rows and columns have fixed sums


def test_neighbors_in_a_large_permutation_are_unrelated():
    size = 10**9 + 7
    items = permute(np.arange(123, 123 + 20_000), size, [4])
    assert chisquare(np.histogram(items, 50, (0, size))[0]).pvalue > 1e-3
    gaps = np.diff(items) % size
    assert chisquare(np.histogram(gaps, 50, (0, size))[0]).pvalue > 1e-3
