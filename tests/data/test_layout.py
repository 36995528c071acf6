"""Tests where the texts of a batch lie: that devices are balanced, groups stay together and rows hold their texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codiemb_jax.data.layout import BatchLayout, PackedLayout, PaddedLayout, balanced_order
from codiemb_jax.text.rows import rows_per_chunk


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, int, int | None]:
    """Draws the tokens of examples, a number of devices that divides them, and a group size that divides them."""
    examples = draw(st.integers(1, 64))
    divisors = [i for i in range(1, examples + 1) if examples % i == 0]
    tokens = draw(st.lists(st.integers(1, 5000), min_size=examples, max_size=examples))
    return np.array(tokens), draw(st.sampled_from(divisors)), draw(st.sampled_from([None, *divisors]))


@given(batch=batches())
def test_balanced_order_is_a_permutation_that_keeps_groups_together(batch):
    tokens, devices, group_size = batch
    order = balanced_order(tokens, devices, group_size)
    assert sorted(order.tolist()) == list(range(tokens.size))
    size = group_size or tokens.size
    per_device = tokens.size // devices
    groups = (order // size).reshape(-1, size)
    assert (groups == groups[:, :1]).all()  # the examples of a group are consecutive
    if size < per_device:  # and in the same order, if a device has several groups
        assert (order.reshape(-1, size) % size == np.arange(size)).all()
    else:  # a group stays on its devices
        assert groups[:, 0].tolist() == list(range(tokens.size // size))


@given(batch=batches())
def test_nothing_moves_if_each_device_has_one_group_or_there_is_one_device(batch):
    tokens, devices, group_size = batch
    unchanged = np.arange(tokens.size).tolist()
    assert balanced_order(tokens, devices, tokens.size // devices).tolist() == unchanged
    if not group_size or group_size == tokens.size:
        assert balanced_order(tokens, 1, group_size).tolist() == unchanged


def test_balanced_order_of_a_small_batch():
    tokens = np.array([5, 1, 9, 2, 8, 3, 7, 4])
    # Rounds of two examples, the largest first: 9 and 8; then 7 for the device with 8; then 4 for the one with 14 …
    assert balanced_order(tokens, 2, None).tolist() == [2, 0, 7, 3, 4, 6, 5, 1]
    # Groups of two examples have 6, 11, 11 and 11 tokens.
    assert balanced_order(tokens, 2, 2).tolist() == [2, 3, 6, 7, 4, 5, 0, 1]
    # A group of four examples is on two devices.
    assert balanced_order(tokens, 4, 4).tolist() == [2, 1, 0, 3, 4, 5, 6, 7]


def test_groups_that_are_not_aligned_with_devices_do_not_move():
    tokens = np.array([5, 1, 9, 2, 8, 3])
    assert balanced_order(tokens, 3, 3).tolist() == list(range(6))


def realistic_lengths(seed: int, examples: int = 224) -> np.ndarray:
    """Returns the lengths of queries and of six passages each, with a mean of about 250 tokens."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(20, 61, (examples, 1))
    sigma = 0.7
    passages = rng.lognormal(np.log(250) - sigma**2 / 2, sigma, (examples, 6))
    return np.concatenate([queries, np.clip(passages, 1, 1000).astype(int)], axis=1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("group_size", [None, 4])
def test_devices_have_similar_token_counts(group_size, seed):
    tokens = realistic_lengths(seed).sum(axis=1)
    unordered = tokens.reshape(8, -1).sum(axis=1)
    totals = tokens[balanced_order(tokens, 8, group_size)].reshape(8, -1).sum(axis=1)
    assert totals.max() <= 1.05 * totals.mean()
    assert totals.max() < unordered.max()
    if group_size is None:
        assert totals.max() <= 1.005 * totals.mean()


@pytest.mark.parametrize("seed", range(10))
def test_devices_of_a_large_group_have_similar_token_counts(seed):
    """A group of 112 examples is on four of eight devices."""
    tokens = realistic_lengths(seed).sum(axis=1)
    order = balanced_order(tokens, 8, 112)
    assert order[:112].max() < 112
    for half in np.split(tokens[order], 2):
        totals = half.reshape(4, -1).sum(axis=1)
        assert totals.max() <= 1.01 * totals.mean()


def assert_rows_hold_their_texts(layout: BatchLayout, lengths: np.ndarray) -> None:
    lengths = lengths[layout.order]
    assert layout.text_rows.shape == lengths.shape
    assert ((layout.text_rows >= 0) == (lengths > 0)).all()
    rows = layout.text_rows.reshape(layout.devices, -1)
    assert rows.max() < layout.rows
    for own_rows, own_lengths in zip(rows, lengths.reshape(layout.devices, -1), strict=True):
        present = own_lengths > 0
        totals = np.bincount(own_rows[present], own_lengths[present])
        assert totals.max(initial=0) <= layout.row_length
        assert np.bincount(own_rows[present]).max(initial=0) <= layout.slots


@given(data=st.data())
def test_packed_rows_hold_their_texts(data):
    tokens, devices, group_size = data.draw(batches())
    row_length = data.draw(st.integers(1, 200))
    texts = data.draw(st.integers(2, 7))
    chunks = data.draw(st.integers(1, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    lengths = rng.integers(1, row_length + 1, (tokens.size, texts))
    lengths[:, 1:] *= rng.random((tokens.size, texts - 1)) < 0.8  # some passages are padding
    layout = PackedLayout(row_length, devices, chunks)(lengths, row_length, group_size)
    assert_rows_hold_their_texts(layout, lengths)
    assert layout.rows % rows_per_chunk(layout.rows, chunks) == 0
    assert (layout.row_length, layout.devices) == (row_length, devices)
    assert layout.slots == max(1, row_length // 16)
    assert layout.order.tolist() == balanced_order(lengths.sum(axis=1), devices, group_size).tolist()


def test_packed_layout_of_a_small_batch():
    lengths = np.array([[5, 20, 0], [6, 30, 12], [7, 9, 25], [8, 10, 11]])
    layout = PackedLayout(32, devices=2)(lengths, 64, None)
    # 48 and 29 tokens on the first device, 41 and 25 on the second.
    assert layout.order.tolist() == [1, 0, 2, 3]
    assert layout.text_rows.tolist() == [[2, 0, 1], [2, 1, -1], [0, 2, 0], [2, 1, 1]]
    assert (layout.rows, layout.row_length, layout.slots, layout.devices) == (3, 32, 2, 2)
    assert PackedLayout(32, devices=2, chunks=2)(lengths, 64, None).rows == 4
    assert PackedLayout(32, devices=2, chunks=9)(lengths, 64, None).rows == 3  # chunks of one row


@pytest.mark.parametrize(
    ("devices", "group_size", "maximum"), [(1, None, 0.05), (8, None, 0.08), (8, 56, 0.08), (8, 4, 0.1)]
)
@pytest.mark.parametrize("seed", range(5))
def test_packed_rows_have_little_padding(devices, group_size, maximum, seed):
    lengths = realistic_lengths(seed)
    assert 230 < lengths[:, 1:].mean() < 270
    layout = PackedLayout(1024, devices)(lengths, 1024, group_size)
    assert 1 - lengths.sum() / (devices * layout.rows * 1024) <= maximum
    # Without packing, most tokens are padding.
    padded = PaddedLayout(devices)(lengths, 1024, group_size)
    assert 1 - lengths.sum() / (devices * padded.rows * padded.row_length) > 0.7


def test_packed_batches_have_few_shapes():
    assert len({PackedLayout(1024, 8)(realistic_lengths(seed), 1024, None).rows for seed in range(50)}) <= 5
    assert len({PackedLayout(1024)(realistic_lengths(seed), 1024, None).rows for seed in range(50)}) <= 5


@pytest.mark.parametrize("group_size", [None, 2])
def test_padded_layout_has_one_text_per_row(group_size):
    lengths = np.array([[5, 20, 0], [6, 30, 12], [7, 9, 25], [8, 0, 0]])
    layout = PaddedLayout(2)(lengths, 100, group_size)
    assert layout.order.tolist() == [0, 1, 2, 3]
    # The queries of a device come first, then the passages of each of its examples.
    assert layout.text_rows.tolist() == [[0, 2, -1], [1, 4, 5], [0, 2, 3], [1, -1, -1]]
    assert layout.row_length == 50  # 25 < 30 <= 50 = 100 / 2
    assert (layout.rows, layout.slots, layout.devices) == (6, 1, 2)
    single = PaddedLayout()(lengths, 30, group_size)
    assert single.text_rows.tolist() == [[0, 4, -1], [1, 6, 7], [2, 8, 9], [3, -1, -1]]
    assert (single.rows, single.row_length, single.slots, single.devices) == (12, 30, 1, 1)
