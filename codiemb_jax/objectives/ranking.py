"""List-wise losses: how well predicted similarities follow the scores of a list of pairs."""

import jax
import jax.numpy as jnp
from jax.nn import log_softmax, logsumexp

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.contrastive import in_batch_info_nce
from codiemb_jax.objectives.groups import Examples, Groups, Parts


def pearson(similarity: jax.Array, scores: jax.Array) -> jax.Array:
    """1 - Pearson correlation, from population moments.

    similarity, scores: [pairs].  Returns a scalar: 0, with a zero gradient, if all scores are equal;
    otherwise 1, with a finite gradient, if all similarities are.
    """
    predicted, true = _standardized(similarity), _standardized(scores.astype(similarity.dtype))
    return jnp.where(jnp.any(true != 0), 1 - jnp.mean(predicted * true), 0)


def _standardized(values: jax.Array) -> jax.Array:
    """[pairs] with mean 0 and variance 1; zeros if all are equal."""
    # Equal values minus their mean may leave rounding errors, which the division would blow up.
    values = values - values[0]
    deviations = values - jnp.mean(values)
    variance = jnp.mean(deviations**2)
    return deviations / jnp.sqrt(jnp.where(variance > 0, variance, 1))


def rank_kl(similarity: jax.Array, scores: jax.Array, temperature: float) -> jax.Array:
    """KL divergence between a distribution built on the ranks of the scores and the similarities' (CoDiEmb).

    similarity, scores: [pairs].  With n pairs and r the 0-based descending rank of a score, ties averaged,
    target = softmax((n - 1 - r) / (n - 1) / temperature), and the loss is
    KL(target || softmax(similarity / temperature)) / n.
    Returns a scalar; 0 for a list of one.  Equal scores make a uniform target.
    """
    n = len(scores)
    # n - 1 - r is the mean of how many lie lower and how many others do not lie higher.
    # jax.scipy.stats.rankdata does not trace under vmap inside a shard_map (jax 0.10.2).
    reverse_rank = jnp.sum(scores[:, None] > scores, axis=1) + jnp.sum(scores[:, None] >= scores, axis=1) - 1
    reverse_rank = reverse_rank.astype(similarity.dtype) / 2
    target = log_softmax(reverse_rank / max(n - 1, 1) / temperature)
    predicted = log_softmax(similarity / temperature)
    return jnp.sum(jnp.exp(target) * (target - predicted)) / n


def pro(similarity: jax.Array, scores: jax.Array, temperature: float) -> jax.Array:
    """Preference ranking: each pair against all lower ones, weighted by the gap of the scores (CoDiEmb).

    similarity, scores: [pairs].  With s = similarity / temperature, w_kj = y_k - y_j for the pairs j whose
    score lies more than 1e-8 below that of k, and w_k the largest of them, the loss of k is
    -log(exp(w_k s_k) / (exp(w_k s_k) + sum_j exp(w_kj s_j))); mean over the k that have such pairs.
    Returns a scalar; 0, with a zero gradient, if all scores are equal.
    """
    scaled = similarity / temperature
    scores = scores.astype(similarity.dtype)
    gaps = scores[:, None] - scores  # [k, j]
    lower = gaps > 1e-8
    own = jnp.max(gaps, axis=1) * scaled
    # The diagonal holds the term of k itself, so that no row is empty.
    diagonal = jnp.eye(len(scores), dtype=bool)
    logits = jnp.where(diagonal, own[:, None], gaps * scaled)
    losses = logsumexp(logits, axis=1, where=lower | diagonal) - own
    ranked = jnp.any(lower, axis=1)
    return jnp.sum(jnp.where(ranked, losses, 0)) / jnp.maximum(jnp.sum(ranked), 1).astype(losses.dtype)


def codi_sts(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """Weighted sum of Pearson, rank KL, PRO and InfoNCE on the middle layer, CoDiEmb's objective of similarity.

    Each is the mean over lists.  Returns the sum and its unweighted parts: pearson, rank_kl, pro and, unless the
    middle layer is left out, mid_info_nce.
    """
    b = len(examples.scores)
    similarity = jnp.sum(examples.queries * examples.passages[:, 0], axis=-1)
    middle = None if examples.middle is None else (examples.middle[0], examples.middle[1][:, 0])

    def of_list(similarity: jax.Array, scores: jax.Array, middle: tuple[jax.Array, jax.Array] | None) -> Parts:
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

    lists = groups.lists((similarity, examples.scores, middle), b)
    parts = groups.mean(jax.tree.map(jnp.mean, jax.vmap(of_list)(*lists)))
    weights = {
        "pearson": settings.pearson_weight,
        "rank_kl": settings.rank_kl_weight,
        "pro": settings.pro_weight,
        "mid_info_nce": settings.mid_info_nce_weight,
    }
    return sum(weights[name] * part for name, part in parts.items()), parts
