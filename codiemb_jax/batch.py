"""What a batch is: rows of tokens, and where each text lies."""

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:  # settings import this module, and a program's help should not wait for JAX
    import jax
    import numpy as np

Array: TypeAlias = "jax.Array | np.ndarray"

Task: TypeAlias = Literal["ir", "sts"]
TASKS: tuple[Task, ...] = ("ir", "sts")

StepTask: TypeAlias = Literal["ir", "sts", "mixed"]
"""What a step trains; `mixed`: each device one task, devices different ones (an ablation)."""


class TokenRows(NamedTuple):
    """Texts laid out in rows, several per row if they fit; every field is int32 [rows, row_length]."""

    tokens: Array
    """Token ids; 0 where there is no token."""
    positions: Array
    """Position of a token in its text, from 0."""
    segment_ids: Array
    """Which text of its row a token belongs to, from 1; 0 is padding."""
    pooling_mask: Array
    """1 where a token counts towards its text's vector, else 0."""


class Batch(NamedTuple):
    """A step's texts, and the examples that they make up.

    The leading axis of every array is split over the devices that hold different rows.  `queries` and `passages` are
    device-local: they index the vectors of their own device, [rows * slots, dim] in row order.  IR: a query, its
    positives, then its negatives.  STS: both texts of a pair, as a query with one passage.
    """

    rows: TokenRows
    """[rows, row_length]"""
    text_ids: Array
    """int32 [rows, slots]: number of each text within the global batch, from which its dropout is drawn; -1: empty"""
    queries: Array
    """int32 [examples]"""
    passages: Array
    """int32 [examples, passages]; -1: the example has no such passage"""
    scores: Array
    """float32 [examples]; NaN: the example has no score (IR)"""
