"""Packs a list of texts into batches of one shape, to encode them."""

from dataclasses import dataclass

import numpy as np

from codiemb_jax.text.rows import pack, padded_count, padded_length

SHORT_ROW = 128
"""Rows for short texts have at least this many tokens if there are that many: short rows waste the least."""


@dataclass(frozen=True)
class TextBatches:
    """Batches that differ only in their texts, so that the model is compiled once for a list."""

    texts: list[np.ndarray]
    """int [texts], for each batch: the indices of its texts"""
    text_rows: list[np.ndarray]
    """int [texts], for each batch: the rows of its texts"""
    rows: int
    """Number of rows per batch."""
    row_length: int
    """Number of tokens per row, including padding."""
    slots: int
    """Maximum number of texts per row."""


def plan_batches(lengths: np.ndarray, max_tokens: int, *, max_rows: int, shards: int, multiple: int) -> TextBatches:
    """Packs texts into rows that are little longer than the longest text, and distributes the rows over batches.

    Args:
      lengths: int [texts], the number of tokens of each text, at least one text.
      max_tokens: Maximum number of tokens of a text.
      max_rows: Maximum number of rows per batch, before it is rounded up to a multiple of `shards`.
      shards: The number of rows per batch is a multiple of this.
      multiple: If there are several batches, the row length is a multiple of this.
    """
    longest = int(lengths.max())
    row_length = padded_length(max(longest, min(int(lengths.sum()), SHORT_ROW, max_tokens)), max_tokens)
    max_rows = -(-max_rows // shards) * shards
    text_rows = pack(lengths, row_length, row_length)
    if text_rows.max() >= max_rows:  # worth compiling for just this length
        row_length = -(-max(longest, SHORT_ROW) // multiple) * multiple
        text_rows = pack(lengths, row_length, row_length)
    num_rows = int(text_rows.max()) + 1
    num_batches = -(-num_rows // max_rows)
    rows = min(padded_count(-(-num_rows // num_batches), shards), max_rows)
    order = np.argsort(text_rows, kind="stable")
    texts = np.split(order, np.searchsorted(text_rows[order], np.arange(rows, num_rows, rows)))
    per_row = int(np.bincount(text_rows).max())
    return TextBatches(
        texts=texts,
        text_rows=[text_rows[part] % rows for part in texts],
        rows=rows,
        row_length=row_length,
        slots=1 << (per_row - 1).bit_length(),  # few different numbers
    )
