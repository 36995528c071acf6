"""List-wise losses, which compare predicted similarities with the scores of a list of pairs."""

import jax
import jax.numpy as jnp
from jax.nn import log_softmax, logsumexp

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.contrastive import in_batch_info_nce
from codiemb_jax.objectives.groups import Examples, Groups, Parts


def pearson(similarity: jax.Array, scores: jax.Array) -> jax.Array:
    """1 - Pearson correlation, with population moments.

    Args:
      similarity: [pairs].
      scores: [pairs].

    Returns:
      A scalar; 0 with a zero gradient if all scores are equal, otherwise 1 with a finite gradient if all similarities
      are equal.
    """
    predicted, true = _standardize(similarity), _standardize(scores.astype(similarity.dtype))
    return jnp.where(jnp.any(true != 0), 1 - jnp.mean(predicted * true), 0)


def _standardize(values: jax.Array) -> jax.Array:
    """Shifts and scales values, [pairs], to mean 0 and variance 1; returns zeros if all are equal."""
    # Makes equal values exactly 0. Subtracting only the mean may leave rounding errors that the division amplifies.
    values = values - values[0]
    deviations = values - jnp.mean(values)
    variance = jnp.mean(deviations**2)
    return deviations / jnp.sqrt(jnp.where(variance > 0, variance, 1))


def rank_kl(similarity: jax.Array, scores: jax.Array, temperature: float) -> jax.Array:
    """KL divergence between a distribution based on score ranks and one based on similarities (CoDiEmb).

    With n pairs and r the descending rank of a score, from 0 and averaged over ties,
    target = softmax((n - 1 - r) / (n - 1) / temperature), and the loss is
    KL(target || softmax(similarity / temperature)) / n. If all scores are equal, the target is uniform.

    Args:
      similarity: [pairs].
      scores: [pairs].
      temperature: Temperature of both distributions.

    Returns:
      A scalar; 0 for a list of one pair.
    """
    n = len(scores)
    # n - 1 - r is the average of the number of lower scores and the number of other scores that are not higher.
    # jax.scipy.stats.rankdata does not trace under vmap inside a shard_map (jax 0.10.2).
    reverse_rank = jnp.sum(scores[:, None] > scores, axis=1) + jnp.sum(scores[:, None] >= scores, axis=1) - 1
    reverse_rank = reverse_rank.astype(similarity.dtype) / 2
    target = log_softmax(reverse_rank / max(n - 1, 1) / temperature)
    predicted = log_softmax(similarity / temperature)
    return jnp.sum(jnp.exp(target) * (target - predicted)) / n


def pro(similarity: jax.Array, scores: jax.Array, temperature: float) -> jax.Array:
    """Preference ranking optimization: ranks each pair above all lower pairs, weighted by score gaps (CoDiEmb).

    Let s = similarity / temperature and y = scores. For the pairs j whose score is more than 1e-8 below that of pair k,
    let w_kj = y_k - y_j, and let w_k be the largest of these. The loss of k is
    -log(exp(w_k s_k) / (exp(w_k s_k) + sum_j exp(w_kj s_j))).

    Args:
      similarity: [pairs].
      scores: [pairs].
      temperature: Divides the similarities.

    Returns:
      The mean over all k with at least one lower pair, a scalar; 0 with a zero gradient if all scores are equal.
    """
    scaled = similarity / temperature
    scores = scores.astype(similarity.dtype)
    gaps = scores[:, None] - scores  # [k, j]
    lower = gaps > 1e-8
    own = jnp.max(gaps, axis=1) * scaled
    # The term of k itself is on the diagonal, so no row is fully masked.
    diagonal = jnp.eye(len(scores), dtype=bool)
    logits = jnp.where(diagonal, own[:, None], gaps * scaled)
    losses = logsumexp(logits, axis=1, where=lower | diagonal) - own
    ranked = jnp.any(lower, axis=1)
    return jnp.sum(jnp.where(ranked, losses, 0)) / jnp.maximum(jnp.sum(ranked), 1).astype(losses.dtype)


def codi_sts(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """Weighted sum of Pearson, rank KL, PRO and middle-layer InfoNCE, the similarity objective of CoDiEmb.

    Returns:
      The weighted sum, and its unweighted parts as means over lists: pearson, rank_kl, pro and, if `examples.middle` is
      given, mid_info_nce.
    """
    b = len(examples.scores)
    similarity = jnp.sum(examples.queries * examples.passages[:, 0], axis=-1)
    middle = None if examples.middle is None else (examples.middle[0], examples.middle[1][:, 0])

    def list_parts(similarity: jax.Array, scores: jax.Array, middle: tuple[jax.Array, jax.Array] | None) -> Parts:
        parts = {
            "pearson": pearson(similarity, scores),
            "rank_kl": rank_kl(similarity, scores, settings.list_temperature),
            "pro": pro(similarity, scores, settings.list_temperature),
        }
        if middle is not None:
            parts["mid_info_nce"] = in_batch_info_nce(
                *middle, scores, settings.temperature, settings.mid_info_nce_threshold
            )
        return parts

    lists = groups.split((similarity, examples.scores, middle), b)
    parts = groups.mean(jax.tree.map(jnp.mean, jax.vmap(list_parts)(*lists)))
    weights = {
        "pearson": settings.pearson_weight,
        "rank_kl": settings.rank_kl_weight,
        "pro": settings.pro_weight,
        "mid_info_nce": settings.mid_info_nce_weight,
    }
    return sum(weights[name] * part for name, part in parts.items()), parts
