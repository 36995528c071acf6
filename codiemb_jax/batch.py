"""What a batch is: rows of tokens plus segments.  The one thing that data, models and training share."""

from typing import NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray

ROW_AXES = ("data", "fsdp")
"""Mesh axes over which the leading axis of every array of a batch is spread."""


class Rows(NamedTuple):
    """Texts laid out in rows; every field is int32 [rows, row_length]."""

    tokens: Array
    """Token ids; 0 where there is no token."""
    positions: Array
    """Place of a token in its text, from 0."""
    segments: Array
    """Which text of its row a token belongs to, from 1; 0 is padding."""
    pooled: Array
    """1 where a token counts towards its text's vector, else 0."""


class IRBatch(NamedTuple):
    """A retrieval step's examples."""

    queries: Rows
    """[queries, row_length]"""
    passages: Rows
    """[queries * (positives + negatives), row_length]: each query's positives, then its negatives"""
    present: Array
    """bool [queries, negatives]: False where an example has no negative at all"""


class STSBatch(NamedTuple):
    """A similarity step's pairs."""

    first: Rows
    """[pairs, row_length]"""
    second: Rows
    """[pairs, row_length]"""
    scores: Array
    """float32 [pairs]"""


class MixedBatch(NamedTuple):
    """A step in which each device holds examples of one task, devices of different ones.

    The passages of a pair are its second text and then empty rows; a query has no score.
    """

    queries: Rows
    """[examples, row_length]"""
    passages: Rows
    """[examples * (positives + negatives), row_length]"""
    present: Array
    """bool [examples, negatives]"""
    scores: Array
    """float32 [examples]"""
    is_ir: Array
    """bool [examples]: alike on all of a device"""


Batch = IRBatch | STSBatch | MixedBatch
