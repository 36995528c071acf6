"""Lays out tokenized texts in rows."""

from collections.abc import Sequence

import numpy as np

from codiemb_jax.batch import TokenRows
from codiemb_jax.text.prompts import Tokens


def pad(texts: Sequence[Tokens | None], row_length: int) -> TokenRows:
    """Lays out one text per row, padded at the end, [texts, row_length]; None becomes an empty row."""
    rows = TokenRows(*(np.zeros((len(texts), row_length), np.int32) for _ in TokenRows._fields))
    for row, text in enumerate(texts):
        if text is not None:
            count = text.ids.size
            rows.tokens[row, :count] = text.ids
            rows.positions[row, :count] = np.arange(count)
            rows.segment_ids[row, :count] = 1
            rows.pooling_mask[row, text.content_start : count] = 1
    return rows


def padded_length(longest: int, limit: int) -> int:
    """Returns the smallest of 1/16, 1/8, 1/4, 1/2, 3/4 and all of `limit` that fits `longest` tokens.

    There are only a few lengths because each new shape is compiled once.
    """
    return next(length for length in (-(-limit * part // 16) for part in (1, 2, 4, 8, 12, 16)) if length >= longest)
