"""CoSENT loss, which ranks pairs with a higher label above pairs with a lower label.

CoDiEmb (arXiv 2508.11442) uses it as a baseline for both tasks. The loss was proposed by Su (2022) and equals
`CoSENTLoss` of sentence-transformers with scale = 1 / temperature.
"""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.groups import Examples, Groups, Parts
from codiemb_jax.objectives.numerics import EXACT, mask_value


def cosent(similarity: jax.Array, labels: jax.Array, temperature: float) -> jax.Array:
    """log(1 + sum over i, j with label_i > label_j of exp((similarity_j - similarity_i) / temperature)).

    Args:
      similarity: [pairs].
      labels: [pairs].
      temperature: Divides the similarities.

    Returns:
      A scalar; 0 with a zero gradient if all labels are equal.
    """
    scaled = similarity / temperature
    excess = scaled - scaled[:, None]  # [i, j]: scaled similarity of pair j minus that of pair i
    # The leading 0 is the 1 inside the log of the formula.
    terms = jnp.where(labels[:, None] > labels, excess, mask_value(excess.dtype))
    return logsumexp(jnp.concatenate([jnp.zeros(1, excess.dtype), terms.ravel()]))


def binary_cosent(similarity: jax.Array, positive: jax.Array, present: jax.Array, temperature: float) -> jax.Array:
    """`cosent` for labels 1 (positive) and 0 of the present pairs, in linear instead of quadratic memory.

    With two labels, the double sum is a product of two sums: exp(similarity_j / temperature) over label 0 and
    exp(-similarity_i / temperature) over label 1.

    Args:
      similarity: [pairs].
      positive: bool [pairs].
      present: bool [pairs].
      temperature: Divides the similarities.

    Returns:
      A scalar; 0 if no present pair has one of the labels.
    """
    # Only differences of similarities matter. Subtract before dividing, where the differences are exact.
    scaled = (similarity - jax.lax.stop_gradient(similarity[0])) / temperature
    lower = logsumexp(jnp.where(present & ~positive, scaled, mask_value(scaled.dtype)))
    upper = logsumexp(jnp.where(present & positive, -scaled, mask_value(scaled.dtype)))
    return jnp.logaddexp(jnp.zeros((), scaled.dtype), lower + upper)


def cosent_ir(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """CoSENT over the pairs of each query with its own passages, with label 1 for positives and 0 for negatives.

    Each pool is one list of such pairs. Returns the mean over pools.
    """
    b, texts, _ = examples.passages.shape
    positives = texts - examples.present.shape[1]
    similarity = jnp.einsum("bd,btd->bt", examples.queries, examples.passages, precision=EXACT)
    present = jnp.pad(examples.present, ((0, 0), (positives, 0)), constant_values=True)
    positive = jnp.broadcast_to(jnp.arange(texts) < positives, (b, texts))

    def pool_loss(similarity: jax.Array, positive: jax.Array, present: jax.Array) -> jax.Array:
        return binary_cosent(similarity.ravel(), positive.ravel(), present.ravel(), settings.list_temperature)

    loss = groups.mean(jnp.mean(jax.vmap(pool_loss)(*groups.split((similarity, positive, present), b))))
    return loss, {"cosent": loss}


def cosent_sts(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """CoSENT over the pairs of each list, labeled by their scores. Returns the mean over lists."""
    b = len(examples.scores)
    similarity = jnp.sum(examples.queries * examples.passages[:, 0], axis=-1)

    def list_loss(similarity: jax.Array, scores: jax.Array) -> jax.Array:
        return cosent(similarity, scores, settings.list_temperature)

    loss = groups.mean(jnp.mean(jax.vmap(list_loss)(*groups.split((similarity, examples.scores), b))))
    return loss, {"cosent": loss}
