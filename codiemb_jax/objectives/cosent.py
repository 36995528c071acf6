"""CoSENT: pairs with a higher label should be more similar than pairs with a lower one.

The baseline for both tasks of CoDiEmb (arXiv 2508.11442); the loss is due to Su (2022) and is
sentence-transformers' `CoSENTLoss` with scale = 1 / temperature.
"""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.contrastive import EXACT
from codiemb_jax.objectives.groups import Examples, Groups, Parts


def cosent(similarity: jax.Array, labels: jax.Array, temperature: float) -> jax.Array:
    """log(1 + sum over pairs i, j with label_i > label_j of exp((similarity_j - similarity_i) / temperature)).

    similarity, labels: [pairs].  Returns a scalar; 0, with a zero gradient, if all labels are equal.
    """
    scaled = similarity / temperature
    excess = scaled - scaled[:, None]  # [i, j]: by how much j is more similar than i
    # The leading 0 is the 1 of the formula.
    terms = jnp.where(labels[:, None] > labels, excess, _floor(excess))
    return logsumexp(jnp.concatenate([jnp.zeros(1, excess.dtype), terms.ravel()]))


def binary_cosent(similarity: jax.Array, positive: jax.Array, present: jax.Array, temperature: float) -> jax.Array:
    """`cosent` of the labels 1 (positive) and 0, over the pairs that are present, without a matrix of pairs of pairs.

    The double sum is then a product: of exp(similarity_j / temperature) over label 0, of exp(-similarity_i /
    temperature) over label 1.
    similarity: [pairs]; positive, present: bool [pairs].  Returns a scalar; 0 if either label is absent.
    """
    # Only differences matter; taken first, they stay exact.
    scaled = (similarity - jax.lax.stop_gradient(similarity[0])) / temperature
    lower = logsumexp(jnp.where(present & ~positive, scaled, _floor(scaled)))
    upper = logsumexp(jnp.where(present & positive, -scaled, _floor(scaled)))
    return jnp.logaddexp(jnp.zeros((), scaled.dtype), lower + upper)


def _floor(x: jax.Array) -> jax.Array:
    """Instead of -inf: the gradient of a log-sum-exp of nothing would pass through 0 / 0."""
    return jnp.asarray(jnp.finfo(x.dtype).min / 4, x.dtype)


def cosent_ir(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """CoSENT over the pairs of each query of a pool with its own passages: label 1 for positives, 0 for negatives.

    Returns the mean over pools.
    """
    b, texts, _ = examples.passages.shape
    positives = texts - examples.present.shape[1]
    similarity = jnp.einsum("bd,btd->bt", examples.queries, examples.passages, precision=EXACT)
    present = jnp.pad(examples.present, ((0, 0), (positives, 0)), constant_values=True)
    positive = jnp.broadcast_to(jnp.arange(texts) < positives, (b, texts))

    def of_pool(similarity: jax.Array, positive: jax.Array, present: jax.Array) -> jax.Array:
        return binary_cosent(similarity.ravel(), positive.ravel(), present.ravel(), settings.list_temperature)

    loss = groups.mean(jnp.mean(jax.vmap(of_pool)(*groups.lists((similarity, positive, present), b))))
    return loss, {"cosent": loss}


def cosent_sts(examples: Examples, settings: ObjectiveSettings, groups: Groups) -> tuple[jax.Array, Parts]:
    """CoSENT over the pairs of a list, labelled by their scores.  Returns the mean over lists."""
    b = len(examples.scores)
    similarity = jnp.sum(examples.queries * examples.passages[:, 0], axis=-1)

    def of_list(similarity: jax.Array, scores: jax.Array) -> jax.Array:
        return cosent(similarity, scores, settings.list_temperature)

    loss = groups.mean(jnp.mean(jax.vmap(of_list)(*groups.lists((similarity, examples.scores), b))))
    return loss, {"cosent": loss}
