"""Which passages have the same text as a positive of a query, and are therefore not used as negatives for it."""

import jax
import jax.numpy as jnp

from codiemb_jax.batch import Array


def has_same_text(positive_texts: Array, passage_texts: Array, own: jax.Array, positives: int) -> jax.Array:
    """Compares passages with the positives of queries, see `PassageTexts`.

    Args:
      positive_texts: int32 [queries, texts], the positives of each query in the data.
      passage_texts: int32 [examples, passages].
      own: bool [queries, examples], which example is that of the query.
      positives: Number of positives among the passages of an example; they come first.

    Returns:
      Which passages have the text of a positive of a query, bool [queries, examples, passages]. The positives of its
      own example are not among them.
    """
    same = jnp.any(positive_texts[:, None, None] == passage_texts[:, :, None], axis=-1)
    return same & ~(own[:, :, None] & (jnp.arange(passage_texts.shape[1]) < positives))
