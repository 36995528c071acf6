"""Tests that batches of packed texts hold every text once and have little padding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.text.batches import TextBatches, plan_batches

HYPOTHESIS = settings(derandomize=True, deadline=None)


def computed_tokens(batches: TextBatches) -> int:
    return len(batches.texts) * batches.rows * batches.row_length


@HYPOTHESIS
@given(data=st.data())
def test_every_text_is_in_one_batch_and_fits_its_row(data):
    max_tokens = data.draw(st.integers(1, 600))
    lengths = np.array(data.draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=200)))
    max_rows, shards, multiple = (
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 8)),
        data.draw(st.integers(1, 9)),
    )
    batches = plan_batches(lengths, max_tokens, max_rows=max_rows, shards=shards, multiple=multiple)
    assert sorted(np.concatenate(batches.texts)) == list(range(lengths.size))
    assert batches.rows % shards == 0
    assert batches.rows < max_rows + shards
    assert len(batches.texts) == 1 or batches.row_length % multiple == 0
    for texts, text_rows in zip(batches.texts, batches.text_rows, strict=True):
        assert texts.size > 0
        assert text_rows.max() < batches.rows
        assert np.bincount(text_rows, lengths[texts]).max() <= batches.row_length
        assert np.bincount(text_rows).max() <= batches.slots


def test_a_short_list_uses_one_of_a_few_shapes():
    shapes = set()
    for lengths in ([3], [9, 4], [20, 12], [30, 40, 2], [100], [90, 120], [120] * 8):
        batches = plan_batches(np.array(lengths), 512, max_rows=32, shards=1, multiple=8)
        shapes.add((len(batches.texts), batches.rows, batches.row_length, batches.slots))
    assert shapes == {(1, 1, 32, 1), (1, 1, 32, 2), (1, 1, 128, 4), (1, 1, 128, 1), (1, 2, 128, 1), (1, 8, 128, 1)}


def test_equally_long_texts_have_rows_of_their_length():
    batches = plan_batches(np.full(96, 300), 512, max_rows=32, shards=1, multiple=8)
    assert (len(batches.texts), batches.rows, batches.row_length, batches.slots) == (3, 32, 304, 1)


def test_padding_of_real_lengths_is_below_3_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(250) - 0.32, 0.8, 2000), 8, 1000).astype(int)
    batches = plan_batches(lengths, 1024, max_rows=32, shards=1, multiple=8)
    assert 1 - lengths.sum() / computed_tokens(batches) < 0.03
