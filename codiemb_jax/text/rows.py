"""Lays out tokenized texts in rows: one text per row, or packed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from codiemb_jax.batch import TokenRows
from codiemb_jax.text.prompts import Tokens


class Texts(NamedTuple):
    """Tokenized texts in one array, without an object per text."""

    ids: np.ndarray
    """int32 [tokens]: the tokens of all texts"""
    lengths: np.ndarray
    """int [texts]: number of tokens of each text"""
    content_starts: np.ndarray
    """int [texts]: `Tokens.content_start` of each text"""

    @classmethod
    def join(cls, texts: Sequence[Tokens]) -> "Texts":
        return cls(
            np.concatenate([np.empty(0, np.int32), *(text.ids for text in texts)]),
            np.array([text.ids.size for text in texts], np.int32),
            np.array([text.content_start for text in texts], np.int32),
        )

    def take(self, indices: np.ndarray) -> "Texts":
        """Returns the texts at some indices, in their order."""
        lengths = self.lengths[indices].astype(np.int64)
        starts = (np.cumsum(self.lengths, dtype=np.int64) - self.lengths)[indices]
        return Texts(self.ids[ragged_ranges(starts, lengths)], lengths, self.content_starts[indices])

    def split(self) -> list[Tokens]:
        """Returns the texts one by one."""
        ends = np.cumsum(self.lengths)
        return [
            Tokens(self.ids[end - length : end], int(start))
            for end, length, start in zip(ends, self.lengths, self.content_starts, strict=True)
        ]


def ragged_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns `start, ..., start + count - 1` for each start and count, one range after the other, int64 [sum]."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1] if ends.size else 0) + np.repeat(starts - (ends - counts), counts)


def lay_out(texts: Texts, rows: np.ndarray, num_rows: int, row_length: int) -> tuple[TokenRows, np.ndarray]:
    """Lays out texts in rows.

    Args:
      texts: The texts.
      rows: int [texts], the row of each text. Texts of the same row follow each other in the given order.
      num_rows: Number of rows.
      row_length: Number of tokens per row.

    Returns:
      The rows, and the slot of each text: its index among the texts of its row, int [texts].
    """
    fields = {name: np.zeros((num_rows, row_length), np.int32) for name in TokenRows._fields}
    slots, columns = np.zeros(rows.size, np.int64), np.zeros(rows.size, np.int64)
    if not rows.size:
        return TokenRows(**fields), slots
    lengths = texts.lengths.astype(np.int64)
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    is_first = np.concatenate([[True], sorted_rows[1:] != sorted_rows[:-1]])
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]  # index in `order` of the first text of the same row
    slots[order] = np.arange(rows.size) - first
    starts = np.cumsum(lengths[order]) - lengths[order]
    columns[order] = starts - starts[first]
    positions = ragged_ranges(np.zeros_like(lengths), lengths)
    index = np.repeat(rows * row_length + columns, lengths) + positions
    fields["tokens"].ravel()[index] = texts.ids
    fields["positions"].ravel()[index] = positions
    fields["segment_ids"].ravel()[index] = np.repeat(slots + 1, lengths)
    fields["pooling_mask"].ravel()[index] = positions >= np.repeat(texts.content_starts, lengths)
    return TokenRows(**fields), slots


def padded_length(longest: int, limit: int) -> int:
    """Returns the smallest of 1/16, 1/8, 1/4, 1/2, 3/4 and all of `limit` that fits `longest` tokens.

    There are only a few lengths because each new shape is compiled once.
    """
    return next(length for length in (-(-limit * part // 16) for part in (1, 2, 4, 8, 12, 16)) if length >= longest)


def padded_count(count: int, multiple: int = 1) -> int:
    """Rounds a number of rows up, by less than its square root plus `multiple`, so there are few different numbers.

    Between batches, the number varies by about its square root.
    """
    step = 2 ** max(0, (count.bit_length() - 3) // 2)
    step = -(-step // multiple) * multiple
    return -(-count // step) * step


def rows_per_chunk(rows: int, max_chunks: int) -> int:
    """Returns the smallest number of rows per chunk with which there are at most `max_chunks` chunks."""
    return -(-rows // max_chunks)


def whole_chunks(rows: int, max_chunks: int) -> int:
    """Rounds a number of rows up to chunks of `rows_per_chunk`, which does not change."""
    size = rows_per_chunk(rows, max_chunks)
    return -(-rows // size) * size


def pack(lengths: np.ndarray, row_length: int, max_texts: int) -> np.ndarray:
    """Assigns texts to rows by best-fit decreasing on the histogram of lengths (arXiv 2107.02027).

    The longest texts come first, and each goes to the fullest row that has room for it. Texts of the same length, and
    rows with the same room, are interchangeable, so they are assigned together.

    Args:
      lengths: int [texts], from 1 to `row_length`.
      row_length: Number of tokens per row.
      max_texts: Maximum number of texts per row.

    Returns:
      The row of each text, int [texts], from 0 without gaps.
    """
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by the room that is left
    rooms = 0  # bit i is set if there are open rows with room for i tokens
    num_texts = [0] * lengths.size  # per row
    num_rows = 0
    assigned: list[int] = []  # the rows of the texts, the longest first
    distinct, counts = np.unique(lengths, return_counts=True)
    # Python's lists and integers are faster here than many small arrays.
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1  # of the fullest row
                chosen = open_rows[room][:count]
                del open_rows[room][:count]
                if not open_rows[room]:
                    rooms ^= 1 << room
            else:
                room = row_length
                per_row = min(row_length // length, max_texts)
                chosen = list(range(num_rows, num_rows - (-count // per_row)))
                num_rows += len(chosen)
            assigned += chosen
            count -= len(chosen)
            for row in chosen:
                num_texts[row] += 1
            still_open = [row for row in chosen if num_texts[row] < max_texts]
            room -= length
            if still_open:
                open_rows[room] += still_open
                rooms |= 1 << room
    rows = np.empty(lengths.size, np.int64)
    rows[np.argsort(-lengths, kind="stable")] = assigned
    return rows
