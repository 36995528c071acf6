"""InfoNCE losses, which rank the positive of a text above all other candidates."""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.duplicates import has_same_text
from codiemb_jax.objectives.groups import Examples, Groups, Parts
from codiemb_jax.objectives.numerics import EXACT, mask_value
from codiemb_jax.objectives.ring import ring_info_nce

DENSE_BYTES = 2**27
"""Largest size of the scores of a device at which they are computed at once, see `benchmarks/info_nce.py`.

On one CPU device, the ring is about as fast above it, and needs no memory for scores. The gradient of the dense form
needs two to three times their memory.
"""


def info_nce(
    queries: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    own_example: jax.Array,
    in_pool: jax.Array,
    present: jax.Array,
    temperature: float,
    masked: jax.Array | None = None,
) -> jax.Array:
    """InfoNCE with several positives per query (CoDiEmb, arXiv 2508.11442).

    For each k, the candidates are the k-th positives and all present negatives of the examples in the pool of the
    query, except masked passages. The loss of the query is the mean over k of -log softmax(score / temperature) at its
    own k-th positive.

    Args:
      queries: [queries, dim].
      positives: [examples, positives, dim].
      negatives: [examples, negatives, dim]. Pools may have no negatives, and the negatives axis may be empty.
      own_example: int [queries], the example of each query.
      in_pool: bool [queries, examples], which examples are in the pool of each query, including its own.
      present: bool [examples, negatives], False for padding.
      temperature: The softmax temperature.
      masked: bool [queries, examples, positives + negatives], passages that are not candidates of a query; None for
        none. Never the positives of its own example.

    Returns:
      The loss of each query, [queries].
    """
    to_positives = jnp.einsum("qd,epd->qep", queries, positives, precision=EXACT) / temperature
    to_negatives = jnp.einsum("qd,end->qen", queries, negatives, precision=EXACT) / temperature
    among_positives, among_negatives = in_pool[:, :, None], in_pool[:, :, None] & present
    if masked is not None:
        among_positives &= ~masked[:, :, : positives.shape[1]]
        among_negatives &= ~masked[:, :, positives.shape[1] :]
    to_negatives = jnp.where(among_negatives, to_negatives, mask_value(to_negatives.dtype))
    all_negatives = logsumexp(to_negatives, axis=(1, 2))
    all_positives = logsumexp(to_positives, axis=1, where=among_positives)
    to_own = to_positives[jnp.arange(len(queries)), own_example]
    return jnp.mean(jnp.logaddexp(all_positives, all_negatives[:, None]) - to_own, axis=1)


def in_batch_info_nce(
    first: jax.Array, second: jax.Array, scores: jax.Array, temperature: float, threshold: float
) -> jax.Array:
    """InfoNCE over positive pairs, those with score >= threshold (CoDiEmb).

    Args:
      first: [pairs, dim].
      second: [pairs, dim]. All second texts are candidates for each first text.
      scores: [pairs].
      temperature: The softmax temperature.
      threshold: Minimum score of positive pairs.

    Returns:
      The mean over positive pairs, a scalar; 0 with a zero gradient if there are none.
    """
    similarity = jnp.einsum("id,jd->ij", first, second, precision=EXACT) / temperature
    losses = logsumexp(similarity, axis=1) - jnp.diagonal(similarity)
    positive = scores >= threshold
    return jnp.sum(jnp.where(positive, losses, 0)) / jnp.maximum(jnp.sum(positive), 1).astype(losses.dtype)


def dense_info_nce(examples: Examples, temperature: float, groups: Groups) -> tuple[jax.Array, jax.Array | None]:
    """Gathers the passages of the pools and computes `info_nce` of all queries of this device at once.

    Args:
      examples: The examples of this device. Passages with the text of a positive of a query are masked for that query
        if `texts` is given.
      temperature: The softmax temperature.
      groups: The pools.

    Returns:
      The loss of each query, [examples], and its number of masked passages, int32 [examples] or None without `texts`.
    """
    b = len(examples.queries)
    passages, present = groups.gather((examples.passages, examples.present), b)
    positives, negatives = jnp.split(passages, [passages.shape[1] - present.shape[1]], axis=1)
    own_example, in_pool = groups.membership(b)
    masked, count = None, None
    if examples.texts is not None:
        texts = groups.gather(examples.texts.passages, b)
        own = own_example[:, None] == jnp.arange(len(passages))
        same = has_same_text(examples.texts.positives, texts, own, positives.shape[1])
        masked = in_pool[:, :, None] & same
        count = jnp.sum(masked, axis=(1, 2), dtype=jnp.int32)
    losses = info_nce(examples.queries, positives, negatives, own_example, in_pool, present, temperature, masked)
    return losses, count


def info_nce_ir(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """InfoNCE of each query over the passages in its pool, the retrieval objective of CoDiEmb.

    Small pools are gathered and scored at once, which is faster. Large ones would not fit into memory.

    Returns:
      The mean over all queries of the global batch, and the parts: info_nce and, if `examples.texts` is given, masked,
      the number of pairs of a query and a passage that are masked because the passage has the text of a positive.
    """
    b, texts, _ = examples.passages.shape
    score_bytes = b * groups.gathered(b) * texts * examples.passages.dtype.itemsize
    compute = dense_info_nce if score_bytes <= DENSE_BYTES else ring_info_nce
    losses, masked = compute(examples, settings.temperature, groups)
    loss = groups.mean(jnp.mean(losses))
    return loss, {"info_nce": loss} | ({} if masked is None else {"masked": groups.sum(jnp.sum(masked))})


def info_nce_sts(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """InfoNCE over the positive pairs of each list, a similarity baseline. Returns the mean over lists."""
    b = len(examples.scores)
    lists = groups.split((examples.queries, examples.passages[:, 0], examples.scores), b)

    def list_loss(first: jax.Array, second: jax.Array, scores: jax.Array) -> jax.Array:
        return in_batch_info_nce(first, second, scores, settings.temperature, settings.mid_info_nce_threshold)

    loss = groups.mean(jnp.mean(jax.vmap(list_loss)(*lists)))
    return loss, {"info_nce": loss}
