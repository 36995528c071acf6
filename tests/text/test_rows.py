"""Tests the layout of tokenized texts in rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from codiemb_jax.text.prompts import Tokens
from codiemb_jax.text.rows import pad, padded_length


def test_each_text_has_a_row_with_padding():
    texts = [Tokens(np.array([7, 8, 9], np.int32), 1), None, Tokens(np.array([5, 6], np.int32), 0)]
    rows = pad(texts, 4)
    assert all(field.dtype == np.int32 for field in rows)
    assert rows.tokens.tolist() == [[7, 8, 9, 0], [0, 0, 0, 0], [5, 6, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert rows.pooling_mask.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]


@given(limit=st.integers(1, 4096), data=st.data())
def test_padded_length_is_sufficient_and_one_of_six(limit, data):
    longest = data.draw(st.integers(1, limit))
    length = padded_length(longest, limit)
    assert longest <= length <= limit
    assert length <= max(2 * longest, -(-limit // 16))
    assert length in {-(-limit * part // 16) for part in (1, 2, 4, 8, 12, 16)}
