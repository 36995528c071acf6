"""InfoNCE: a vector should score its partner above all other candidates."""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.groups import Examples, Groups, Parts

# A TPU rounds float32 factors to bfloat16 by default; divided by a temperature of 0.02 that error shows.
EXACT = jax.lax.Precision.HIGHEST


def info_nce(
    queries: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    own: jax.Array,
    comparable: jax.Array,
    present: jax.Array,
    temperature: float,
) -> jax.Array:
    """InfoNCE with several positives (CoDiEmb, arXiv 2508.11442): one loss for each query.

    queries: [queries, dim]; positives: [examples, positives, dim]; negatives: [examples, negatives, dim].
    own: [queries], the example each query belongs to.  comparable: [queries, examples], which examples are
    in a query's pool, its own among them.  present: [examples, negatives], False where a slot holds no
    negative.  Returns [queries].

    For each k the candidates are the k-th positives and all present negatives of the comparable examples;
    the loss is the mean over k of -log softmax(score / temperature) at the query's own k-th positive.
    A pool may be without negatives, and the negatives axis may be empty.
    """
    to_positives = jnp.einsum("qd,epd->qep", queries, positives, precision=EXACT) / temperature
    to_negatives = jnp.einsum("qd,end->qen", queries, negatives, precision=EXACT) / temperature
    # A finite floor, not -inf: the gradient of a log-sum-exp of nothing passes through 0 / 0.
    floor = jnp.finfo(to_negatives.dtype).min / 2
    to_negatives = jnp.where(comparable[:, :, None] & present, to_negatives, floor)
    all_negatives = logsumexp(to_negatives, axis=(1, 2))
    all_positives = logsumexp(to_positives, axis=1, where=comparable[:, :, None])
    to_own = to_positives[jnp.arange(len(queries)), own]
    return jnp.mean(jnp.logaddexp(all_positives, all_negatives[:, None]) - to_own, axis=1)


def in_batch_info_nce(
    first: jax.Array, second: jax.Array, scores: jax.Array, temperature: float, threshold: float
) -> jax.Array:
    """InfoNCE over the pairs that are alike: the mean over pairs with score >= threshold (CoDiEmb).

    first, second: [pairs, dim]; scores: [pairs].  The candidates of a first text are all second texts.
    Returns a scalar; 0, with a zero gradient, if no pair reaches the threshold.
    """
    similarity = jnp.einsum("id,jd->ij", first, second, precision=EXACT) / temperature
    losses = logsumexp(similarity, axis=1) - jnp.diagonal(similarity)
    alike = scores >= threshold
    return jnp.sum(jnp.where(alike, losses, 0)) / jnp.maximum(jnp.sum(alike), 1).astype(losses.dtype)


def info_nce_ir(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """InfoNCE of each query over the passages of its pool, CoDiEmb's objective of retrieval.

    Only passages are gathered from other devices.  Returns the mean over all queries of the global batch.
    """
    b = len(examples.queries)
    passages, present = groups.gather((examples.passages, examples.present), b)
    positives, negatives = jnp.split(passages, [passages.shape[1] - present.shape[1]], axis=1)
    own, comparable = groups.comparable(b)
    losses = info_nce(examples.queries, positives, negatives, own, comparable, present, settings.temperature)
    loss = groups.mean(jnp.mean(losses))
    return loss, {"info_nce": loss}


def info_nce_sts(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """InfoNCE over the pairs of a list that are alike: a baseline of similarity.  Returns the mean over lists."""
    b = len(examples.scores)
    lists = groups.lists((examples.queries, examples.passages[:, 0], examples.scores), b)

    def of_list(first: jax.Array, second: jax.Array, scores: jax.Array) -> jax.Array:
        return in_batch_info_nce(first, second, scores, settings.temperature, settings.mid_info_nce_threshold)

    loss = groups.mean(jnp.mean(jax.vmap(of_list)(*lists)))
    return loss, {"info_nce": loss}
