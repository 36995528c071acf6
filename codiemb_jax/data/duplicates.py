"""Finds passages of a batch that have the same text, from the hashes in the index."""

from collections.abc import Sequence

import numpy as np

from codiemb_jax.batch import PassageTexts
from codiemb_jax.data.index import Index
from codiemb_jax.text.rows import ragged_ranges

MIN_POSITIVES = 4
"""Minimum number of positives per example. More are rarely in one batch, and a step is compiled for each number."""


def find_texts(parts: Sequence[tuple[Index, np.ndarray, np.ndarray]]) -> PassageTexts:
    """Numbers the texts of the passages of a batch.

    Args:
      parts: The index of a dataset, examples, and their passages as in `StepPlan.passages`, for each part of the batch.

    Returns:
      The texts of all parts. The number of positives is a power of two, so that few different shapes are compiled.
    """
    passages = np.concatenate([passages for _, _, passages in parts])
    is_present = passages >= 0
    hashes = np.concatenate([index.hashes(examples, own) for index, examples, own in parts])
    known, numbers = np.unique(hashes[is_present], return_inverse=True)
    texts = np.full(passages.shape, -1, np.int32)
    texts[is_present] = numbers
    # All positives in the data, as one list.
    counts, positives = map(
        np.concatenate, zip(*(index.positive_hashes(examples) for index, examples, _ in parts), strict=True)
    )
    numbers = np.searchsorted(known, positives).clip(max=known.size - 1)
    pairs = np.repeat(np.arange(counts.size), counts) * known.size + numbers
    examples, numbers = np.divmod(np.unique(pairs[known[numbers] == positives]), known.size)
    counts = np.bincount(examples, minlength=counts.size)
    width = max(MIN_POSITIVES, 1 << (int(counts.max()) - 1).bit_length())
    by_example = np.full((counts.size, width), -2, np.int32)
    by_example[examples, ragged_ranges(np.zeros_like(counts), counts)] = numbers
    return PassageTexts(texts, by_example)
