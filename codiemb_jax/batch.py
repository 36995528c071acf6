"""Batch layout: rows of tokens, and the texts and examples in them."""

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:  # `config` imports this module, and `--help` should not wait for JAX
    import jax
    import numpy as np

Array: TypeAlias = "jax.Array | np.ndarray"

Task: TypeAlias = Literal["ir", "sts"]
TASKS: tuple[Task, ...] = ("ir", "sts")

StepTask: TypeAlias = Literal["ir", "sts", "mixed"]
"""Task of a step. In a `mixed` step (an ablation), each device trains a single task."""


class TokenRows(NamedTuple):
    """Texts laid out in rows, one or several per row. Every field is int32 [rows, row_length]."""

    tokens: Array
    """Token ids; 0 for padding."""
    positions: Array
    """Position of each token in its text, from 0."""
    segment_ids: Array
    """Index of each token's text within the row, from 1; 0 for padding."""
    pooling_mask: Array
    """1 for tokens that are pooled into the text's embedding, else 0."""


class PassageTexts(NamedTuple):
    """Which passages of a batch have the same text. Equal numbers mean equal texts."""

    passages: Array
    """int32 [examples, passages]; -1 for padding"""
    positives: Array
    """int32 [examples, texts]: those that are positives of the example in the data, drawn or not; -2 for padding"""


class Batch(NamedTuple):
    """The texts of a step, grouped into examples.

    The leading axis of every array is sharded over the data and fsdp axes of the mesh. `queries` and `passages` are
    device-local: they index the embeddings of their own device, [rows * slots, dim] in row order. An IR example is a
    query with its positives followed by its negatives. An STS example is a pair, as a query with one passage.
    """

    rows: TokenRows
    """[rows, row_length]"""
    text_ids: Array
    """int32 [rows, slots]: index of each text within the global batch, which seeds its dropout; -1 for empty slots"""
    queries: Array
    """int32 [examples]"""
    passages: Array
    """int32 [examples, passages]; -1 for padding"""
    scores: Array
    """float32 [examples]; NaN for IR"""
    texts: PassageTexts | None = None
    """Only for IR objectives that need it"""
