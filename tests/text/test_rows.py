"""Tests the layout of tokenized texts in rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from codiemb_jax.text.prompts import Tokens
from codiemb_jax.text.rows import (
    Texts,
    lay_out,
    pack,
    padded_count,
    padded_length,
    ragged_ranges,
    rows_per_chunk,
    whole_chunks,
)


def make_text(ids: list[int], content_start: int) -> Tokens:
    return Tokens(np.array(ids, np.int32), content_start)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 5)), max_size=20))
def test_ragged_ranges(ranges):
    starts, counts = np.array(ranges, np.int64).reshape(-1, 2).T
    actual = ragged_ranges(starts, counts.astype(np.int32))
    assert actual.dtype == np.int64
    assert actual.tolist() == [index for start, count in ranges for index in range(start, start + count)]


def test_one_text_per_row():
    texts = [make_text([7, 8, 9], 1), make_text([5, 6], 0)]
    rows, slots = lay_out(Texts.join(texts), np.array([0, 2]), 3, 4)
    assert all(field.dtype == np.int32 for field in rows)
    assert rows.tokens.tolist() == [[7, 8, 9, 0], [0, 0, 0, 0], [5, 6, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert rows.pooling_mask.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert slots.tolist() == [0, 0]


def test_several_texts_per_row():
    texts = [make_text([7, 8, 9], 1), make_text([5, 6], 0), make_text([4], 0), make_text([3, 2], 1)]
    rows, slots = lay_out(Texts.join(texts), np.array([1, 0, 1, 1]), 2, 7)
    assert rows.tokens.tolist() == [[5, 6, 0, 0, 0, 0, 0], [7, 8, 9, 4, 3, 2, 0]]
    assert rows.positions.tolist() == [[0, 1, 0, 0, 0, 0, 0], [0, 1, 2, 0, 0, 1, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 2, 3, 3, 0]]
    assert rows.pooling_mask.tolist() == [[1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 0]]
    assert slots.tolist() == [0, 0, 1, 2]


def test_rows_without_texts_are_empty():
    rows, slots = lay_out(Texts.join([]), np.zeros(0, int), 2, 3)
    assert [field.tolist() for field in rows] == [[[0] * 3] * 2] * 4
    assert slots.size == 0


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=9), st.data())
def test_texts_are_taken_and_split(ids, data):
    texts = [make_text(own, data.draw(st.integers(0, len(own) - 1))) for own in ids]
    indices = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=12))
    taken = Texts.join(texts).take(np.array(indices, np.int64)).split()
    assert [(text.ids.tolist(), text.content_start) for text in taken] == [
        (ids[i], texts[i].content_start) for i in indices
    ]
    assert {text.ids.dtype for text in taken} <= {np.dtype(np.int32)}


@given(data=st.data())
def test_every_text_is_in_its_slot(data):
    row_length, max_texts = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, row_length), min_size=1, max_size=40))
    starts = [data.draw(st.integers(0, length - 1)) for length in lengths]
    rng = np.random.default_rng(0)
    texts = [
        make_text(rng.integers(1, 99, length).tolist(), start) for length, start in zip(lengths, starts, strict=True)
    ]
    chosen = pack(np.array(lengths), row_length, max_texts)
    rows, slots = lay_out(Texts.join(texts), chosen, int(chosen.max()) + 1, row_length)
    for text, row, slot in zip(texts, chosen, slots, strict=True):
        own = rows.segment_ids[row] == slot + 1
        assert rows.tokens[row, own].tolist() == text.ids.tolist()
        assert rows.positions[row, own].tolist() == list(range(text.ids.size))
        assert rows.pooling_mask[row, own].tolist() == [i >= text.content_start for i in range(text.ids.size)]
    assert (rows.segment_ids > 0).sum() == sum(lengths)
    assert slots.max() < max_texts


def best_fit_decreasing(lengths: list[int], row_length: int, max_texts: int) -> list[int]:
    """Returns the sorted number of tokens in each row of the textbook algorithm, one text at a time."""
    totals: list[int] = []
    counts: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, total in enumerate(totals) if total + length <= row_length and counts[i] < max_texts]
        if fitting:
            fullest = max(fitting, key=lambda i: totals[i])
            totals[fullest] += length
            counts[fullest] += 1
        else:
            totals.append(length)
            counts.append(1)
    return sorted(totals)


@given(data=st.data())
def test_pack_respects_the_limits_and_needs_no_more_rows_than_best_fit_decreasing(data):
    row_length = data.draw(st.integers(1, 100))
    max_texts = data.draw(st.integers(1, 100))
    lengths = np.array(data.draw(st.lists(st.integers(1, row_length), min_size=1, max_size=200)))
    rows = pack(lengths, row_length, max_texts)
    totals, counts = np.bincount(rows, lengths), np.bincount(rows)
    assert totals.max() <= row_length
    assert counts.min() >= 1
    assert counts.max() <= max_texts
    if max_texts >= row_length:  # without a limit on texts, ties are the only difference
        assert totals.size <= len(best_fit_decreasing(lengths.tolist(), row_length, max_texts))


def test_packing_of_real_lengths_leaves_little_padding():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([
        rng.integers(20, 60, 224),  # queries
        np.clip(rng.lognormal(5.3, 0.7, 1344), 10, 1000).astype(int),  # passages, mean 250
    ])  # fmt: skip
    assert lengths[224:].mean() > 230
    rows = pack(lengths, 1024, 64)
    padding = 1 - lengths.sum() / ((rows.max() + 1) * 1024)
    assert padding < 0.01


@given(count=st.integers(1, 10**6), multiple=st.integers(1, 64))
def test_padded_count_adds_less_than_the_square_root_and_a_multiple(count, multiple):
    padded = padded_count(count, multiple)
    assert padded % multiple == 0
    assert count <= padded < count + count**0.5 + multiple


def test_there_are_few_padded_counts():
    assert {padded_count(count, 1) for count in range(25, 39)} == {26, 28, 30, 32, 34, 36, 38}
    assert {padded_count(count, 1) for count in range(1030, 1090)} == {1040, 1056, 1072, 1088, 1104}


@given(count=st.integers(1, 10**4), max_chunks=st.integers(1, 64))
def test_whole_chunks_add_less_than_a_chunk(count, max_chunks):
    rows = whole_chunks(count, max_chunks)
    size = rows_per_chunk(rows, max_chunks)
    assert rows % size == 0
    assert rows // size <= max_chunks
    assert count <= rows < count + size
    assert size == -(-count // max_chunks)


@given(limit=st.integers(1, 4096), data=st.data())
def test_padded_length_is_sufficient_and_one_of_six(limit, data):
    longest = data.draw(st.integers(1, limit))
    length = padded_length(longest, limit)
    assert longest <= length <= limit
    assert length <= max(2 * longest, -(-limit // 16))
    assert length in {-(-limit * part // 16) for part in (1, 2, 4, 8, 12, 16)}
